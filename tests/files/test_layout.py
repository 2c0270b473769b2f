"""The documented layout, read without comq_np."""

from __future__ import annotations

import json

import h5py
import numpy as np

import comq_np


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
