"""What a layer that is quantized in sequence must give, from the inputs that it and its float self get."""

from __future__ import annotations

import numpy as np
import pytest

import comq_np


def assert_matched(W, bias, own, exact, found, bits, fit_bias):
    """Judge the outputs `found` of a quantized layer.

    The float layer has W and a bias. Inputs are batch after batch: its `own` in the quantized model, and those in the
    `exact` one. All are float64, found (samples, n).
    """
    gram, cross = comq_np.Gram(len(W)), np.zeros((2, len(W), len(W)))
    mean, other = (np.mean(np.concatenate(rows), axis=0) * fit_bias for rows in (own, exact))
    for x, y in zip(own, exact, strict=True):
        halves = zip(np.array_split(x - mean, 2), np.array_split(y - other, 2), strict=True)
        for fold, (some, more) in enumerate(halves):
            gram.update(some.astype(np.float32), fold=fold)
            cross[fold] += some.T @ more
    expected = comq_np.solve(W, gram, bits, cross=cross).dequantize()
    wanted = np.concatenate(exact) @ W + bias
    of_expected = np.concatenate(own) @ expected + bias + other @ W - mean @ expected
    # Not the same codes: how single precision rounds decides between minima that are next to each other.
    assert np.square(found - wanted).sum() == pytest.approx(np.square(of_expected - wanted).sum(), rel=0.05)
    if fit_bias:
        np.testing.assert_allclose(found.mean(axis=0), wanted.mean(axis=0), atol=1e-4)
