"""What the tests of files share: changes to a layer in a file, and what is said when it is read."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

import comq_np


def assert_equal_grams(one, two):
    for a, b in zip(one.folds, two.folds, strict=True):
        np.testing.assert_array_equal(a.matrix, b.matrix)
        np.testing.assert_array_equal(a.sum, b.sum)
        assert a.count == b.count


def assert_holds(calibration, layers):
    """The file holds the layers of `conftest`, the first two with one Gram."""
    with comq_np.CalibrationFile(calibration) as file:
        assert list(file) == ["q", "a/b.c", ""]
        assert len(file) == 3
        for layer in layers:
            found = file[layer.name]
            assert (found.name, found.kind) == (layer.name, layer.kind)
            np.testing.assert_array_equal(found.weight, layer.weight)
            assert found.weight.dtype == np.float32
            assert_equal_grams(found.gram, layer.gram)
            if layer.bias is None:
                assert found.bias is None
            else:
                np.testing.assert_array_equal(found.bias, layer.bias)
        first, second = file["q"], file["a/b.c"]
        assert first.gram is second.gram
        with pytest.raises(KeyError):
            file["other"]
    with h5py.File(calibration) as file:
        assert [int(file[f"layers/{k}"].attrs["gram"]) for k in range(3)] == [0, 0, 1]
        assert sorted(file["grams"]) == ["0", "1"]


def drop(name):
    def change(layer):
        del layer[name]

    return change


def put(name, value):
    def change(layer):
        del layer[name]
        layer[name] = value

    return change


def attribute(name, value):
    def change(layer):
        layer.attrs[name] = value

    return change


def refused(reader, path):
    def read():
        with reader(path) as file:
            for name in file:
                file[name]

    with pytest.raises(comq_np.FileError) as error:
        read()
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")
