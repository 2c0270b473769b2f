"""What goes in comes out."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import h5py
import naive
import numpy as np
import pytest
from edits import editing
from stored import assert_equal_grams, assert_holds, attribute, put, refused

import comq_np
from comq_np import hdf5, packing


def test_calibration_round_trip(layers, calibration):
    assert_holds(calibration, layers)


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


def test_stored_objective_is_that_of_the_stored_codes(problem, tmp_path):
    W, _, G = problem(20, 5)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", comq_np.solve(W, G, 3))
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        q = file["fc"]
    assert naive.objective(W, q.dequantize(), G).sum() == pytest.approx(q.report.objective, rel=1e-9)
