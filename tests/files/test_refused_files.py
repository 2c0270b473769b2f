"""What is refused on the way out of a file, naming file, place and reason."""

from __future__ import annotations

import os
import pathlib

import h5py
import numpy as np
import pytest
from edits import editing
from stored import attribute, drop, put, refused

import comq_np

DATA = pathlib.Path(__file__).parents[1] / "data"


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
