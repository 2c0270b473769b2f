"""Layers, and files of them."""

from __future__ import annotations

import numpy as np
import pytest

import comq_np


@pytest.fixture
def layers(problem):
    """Three layers; the first two share a Gram."""
    made = []
    for name, n, seed in (("q", 5, 0), ("a/b.c", 3, 1), ("", 4, 2)):
        W, X, _ = problem(6, n, seed=seed)
        if name == "a/b.c":
            gram = made[0].gram
        else:
            gram = comq_np.Gram(6)
            gram.update(X[:10])
            gram.update(X[10:])
        bias = np.arange(n, dtype=np.float32) if name else None
        made.append(comq_np.Layer(name, W, gram, bias, "conv2d" if name == "q" else "linear"))
    return made


@pytest.fixture
def calibration(layers, tmp_path):
    path = tmp_path / "calibration.h5"
    with comq_np.CalibrationWriter(path) as file:
        for layer in layers:
            file.add(layer)
    return path


@pytest.fixture
def quantized(problem, tmp_path):
    """Quantized file with one layer, "fc": 4 bits, 20 rows in groups of 8, 5 columns."""
    W, _, G = problem(20, 5)
    path = tmp_path / "quantized.h5"
    with comq_np.QuantizedWriter(path) as file:
        file.add("fc", comq_np.solve(W, G, 4, group_size=8))
    return path
