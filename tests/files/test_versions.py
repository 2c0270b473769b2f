"""Files of each version, which must load for ever."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
from stored import assert_equal_grams

import comq_np
from comq_np import store

DATA = pathlib.Path(__file__).parents[1] / "data"


FROZEN_GRAM = comq_np.Gram.from_folds(
    (
        (np.array([[5.0, 1.0, 0.5], [1.0, 2.0, 0.25], [0.5, 0.25, 1.0]]), np.array([3.0, -1.0, 0.125]), 4),
        (np.eye(3), np.array([1.0, 1.0, 1.0]), 3),
    )
)
FROZEN_LAYERS = (
    comq_np.Layer(
        "encoder.0/q", np.arange(6, dtype=np.float32).reshape(3, 2) / 4, FROZEN_GRAM, np.array([0.5, -2.0], np.float32)
    ),
    comq_np.Layer("größe", -np.arange(12, dtype=np.float32).reshape(3, 4), FROZEN_GRAM, kind="conv2d"),
)
FROZEN_REPORT = comq_np.SolveReport(
    recipe="balanced",
    backend="cpu",
    objective_rounding=3.5,
    objective_start=3.25,
    objectives=(2.5, 2.25),
    objective=2.25,
    relative_error=0.0625,
    sweeps=2,
    codes_changed=(3, 0),
    converged=True,
    shrinkage=0.0,
    seconds=0.125,
    notes=("A sentence.",),
)
FROZEN_ARRAYS = {
    "column": comq_np.QuantizedArray(
        np.array([[0, 7], [3, 1], [5, 6]], np.uint8),
        np.array([[0.5, 0.25]], np.float32),
        np.array([[3, -70_000]], np.int32),
        bits=3,
        levels=8,
        group_size=None,
        bias_shift=np.array([0.5, -1.0], np.float32),
        report=FROZEN_REPORT,
    ),
    "groups": comq_np.QuantizedArray(
        np.array([[0, 1], [2, 1], [2, 0]], np.uint8),
        np.array([[0.5, 0.25], [1.0, 2.0]], np.float32),
        np.array([[1, 1], [200, -1]], np.int32),
        bits=2,
        levels=3,
        group_size=2,
        bias_shift=None,
        report=dataclasses.replace(FROZEN_REPORT, relative_error=float("inf"), notes=()),
    ),
    "tensor": comq_np.QuantizedArray(
        np.array([[255, 0, 17]], np.uint8),
        np.array([[0.125] * 3], np.float32),
        np.array([[128] * 3], np.int32),
        bits=8,
        levels=256,
        group_size="tensor",
        bias_shift=None,
        report=FROZEN_REPORT,
    ),
}


FROZEN_WIDE = {
    "wide": comq_np.QuantizedArray(
        np.array([[0, 999], [1023, 1], [514, 700]], np.uint16),
        np.array([[0.5, 0.25]], np.float32),
        np.array([[512, -70_000]], np.int32),
        bits=10,
        levels=1024,
        group_size=None,
        bias_shift=None,
        report=FROZEN_REPORT,
    ),
    "widest": comq_np.QuantizedArray(
        np.array([[65_535, 0, 258]], np.uint16),
        np.array([[0.125] * 3], np.float32),
        np.array([[32_768] * 3], np.int32),
        bits=16,
        levels=65_536,
        group_size="tensor",
        bias_shift=None,
        report=FROZEN_REPORT,
    ),
}


FROZEN_GROUPS_GRAM = comq_np.Gram.from_folds(
    (
        (np.stack([np.eye(2), [[4.0, 0.5], [0.5, 1.0]], [[1.0, 0.0], [0.0, 9.0]]]), np.arange(6.0).reshape(3, 2), 5),
        (np.stack([2 * np.eye(2)] * 3), -np.ones((3, 2)), 4),
    )
)
FROZEN_GROUPS_LAYER = comq_np.Layer(
    "depthwise",
    np.arange(6, dtype=np.float32).reshape(3, 2, 1) / 4,
    FROZEN_GROUPS_GRAM,
    np.array([[0.5], [-2.0], [0.0]], np.float32),
    "conv2d",
)
FROZEN_GROUPS = comq_np.QuantizedArray(
    np.array([[[0], [7]], [[3], [1]], [[5], [6]]], np.uint8),
    np.array([[[0.5]], [[0.25]], [[1.0]]], np.float32),
    np.array([[[3]], [[-70_000]], [[4]]], np.int32),
    bits=3,
    levels=8,
    group_size=None,
    bias_shift=np.array([[0.5], [-1.0], [0.25]], np.float32),
    report=FROZEN_REPORT,
)


FROZEN_REASON = "`G` must have seen inputs, got a Gram with count 0."


def freeze(folder):
    """Write the files; `tests/data` holds what this wrote with the versions of the formats in their names."""
    with comq_np.CalibrationWriter(folder / "calibration-v1.h5") as file:
        for layer in FROZEN_LAYERS:
            file.add(layer)
    for name, arrays in (("quantized-v1.h5", FROZEN_ARRAYS), ("quantized-v1-wide.h5", FROZEN_WIDE)):
        with comq_np.QuantizedWriter(folder / name) as file:
            for layer, q in arrays.items():
                file.add(layer, q)
    with comq_np.QuantizedWriter(folder / "quantized-v1-kept.h5") as file:
        file.keep("odd", FROZEN_REASON)
        file.add("column", FROZEN_ARRAYS["column"])
    comq_np.save_gram(folder / "gram-v1.h5", FROZEN_GRAM)
    with comq_np.CalibrationWriter(folder / "calibration-v2.h5") as file:
        file.add(FROZEN_GROUPS_LAYER)
    with comq_np.QuantizedWriter(folder / "quantized-v2.h5") as file:
        file.add("depthwise", FROZEN_GROUPS)
    comq_np.save_gram(folder / "gram-v2.h5", FROZEN_GROUPS_GRAM)


@pytest.fixture(params=["frozen", "now"])
def samples(request, tmp_path):
    """Folder of the frozen files, or of what the writers make of the same layers today."""
    if request.param == "frozen":
        return DATA
    freeze(tmp_path)
    return tmp_path


def test_frozen_calibration(samples):
    with comq_np.CalibrationFile(samples / "calibration-v1.h5") as file:
        assert list(file) == [layer.name for layer in FROZEN_LAYERS]
        assert [row["samples"] for row in file.describe()] == [7, 7]
        for expected in FROZEN_LAYERS:
            found = file[expected.name]
            assert (found.name, found.kind) == (expected.name, expected.kind)
            np.testing.assert_array_equal(found.weight, expected.weight)
            np.testing.assert_equal(found.bias, expected.bias)
            assert_equal_grams(found.gram, FROZEN_GRAM)


@pytest.mark.parametrize(("name", "arrays"), [("quantized-v1", FROZEN_ARRAYS), ("quantized-v1-wide", FROZEN_WIDE)])
def test_frozen_quantized(samples, name, arrays):
    with comq_np.QuantizedFile(samples / f"{name}.h5") as file:
        assert list(file) == [row["layer"] for row in file.describe()] == list(arrays)
        for layer, expected in arrays.items():
            for field in dataclasses.fields(expected):
                np.testing.assert_equal(getattr(file[layer], field.name), getattr(expected, field.name))
            assert file[layer].codes.dtype == expected.codes.dtype
            np.testing.assert_array_equal(file[layer].dequantize(), expected.dequantize())


def test_frozen_layers_that_stay_float(samples):
    with comq_np.QuantizedFile(samples / "quantized-v1-kept.h5") as file:
        assert (list(file), file.kept) == (["column"], {"odd": FROZEN_REASON})
        np.testing.assert_array_equal(file["column"].codes, FROZEN_ARRAYS["column"].codes)


def test_frozen_weights(samples):
    with comq_np.QuantizedFile(samples / "quantized-v1.h5") as file:
        np.testing.assert_array_equal(file["tensor"].dequantize(), [[15.875, -16.0, -13.875]])
    with comq_np.QuantizedFile(samples / "quantized-v1-wide.h5") as file:
        np.testing.assert_array_equal(file["widest"].dequantize(), [[4095.875, -4096.0, -4063.75]])


def test_frozen_gram(samples):
    assert_equal_grams(comq_np.load_gram(samples / "gram-v1.h5"), FROZEN_GRAM)


def test_frozen_groups(samples):
    with comq_np.CalibrationFile(samples / "calibration-v2.h5") as file:
        found = file["depthwise"]
    np.testing.assert_array_equal(found.weight, FROZEN_GROUPS_LAYER.weight)
    np.testing.assert_array_equal(found.bias, FROZEN_GROUPS_LAYER.bias)
    for gram in (found.gram, comq_np.load_gram(samples / "gram-v2.h5")):
        assert gram.problems == 3
        assert_equal_grams(gram, FROZEN_GROUPS_GRAM)
    with comq_np.QuantizedFile(samples / "quantized-v2.h5") as file:
        for field in dataclasses.fields(FROZEN_GROUPS):
            np.testing.assert_equal(getattr(file["depthwise"], field.name), getattr(FROZEN_GROUPS, field.name))
        np.testing.assert_array_equal(
            file["depthwise"].dequantize()[:, :, 0], [[-1.5, 2], [17500.75, 17500.25], [1, 2]]
        )


@pytest.mark.parametrize(("name", "version"), [("calibration-v1", 1), ("quantized-v1", 1), ("gram-v2", 2)])
def test_a_file_says_its_own_version(name, version):
    assert store.about(DATA / f"{name}.h5")["version"] == version
