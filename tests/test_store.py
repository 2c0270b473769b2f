"""Files: what goes in comes out, the documented layout, and what is refused, naming file, place and reason."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import stat
import subprocess
import sys
import tracemalloc

import h5py
import naive
import numpy as np
import pytest
from edits import editing

import comq_np
from comq_np import hdf5, packing, store

DATA = pathlib.Path(__file__).parent / "data"


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


def assert_equal_grams(one, two):
    for a, b in zip(one.folds, two.folds, strict=True):
        np.testing.assert_array_equal(a.matrix, b.matrix)
        np.testing.assert_array_equal(a.sum, b.sum)
        assert a.count == b.count


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


# What goes in comes out.


def test_calibration_round_trip(layers, calibration):
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


def test_layers_with_the_same_inputs_share_a_gram(calibration):
    with h5py.File(calibration) as file:
        assert [int(file[f"layers/{k}"].attrs["gram"]) for k in range(3)] == [0, 0, 1]
        assert sorted(file["grams"]) == ["0", "1"]


@pytest.mark.parametrize("size", [None, "tensor", 1, 8, 64])
@pytest.mark.parametrize("bits", [*range(1, 9), 9, 12, 16])
def test_quantized_round_trip(problem, tmp_path, size, bits):
    W, X, _ = problem(21, 5)
    gram = comq_np.Gram(21)
    gram.update(X)
    q = comq_np.solve(W, gram, bits, group_size=size, fit_bias=bits % 2 == 0)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        found = file["fc"]
    for name in ("codes", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(found, name), getattr(q, name))
        assert getattr(found, name).dtype == getattr(q, name).dtype
    np.testing.assert_array_equal(found.dequantize(), q.dequantize())
    assert (found.bits, found.levels, found.group_size) == (q.bits, q.levels, q.group_size)
    assert found.report == q.report
    if q.bias_shift is None:
        assert found.bias_shift is None
    else:
        np.testing.assert_array_equal(found.bias_shift, q.bias_shift)


@pytest.mark.parametrize(("levels", "bits"), [(3, 2), (257, 9), (1000, 10)])
def test_levels_survive(problem, tmp_path, levels, bits):
    W, _, G = problem(20, 5)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", comq_np.solve(W, G, levels=levels, symmetric=True))
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        assert (file["fc"].levels, file["fc"].bits) == (levels, bits)
    with editing(tmp_path / "q.h5") as file:
        attribute("levels", int(comq_np.unpack_codes(file["layers/0/codes"][()], bits, 20).max()))(file["layers/0"])
    assert "/layers/0/codes: must lie below" in refused(comq_np.QuantizedFile, tmp_path / "q.h5")


def test_zero_points_far_outside_the_codes_survive(tmp_path):
    W = np.array([[1000.0, 0.0], [1001.0, 1.0], [1003.0, -1.0]])
    q = comq_np.solve(W, np.eye(3), 4)
    assert q.zero_point.min() < -1000
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        np.testing.assert_array_equal(file["fc"].zero_point, q.zero_point)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], np.uint8),
        ([-128, 127], np.int8),
        ([200, -1], np.int16),
        ([256, 0], np.uint16),
        ([-129, 5], np.int16),
        ([70_000, 0], np.int32),
        ([40_000, -1], np.int32),
        ([2**30, 0], np.int32),
        ([-(2**30), 0], np.int32),
        ([-(2**30), 2**30], np.int32),
    ],
)
def test_every_zero_point_survives_in_the_smallest_type(tmp_path, values, dtype):
    q = comq_np.solve([[1.0, 2.0]], [[1.0]], 4)
    q = dataclasses.replace(q, zero_point=np.array([values], np.int32))
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        np.testing.assert_array_equal(file["fc"].zero_point, q.zero_point)
        assert file["fc"].zero_point.dtype == np.int32
    with h5py.File(tmp_path / "q.h5") as file:
        assert file["layers/0/zero_point"].dtype == dtype


def test_an_infinite_error_survives_in_standard_json(tmp_path):
    q = comq_np.solve([[1.0, 2.0]], [[1.0]], 4)
    q = dataclasses.replace(q, report=dataclasses.replace(q.report, relative_error=float("inf")))
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", q)
    with h5py.File(tmp_path / "q.h5") as file:
        text = file["layers/0/report"].asstr()[()]
    assert '"relative_error": null' in text
    assert "Infinity" not in text
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        assert file["fc"].report == q.report
        assert file.describe()[0]["relative_error"] == float("inf")


def test_a_report_of_a_later_version_is_read(quantized):
    with comq_np.QuantizedFile(quantized) as file:
        expected = file["fc"].report
    with editing(quantized) as file:
        put("report", json.dumps({**expected.to_dict(), "device": {"name": "x"}}))(file["layers/0"])
    with comq_np.QuantizedFile(quantized) as file:
        assert file["fc"].report == expected


def test_asking_whether_there_is_a_layer_reads_nothing(calibration, monkeypatch):
    with comq_np.CalibrationFile(calibration) as file:
        monkeypatch.setattr(hdf5, "array", None)
        assert "q" in file
        assert "other" not in file


def test_grams_are_listed_once(calibration, monkeypatch):
    listed, numbered = [], hdf5.numbered
    monkeypatch.setattr(hdf5, "numbered", lambda file, name: listed.append(name) or numbered(file, name))
    with comq_np.CalibrationFile(calibration) as file:
        file.describe()
        dict(file)
    assert listed == ["layers", "grams"]


@pytest.mark.parametrize("bits", [1, 3, 8, 9, 13, 16])
def test_packing_takes_little_memory(monkeypatch, bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (512, 512)).astype(np.uint8 if bits <= 8 else np.uint16)
    expected = comq_np.pack_codes(codes, bits)
    monkeypatch.setattr(packing, "BLOCK", 2**16)
    tracemalloc.start()
    packed = comq_np.pack_codes(codes, bits)
    back = comq_np.unpack_codes(packed, bits, len(codes))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(back, codes)
    assert peak < packed.nbytes + back.nbytes + 4 * 2**16


def test_gram_round_trip(layers, tmp_path):
    comq_np.save_gram(tmp_path / "gram.h5", layers[0].gram)
    assert_equal_grams(comq_np.load_gram(tmp_path / "gram.h5"), layers[0].gram)


def test_empty_files(tmp_path):
    for writer, reader in (
        (comq_np.CalibrationWriter, comq_np.CalibrationFile),
        (comq_np.QuantizedWriter, comq_np.QuantizedFile),
    ):
        with writer(tmp_path / "empty.h5"):
            pass
        with reader(tmp_path / "empty.h5") as file:
            assert list(file) == file.describe() == []


def test_describe(calibration, quantized):
    with comq_np.CalibrationFile(calibration) as file:
        rows = file.describe()
        samples = file["q"].gram.count
    assert rows[0] == {
        "layer": "q", "kind": "conv2d", "problems": 1, "rows": 6, "columns": 5, "bias": True, "gram": 0,
        "diagonal": False, "crossed": False, "activation_bits": "float", "samples": samples
    }  # fmt: skip
    assert [row["gram"] for row in rows] == [0, 0, 1]
    with comq_np.QuantizedFile(quantized) as file:
        (row,), q = file.describe(), file["fc"]
    with h5py.File(quantized) as file:
        zero_point = file["layers/0/zero_point"]
        assert zero_point.dtype.itemsize < 4
        assert row["bytes"] == 5 * 10 + 4 * 15 + zero_point.nbytes
    assert (row["rows"], row["columns"], row["bits"], row["group_size"]) == (20, 5, 4, 8)
    assert row["relative_error"] == q.report.relative_error


# Layers of several problems.


@pytest.fixture
def groups(problem):
    """Layers of 1, 3 and 40 problems; the first has no bias, the last two share a Gram."""
    made = []
    for b, m, n in ((1, 6, 4), (3, 20, 5), (40, 9, 1)):
        found = [problem(m, n, seed=seed) for seed in range(b)]
        gram = comq_np.Gram(m, problems=b)
        gram.update(np.stack([one.X[:30] for one in found], axis=1))
        W, bias = np.stack([one.W for one in found]), np.arange(b * n, dtype=np.float32).reshape(b, n)
        made.append(comq_np.Layer(f"{b} groups", W, gram, bias if b > 1 else None, "conv2d"))
    return [*made, dataclasses.replace(made[-1], name="again")]


def test_groups_round_trip(groups, tmp_path):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for layer in groups:
            file.add(layer)
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        rows = file.describe()
        for layer in groups:
            found = file[layer.name]
            np.testing.assert_array_equal(found.weight, layer.weight)
            np.testing.assert_equal(found.bias, layer.bias)
            assert_equal_grams(found.gram, layer.gram)
            assert found.gram.problems == len(layer.weight)
    assert [(row["problems"], row["rows"], row["columns"], row["gram"]) for row in rows] == [
        (1, 6, 4, 0), (3, 20, 5, 1), (40, 9, 1, 2), (40, 9, 1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("size", [None, "tensor", 8])
@pytest.mark.parametrize("bits", [3, 8, 11])
def test_quantized_groups_round_trip(groups, tmp_path, size, bits):
    options = {"group_size": size, "recipe": "fast"}
    solved = {
        layer.name: comq_np.solve(layer.weight, layer.gram, bits, fit_bias=layer.bias is not None, **options)
        for layer in groups
    }
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        for name, q in solved.items():
            file.add(name, q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        rows, found = file.describe(), dict(file)
    for name, q in solved.items():
        for field in dataclasses.fields(q):
            np.testing.assert_equal(getattr(found[name], field.name), getattr(q, field.name))
        np.testing.assert_array_equal(found[name].dequantize(), q.dequantize())
    assert [(row["problems"], row["rows"], row["columns"]) for row in rows] == [
        layer.weight.shape for layer in groups
    ]  # fmt: skip


def test_gram_of_several_problems(groups, tmp_path):
    comq_np.save_gram(tmp_path / "gram.h5", groups[1].gram)
    found = comq_np.load_gram(tmp_path / "gram.h5")
    assert (found.problems, len(found)) == (3, 20)
    assert_equal_grams(found, groups[1].gram)


def test_equal_numbers_in_other_shapes_are_other_grams(groups, tmp_path):
    """A Gram of one problem with an axis for it has the bytes of one without."""
    first, *_ = groups
    alone = comq_np.Gram.from_folds(tuple((fold.matrix[0], fold.sum[0], fold.count) for fold in first.gram.folds))
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(first)
        file.add(comq_np.Layer("alone", first.weight[0], alone))
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert [row["gram"] for row in file.describe()] == [0, 1]
        assert (file["1 groups"].gram.problems, file["alone"].gram.problems) == (1, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("weight", np.zeros((3, 20, 5, 1), np.float32)), "/layers/1/weight: must have shape ([any,] any, any), "),
        (
            put("weight", np.zeros((3, 21, 5), np.float32)),
            "/layers/1: must name a Gram of width 21, as its weight has ",
        ),
        (put("bias", np.zeros(5, np.float32)), "/layers/1/bias: must have shape (3, 5), has (5,)."),
        (drop("bias"), "/layers/1: must name a Gram with `problems` 3, as its weight has axes, names one with 40."),
    ],
)
def test_broken_groups(groups, tmp_path, change, message):
    path = tmp_path / "c.h5"
    with comq_np.CalibrationWriter(path) as file:
        for layer in groups:
            file.add(layer)
    with editing(path) as file:
        if "names one" in message:
            file["layers/1"].attrs["gram"] = 2
            put("weight", np.zeros((3, 9, 5), np.float32))(file["layers/1"])
        change(file["layers/1"])
    assert refused(comq_np.CalibrationFile, path).startswith(message)


def test_broken_gram_of_several_problems(groups, tmp_path):
    path = tmp_path / "gram.h5"
    for matrix, total, message in (
        ((3, 20, 20), (2, 20), "/fold1/matrix: must have shape (2, 20, 20), has (3, 20, 20)."),
        ((2, 20, 20), (2, 20), "/: `matrix` must have shape (3, 20, 20), got (2, 20, 20)."),
        ((3, 20, 20), (1, 3, 20), "/fold1/sum: must have shape ([any,] any,), has (1, 3, 20)."),
    ):
        comq_np.save_gram(path, groups[1].gram)
        with editing(path) as file:
            put("matrix", np.zeros(matrix))(file["fold1"])
            put("sum", np.zeros(total))(file["fold1"])
        with pytest.raises(comq_np.FileError) as error:
            comq_np.load_gram(path)
        assert str(error.value) == f"{path}: {message}"


# The documented layout, read without comq_np.


def test_quantized_layout(quantized):
    with h5py.File(quantized) as file:
        assert (file.attrs["format"], file.attrs["version"]) == (b"comq_np.quantized", 2)
        assert file.attrs["software"].decode() == f"comq_np {comq_np.__version__}"
        layer = file["layers/0"]
        attributes = {name: layer.attrs[name] for name in ("name", "rows", "bits", "levels", "group_size")}
        packed, scale, zero_point = (layer[name][()] for name in ("codes", "scale", "zero_point"))
        report = json.loads(layer["report"].asstr()[()])
    assert attributes == {"name": b"fc", "rows": 20, "bits": 4, "levels": 16, "group_size": 8}
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(5, 20)
    with comq_np.QuantizedFile(quantized) as file:
        q = file["fc"]
    group = np.arange(20) // 8
    np.testing.assert_allclose(scale[group] * (codes.T.astype(float) - zero_point[group]), q.dequantize(), rtol=1e-6)
    assert report == {k: v for k, v in json.loads(json.dumps(q.report.to_dict())).items() if k != "seconds"}


def test_calibration_layout(calibration, layers):
    with h5py.File(calibration) as file:
        assert (file.attrs["format"], file.attrs["version"]) == (b"comq_np.calibration", 2)
        assert [file[f"layers/{k}"].attrs["name"] for k in range(3)] == [b"q", b"a/b.c", b""]
        np.testing.assert_array_equal(file["layers/1/weight"][()], layers[1].weight)
        np.testing.assert_array_equal(file["layers/1/bias"][()], layers[1].bias)
        total = file["grams/1/fold0/matrix"][()] + file["grams/1/fold1/matrix"][()]
        np.testing.assert_array_equal(total, layers[2].gram.matrix)
        counts = [file[f"grams/1/fold{k}"].attrs["count"] for k in (0, 1)]
        assert counts == [fold.count for fold in layers[2].gram.folds]


# Files of each version, which must load for ever.

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


# Written whole or not at all.


def test_a_failure_leaves_the_old_file(calibration, layers, tmp_path):
    before = calibration.read_bytes()

    def fail():
        with comq_np.CalibrationWriter(calibration) as file:
            file.add(layers[0])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert calibration.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.h5"]


def test_a_file_appears_only_when_it_is_complete(layers, tmp_path):
    path = tmp_path / "calibration.h5"
    with comq_np.CalibrationWriter(path) as file:
        file.add(layers[0])
        assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.h5"]


def test_what_is_synced_is_open_for_writing(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    synced = []

    def sync(file):
        if stat.S_ISREG(os.fstat(file).st_mode):
            synced.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", sync)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", comq_np.solve([[1.0]], [[1.0]]))
    assert synced == [os.O_RDWR] * 2


@pytest.mark.parametrize("path", ["", ".", "folder", "/"])
def test_a_folder_is_no_place_for_a_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for make in (comq_np.CalibrationWriter, comq_np.QuantizedWriter, lambda path: comq_np.save_gram(path, GRAM)):
        with pytest.raises(comq_np.FileError) as error:
            make(path)
        assert str(error.value) == f"{path or repr('')}: cannot be written: it is a folder."
    with pytest.raises(comq_np.FileError) as error:
        comq_np.load_gram(path)
    assert str(error.value) == f"{path or repr('')}: cannot be read: it is a folder."
    assert [entry.name for entry in tmp_path.rglob("*")] == ["folder"]


GRAM = comq_np.Gram(2)

FULL = """
import resource, sys
import numpy as np, comq_np
limit, size, path = *map(int, sys.argv[1:3]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with comq_np.CalibrationWriter(path) as file:
        file.add(comq_np.Layer("x", np.ones((2, size), np.float32), comq_np.Gram(2)))
except comq_np.FileError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="no other system limits the size of a file")
@pytest.mark.parametrize(("limit", "size"), [(100, 2), (3000, 2), (3000, 100_000), (100_000, 100_000)])
def test_a_full_disk(tmp_path, limit, size):
    path = tmp_path / "c.h5"
    command = [sys.executable, "-c", FULL, str(limit), str(size), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(DATA.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    assert done.stdout == f"{path}: cannot be written: File too large.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_cannot_be_written_is_gone(layers, tmp_path, monkeypatch):
    put_in = h5py.Group.__setitem__

    def fail(group, name, value):
        if name in ("bias", "sum", "scale"):
            raise RuntimeError("Unable to write")
        put_in(group, name, value)

    calibration, quantized = tmp_path / "c.h5", tmp_path / "q.h5"
    q = comq_np.solve([[1.0]], [[1.0]])
    unbiased = dataclasses.replace(layers[0], bias=None)
    with comq_np.CalibrationWriter(calibration) as file, comq_np.QuantizedWriter(quantized) as target:
        with monkeypatch.context() as broken:
            broken.setattr(h5py.Group, "__setitem__", fail)
            for add in (lambda: file.add(layers[0]), lambda: file.add(unbiased), lambda: target.add("q", q)):
                with pytest.raises(comq_np.FileError, match=r"\.h5: cannot be written: Unable to write\."):
                    add()
        target.add("q", q)
        for layer in layers:
            file.add(layer)
    test_calibration_round_trip(layers, calibration)
    test_layers_with_the_same_inputs_share_a_gram(calibration)
    with comq_np.QuantizedFile(quantized) as file:
        assert list(file) == ["q"]


# Refused on the way in.


def test_refused_layers(tmp_path, problem):
    W, X, _ = problem(4, 3)
    gram, groups = comq_np.Gram(4), comq_np.Gram(4, problems=2)
    gram.update(X)
    cases = [
        (comq_np.Layer("x", W[:, 0], gram), "layer 'x': `weight` must be 2-D or 3-D, got 1-D of shape (4,)."),
        (comq_np.Layer("x", W + np.inf, gram), "layer 'x': `weight` must be finite, got 12 NaN or infinite of 12 ..."),
        (comq_np.Layer("x", W[:3], gram), "layer 'x': `gram` must be of width 3, as `weight` has rows, is of 4."),
        (comq_np.Layer("x", W, gram, np.zeros(4)), "layer 'x': `bias` must have shape (3,), got (4,)."),
        (
            comq_np.Layer("x", W[None], gram),
            "layer 'x': `gram` must have `problems` 1, as `weight` has shape (1, 4, ...",
        ),
        (
            comq_np.Layer("x", W, groups),
            "layer 'x': `gram` must have `problems` None, as `weight` has shape (4, 3), ...",
        ),
        (
            comq_np.Layer("x", np.stack([W] * 2), groups, np.zeros(3)),
            "layer 'x': `bias` must be 2-D, got 1-D of shape (3,).",
        ),
        (
            comq_np.Layer("x", np.stack([W] * 2), groups, np.zeros((3, 2))),
            "layer 'x': `bias` must have shape (2, 3), got (3, 2).",
        ),
        (
            comq_np.Layer("x", W, gram, np.full(3, 1e39)),
            "layer 'x': `bias` must fit in float32, got an entry of size 1e+39.",
        ),
        (comq_np.Layer("x", W, gram.matrix), "layer 'x': `gram` must be a comq_np.Gram or TokenCounts, got 'ndarray'."),
        (comq_np.Layer("x", W, gram, kind=3), "layer 'x': `kind` must be a string, got 3."),
        (
            comq_np.Layer("x", W, gram, kind="\0"),
            "layer 'x': `kind` must be text that UTF-8 can hold, without NUL, ...",
        ),
        (comq_np.Layer(3, W, gram), "`name` must be a string, got 3."),
        (comq_np.Layer("a\0b", W, gram), "`name` must be text that UTF-8 can hold, without NUL, got 'a\\x00b'."),
        (comq_np.Layer("\udc80", W, gram), "`name` must be text that UTF-8 can hold, without NUL, got '\\udc80'."),
        (("x", W, gram), "`layer` must be a comq_np.Layer, got 'tuple'."),
    ]
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for layer, message in cases:
            with pytest.raises(comq_np.InputError) as error:
                file.add(layer)
            assert str(error.value).startswith(message.removesuffix("..."))
        file.add(comq_np.Layer("x", W, gram))
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert list(file) == ["x"]


def test_refused_results(tmp_path):
    q = comq_np.solve([[1.0, 2.0]], [[1.0]])
    cases = [
        ("x", q.codes, "layer 'x': `q` must be a comq_np.QuantizedArray or PlaneArray, got 'ndarray'."),
        (b"x", q, "`name` must be a string, got b'x'."),
        ("x", dataclasses.replace(q, scale=q.scale[0]), "layer 'x': `scale` must have shape (1, 2), got (2,)."),
        (
            "x",
            dataclasses.replace(q, codes=q.codes[None]),
            "layer 'x': `scale` must have shape (1, 1, 2), got (1, 2).",
        ),
        (
            "x",
            dataclasses.replace(q, zero_point=np.array([[2**31, 0]])),
            "layer 'x': `zero_point` must fit in int32, got 0 to 2147483648.",
        ),
        (
            "x",
            dataclasses.replace(q, report=dataclasses.replace(q.report, objective=np.nan)),
            "layer 'x': `report` must hold text and finite numbers, got ...",
        ),
    ]
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        for name, value, message in cases:
            with pytest.raises(comq_np.InputError) as error:
                file.add(name, value)
            assert str(error.value).startswith(message.removesuffix("..."))
        file.add("x", q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        assert list(file) == ["x"]


def test_a_gram_that_changed_since_it_was_written(tmp_path):
    gram = comq_np.Gram(1)
    gram.update([[1.0], [2.0]])
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(comq_np.Layer("a", np.ones((1, 2)), gram))
        gram.update([[3.0]])
        with pytest.raises(comq_np.InputError) as error:
            file.add(comq_np.Layer("b", np.ones((1, 2)), gram))
    assert str(error.value) == (
        "layer 'b': `gram` changed since layer 'a' was added with it: it had seen 2 samples then and has 3 now."
    )


def test_a_name_only_once(tmp_path, layers):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(layers[0])
        with pytest.raises(comq_np.InputError) as error:
            file.add(layers[0])
    assert str(error.value) == "layer 'q': a file can hold only one layer of that name."


def test_one_dimensional_codes_are_no_layer(tmp_path):
    with (
        comq_np.QuantizedWriter(tmp_path / "q.h5") as file,
        pytest.raises(comq_np.InputError, match="layer 'x': `codes`"),
    ):
        file.add("x", comq_np.solve([1.0, 2.0], np.eye(2)))


# Refused on the way out.


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


@pytest.mark.parametrize("content", [b"", b"no HDF5", bytes(10_000)])
def test_no_hdf5(tmp_path, content):
    path = tmp_path / "x.h5"
    path.write_bytes(content)
    assert refused(comq_np.CalibrationFile, path).startswith("cannot be read as HDF5: ")


def test_truncated(calibration):
    calibration.write_bytes(calibration.read_bytes()[:-100])
    assert refused(comq_np.CalibrationFile, calibration).startswith("cannot be read as HDF5: ")


def test_another_format(calibration, quantized, tmp_path):
    expected = "must be a comq_np.quantized file, its `format` is 'comq_np.calibration'."
    assert refused(comq_np.QuantizedFile, calibration) == expected
    expected = "must be a comq_np.calibration file, its `format` is 'comq_np.quantized'."
    assert refused(comq_np.CalibrationFile, quantized) == expected
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 1
    expected = "must be a comq_np.quantized file, its `format` is None."
    assert refused(comq_np.QuantizedFile, tmp_path / "foreign.h5") == expected


def test_a_later_version(quantized):
    with editing(quantized) as file:
        file.attrs["version"] = 3
    expected = "must have `version` 1 to 2 of comq_np.quantized, has 3."
    assert refused(comq_np.QuantizedFile, quantized) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", ["a", "b"], "must be a comq_np.quantized file, its `format` is an array of shape (2,)."),
        ("version", [1, 1], "must have `version` 1 to 2 of comq_np.quantized, has an array of shape (2,)."),
        ("version", "1", "must have `version` 1 to 2 of comq_np.quantized, has '1'."),
    ],
)
def test_odd_attributes_of_the_root(quantized, name, value, message):
    with editing(quantized) as file:
        file.attrs[name] = value
    assert refused(comq_np.QuantizedFile, quantized) == message


@pytest.mark.parametrize("signature", [b"TREE", b"SNOD", b"HEAP", b"GCOL"])
@pytest.mark.parametrize("name", ["calibration", "quantized", "gram"])
def test_damaged_structures_of_hdf5(tmp_path, name, signature):
    content = (DATA / f"{name}-v1.h5").read_bytes()
    path, start, found = tmp_path / "x.h5", content.find(signature), 0
    while start >= 0:
        path.write_bytes(content[:start] + b"XXXX" + content[start + 4 :])
        with pytest.raises(comq_np.FileError) as error:
            read_all(name, path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        start, found = content.find(signature, start + 1), found + 1
    assert found


def read_all(name, path):
    if name == "gram":
        return comq_np.load_gram(path)
    with (comq_np.CalibrationFile if name == "calibration" else comq_np.QuantizedFile)(path) as file:
        return file.describe(), dict(file)


@pytest.mark.parametrize("failure", [OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError])
def test_failures_of_h5py_name_the_file(quantized, monkeypatch, failure):
    def fail(*_):
        raise failure("Unable to read:\n broken")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", fail)
    assert refused(comq_np.QuantizedFile, quantized) == "/layers/0/codes: cannot be read: Unable to read: broken."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("codes"), "/layers/0: must have a dataset 'codes'."),
        (drop("scale"), "/layers/0: must have a dataset 'scale'."),
        (drop("report"), "/layers/0: must have a text `report`."),
        (put("report", "{"), "/layers/0/report: Expecting property name"),
        (put("report", "{}"), "/layers/0/report: `values` must have the fields"),
        (put("report", 3), "/layers/0: must have a text `report`."),
        (put("report", "3"), "/layers/0/report: `values` must be a dict, got 'int'."),
        (put("report", "[" * 100_000), "/layers/0/report: maximum recursion depth exceeded"),
        (put("report", b"\xff"), "/layers/0/report: cannot be read: 'utf-8' codec"),
        (put("codes", np.zeros((5, 9), np.uint8)), "/layers/0/codes: must have shape ([any,] any, 10), has (5, 9)."),
        (put("codes", np.zeros((5, 10))), "/layers/0/codes: must hold uint8, holds float64."),
        (put("scale", np.ones((5, 3), np.float32)), "/layers/0/scale: must have shape (3, 5), has (5, 3)."),
        (put("scale", np.ones((3, 5))), "/layers/0/scale: must hold float32, holds float64."),
        (put("scale", np.zeros((3, 5), np.float32)), "/layers/0/scale: must be positive, holds 0."),
        (put("scale", np.full((3, 5), np.nan, np.float32)), "/layers/0/scale: must be finite."),
        (put("zero_point", np.zeros((3, 5))), "/layers/0/zero_point: must hold float32, holds float64."),
        (put("zero_point", np.full((3, 5), 2**31 - 1, np.int32)), "/layers/0/zero_point: must lie within"),
        (attribute("bits", 17), "/layers/0: cannot have 20 rows, 17 bits and 16 levels."),
        (attribute("rows", 0), "/layers/0: cannot have 0 rows, 4 bits and 16 levels."),
        (attribute("levels", 17), "/layers/0: cannot have 20 rows, 4 bits and 17 levels."),
        (attribute("levels", 2), "/layers/0/codes: must lie below 2, holds 15."),
        (attribute("group_size", 0), '/layers/0: must have "column", "tensor" or a positive `group_size`, has 0'),
        (attribute("group_size", "row"), "/layers/0: must have an attribute 'group_size' of type int, has 'row'."),
        (attribute("name", 3), "/layers/0: must have an attribute 'name' of type str, has 3."),
        (attribute("name", ["a", "b"]), "/layers/0: must have an attribute 'name' of type str, has an array of shape"),
        (attribute("name", b"\xff"), "/layers/0: its attribute 'name' cannot be read: 'utf-8' codec"),
    ],
)
def test_broken_quantized_layers(quantized, change, message):
    with editing(quantized) as file:
        change(file["layers/0"])
    assert refused(comq_np.QuantizedFile, quantized).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("weight"), "/layers/0: must have a dataset 'weight'."),
        (
            put("weight", np.zeros((6, 0), np.float32)),
            "/layers/0/weight: must have shape ([any,] any, any), has (6, 0).",
        ),
        (put("weight", np.zeros((2, 6, 5), np.float32)), "/layers/0/bias: must have shape (2, 5), has (5,)."),
        (put("weight", np.zeros((7, 5), np.float32)), "/layers/0: must name a Gram of width 7, as its weight has rows"),
        (put("bias", np.zeros(3, np.float32)), "/layers/0/bias: must have shape (5,), has (3,)."),
        (attribute("gram", 7), "/layers/0: must name one of 2 Grams, names number 7."),
        (attribute("gram", "0"), "/layers/0: must have an attribute 'gram' of type int, has '0'."),
    ],
)
def test_broken_calibration_layers(calibration, change, message):
    with editing(calibration) as file:
        change(file["layers/0"])
    assert refused(comq_np.CalibrationFile, calibration).startswith(message)


def test_broken_gram(calibration):
    with editing(calibration) as file:
        file["grams/0/fold1"].attrs["count"] = -1
    assert refused(comq_np.CalibrationFile, calibration).startswith("/grams/0: `count` must be an integer from 0")


def test_two_layers_of_one_name(calibration):
    with editing(calibration) as file:
        file["layers/1"].attrs["name"] = "q"
    assert refused(comq_np.CalibrationFile, calibration) == "/layers: must have a name of its own for each layer."


def test_a_missing_number(calibration):
    with editing(calibration) as file:
        file["layers"].move("1", "3")
    assert refused(comq_np.CalibrationFile, calibration) == "/layers: must have a group '1'."


def test_the_file_is_closed_after_a_refusal(calibration):
    with pytest.raises(comq_np.FileError):
        comq_np.QuantizedFile(calibration)
    os.remove(calibration)
    with h5py.File(calibration, "w") as file:
        assert file.id.valid


def test_stored_objective_is_that_of_the_stored_codes(problem, tmp_path):
    W, _, G = problem(20, 5)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", comq_np.solve(W, G, 3))
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        q = file["fc"]
    assert naive.objective(W, q.dequantize(), G).sum() == pytest.approx(q.report.objective, rel=1e-9)
