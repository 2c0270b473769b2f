"""Files: what goes in comes out, the documented layout, and what is refused, naming file, place and reason."""

from __future__ import annotations

import json
import os

import h5py
import naive
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


def assert_equal_grams(one, two):
    for a, b in zip(one.folds, two.folds, strict=True):
        np.testing.assert_array_equal(a.matrix, b.matrix)
        np.testing.assert_array_equal(a.sum, b.sum)
        assert a.count == b.count


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
@pytest.mark.parametrize("bits", range(1, 9))
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


def test_ternary_levels_survive(problem, tmp_path):
    W, _, G = problem(20, 5)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", comq_np.solve(W, G, levels=3, symmetric=True))
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        assert (file["fc"].levels, file["fc"].bits) == (3, 2)


def test_zero_points_far_outside_the_codes_survive(tmp_path):
    W = np.array([[1000.0, 0.0], [1001.0, 1.0], [1003.0, -1.0]])
    q = comq_np.solve(W, np.eye(3), 4)
    assert q.zero_point.min() < -1000
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        np.testing.assert_array_equal(file["fc"].zero_point, q.zero_point)


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
        "layer": "q", "kind": "conv2d", "rows": 6, "columns": 5, "bias": True, "gram": 0, "samples": samples
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


# The documented layout, read without comq_np.


def test_quantized_layout(quantized):
    with h5py.File(quantized) as file:
        assert (file.attrs["format"], file.attrs["version"]) == ("comq_np.quantized", 1)
        assert file.attrs["software"] == f"comq_np {comq_np.__version__}"
        layer = file["layers/0"]
        attributes = {name: layer.attrs[name] for name in ("name", "rows", "bits", "levels", "group_size")}
        packed, scale, zero_point = (layer[name][()] for name in ("codes", "scale", "zero_point"))
        report = json.loads(layer["report"].asstr()[()])
    assert attributes == {"name": "fc", "rows": 20, "bits": 4, "levels": 16, "group_size": 8}
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(5, 20)
    with comq_np.QuantizedFile(quantized) as file:
        q = file["fc"]
    group = np.arange(20) // 8
    np.testing.assert_allclose(scale[group] * (codes.T.astype(float) - zero_point[group]), q.dequantize(), rtol=1e-6)
    assert report == json.loads(json.dumps(q.report.to_dict()))


def test_calibration_layout(calibration, layers):
    with h5py.File(calibration) as file:
        assert (file.attrs["format"], file.attrs["version"]) == ("comq_np.calibration", 1)
        assert [file[f"layers/{k}"].attrs["name"] for k in range(3)] == ["q", "a/b.c", ""]
        np.testing.assert_array_equal(file["layers/1/weight"][()], layers[1].weight)
        np.testing.assert_array_equal(file["layers/1/bias"][()], layers[1].bias)
        total = file["grams/1/fold0/matrix"][()] + file["grams/1/fold1/matrix"][()]
        np.testing.assert_array_equal(total, layers[2].gram.matrix)
        assert file["grams/1/fold0"].attrs["count"] == 10


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


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(comq_np.FileError, match=r"missing/c\.h5: cannot be written: "):
        comq_np.CalibrationWriter(tmp_path / "missing" / "c.h5")


# Refused on the way in.


def test_refused_layers(tmp_path, problem):
    W, X, _ = problem(4, 3)
    gram = comq_np.Gram(4)
    gram.update(X)
    cases = [
        (comq_np.Layer("x", W[:, 0], gram), "layer 'x': `weight` must be 2-D, got 1-D of shape (4,)."),
        (comq_np.Layer("x", W + np.inf, gram), "layer 'x': `weight` must be finite, got 12 NaN or infinite of 12 ..."),
        (comq_np.Layer("x", W[:3], gram), "layer 'x': `gram` must be of width 3, as `weight` has rows, is of 4."),
        (comq_np.Layer("x", W, gram, np.zeros(4)), "layer 'x': `bias` must have shape (3,), got (4,)."),
    ]
    for layer, message in cases:
        with comq_np.CalibrationWriter(tmp_path / "c.h5") as file, pytest.raises(comq_np.InputError) as error:
            file.add(layer)
        assert str(error.value).startswith(message.removesuffix("..."))


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


def test_no_file(tmp_path):
    assert refused(comq_np.QuantizedFile, tmp_path / "none.h5") == "there is no such file."
    assert refused(comq_np.QuantizedFile, tmp_path) == "there is no such file."


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
    with h5py.File(quantized, "r+") as file:
        file.attrs["version"] = 2
    expected = "must have `version` 1 of comq_np.quantized, has 2."
    assert refused(comq_np.QuantizedFile, quantized).replace("np.int64(2)", "2") == expected


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("codes"), "/layers/0: must have a dataset 'codes'."),
        (drop("scale"), "/layers/0: must have a dataset 'scale'."),
        (drop("report"), "/layers/0: must have a text `report`."),
        (put("report", "{"), "/layers/0/report: Expecting property name"),
        (put("report", "{}"), "/layers/0/report: `values` must have the fields"),
        (put("report", 3), "/layers/0: must have a text `report`."),
        (put("codes", np.zeros((5, 9), np.uint8)), "/layers/0/codes: must have shape (any, 10), has (5, 9)."),
        (put("codes", np.zeros((5, 10))), "/layers/0/codes: must hold uint8, holds float64."),
        (put("scale", np.ones((5, 3), np.float32)), "/layers/0/scale: must have shape (3, 5), has (5, 3)."),
        (put("scale", np.ones((3, 5))), "/layers/0/scale: must hold float32, holds float64."),
        (put("scale", np.zeros((3, 5), np.float32)), "/layers/0/scale: must be positive, holds 0."),
        (put("scale", np.full((3, 5), np.nan, np.float32)), "/layers/0/scale: must be finite."),
        (put("zero_point", np.zeros((3, 5))), "/layers/0/zero_point: must hold int32, holds float64."),
        (put("zero_point", np.full((3, 5), 2**31 - 1, np.int32)), "/layers/0/zero_point: must lie within"),
        (attribute("bits", 9), "/layers/0: cannot have 20 rows, 9 bits and 16 levels."),
        (attribute("rows", 0), "/layers/0: cannot have 0 rows, 4 bits and 16 levels."),
        (attribute("levels", 17), "/layers/0: cannot have 20 rows, 4 bits and 17 levels."),
        (attribute("levels", 2), "/layers/0/codes: must lie below 2, holds 15."),
        (attribute("group_size", 0), '/layers/0: must have "column", "tensor" or a positive `group_size`, has 0'),
        (attribute("group_size", "row"), "/layers/0: must have an attribute 'group_size' of type int, has 'row'."),
        (attribute("name", 3), "/layers/0: must have an attribute 'name' of type str, has "),
    ],
)
def test_broken_quantized_layers(quantized, change, message):
    with h5py.File(quantized, "r+") as file:
        change(file["layers/0"])
    assert refused(comq_np.QuantizedFile, quantized).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("weight"), "/layers/0: must have a dataset 'weight'."),
        (put("weight", np.zeros((6, 0), np.float32)), "/layers/0/weight: must have shape (any, any), has (6, 0)."),
        (put("weight", np.zeros((7, 5), np.float32)), "/layers/0: must name a Gram of width 7, as its weight has rows"),
        (put("bias", np.zeros(3, np.float32)), "/layers/0/bias: must have shape (5,), has (3,)."),
        (attribute("gram", 7), "/layers/0: must name one of 2 Grams, names number 7."),
        (attribute("gram", "0"), "/layers/0: must have an attribute 'gram' of type int, has '0'."),
    ],
)
def test_broken_calibration_layers(calibration, change, message):
    with h5py.File(calibration, "r+") as file:
        change(file["layers/0"])
    assert refused(comq_np.CalibrationFile, calibration).startswith(message)


def test_broken_gram(calibration):
    with h5py.File(calibration, "r+") as file:
        file["grams/0/fold1"].attrs["count"] = -1
    assert refused(comq_np.CalibrationFile, calibration).startswith("/grams/0: `count` must be an integer from 0")


def test_two_layers_of_one_name(calibration):
    with h5py.File(calibration, "r+") as file:
        file["layers/1"].attrs["name"] = "q"
    assert refused(comq_np.CalibrationFile, calibration) == "/layers: must have a name of its own for each layer."


def test_a_missing_number(calibration):
    with h5py.File(calibration, "r+") as file:
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
