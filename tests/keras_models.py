"""What the tests of the Keras adapter share: inputs, what is captured, and a model that calls each of its layers."""

from __future__ import annotations

import os

import keras
import numpy as np

import comq_keras
import comq_np

BACKEND = os.environ["KERAS_BACKEND"]


def values(tensor):
    """Tensor or variable as an array."""
    tensor = getattr(tensor, "value", tensor)
    if BACKEND == "torch":
        tensor = tensor.detach()
        return tensor.float().numpy() if "bfloat" in str(tensor.dtype) else tensor.numpy()
    return np.asarray(tensor)


def random(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def captured(tmp_path, model, batches, *args, **kwargs):
    """Layers by name."""
    comq_keras.capture(model, batches, tmp_path / "calibration.h5", *args, **kwargs)
    with comq_np.CalibrationFile(tmp_path / "calibration.h5") as file:
        return dict(file)


def assert_gram(gram, rows):
    """The Gram holds just these rows (samples, m) or (samples, b, m), of two batches, the first half of each first."""
    X = rows.astype(np.float64)
    assert gram.count == len(X)
    np.testing.assert_allclose(gram.matrix, np.einsum("s...i,s...j->...ij", X, X), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gram.mean * len(X), X.sum(axis=0), rtol=1e-5, atol=1e-4)


class Each(keras.Model):
    """Calls every layer on its input, and keeps what came out."""

    def __init__(self, made):
        super().__init__()
        self.made, self.outputs_of = made, {layer.name: [] for layer in made}

    def call(self, x):
        for layer in self.made:
            self.outputs_of[layer.name].append(values(layer(x)))
