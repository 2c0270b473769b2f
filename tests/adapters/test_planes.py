"""Bit planes in models: dense weights are written, what needs uniform codes refuses them."""

from __future__ import annotations

import numpy as np
import pytest
from requirements import require

import comq_np

require("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

import comq_torch  # noqa: E402


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))


@pytest.fixture
def batches():
    return list(torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1)))


def test_dense_weights_are_those_of_the_file(model, batches, tmp_path):
    calibration, quantized = tmp_path / "calibration.h5", tmp_path / "quantized.h5"
    comq_torch.capture(model, batches, calibration)
    comq_np.quantize_file(calibration, quantized, 2, codebook="planes")
    comq_torch.apply(model, quantized)
    with comq_np.QuantizedFile(quantized) as file:
        for name, q in file.items():
            np.testing.assert_array_equal(model.get_submodule(name).weight.detach().numpy().T, q.dequantize())
            assert len(np.unique(q.dequantize()[:, 0])) <= 4


@pytest.mark.parametrize("sequential", [False, True])
def test_quantize_takes_planes(model, batches, sequential):
    exact = torch.stack([model(batch) for batch in batches])
    comq_torch.quantize(model, batches, 3, codebook="planes", sequential=sequential)
    error = (torch.stack([model(batch) for batch in batches]) - exact).norm() / exact.norm()
    assert 0 < error < 0.3


def test_packed_modules_need_uniform_codes(model, batches, tmp_path):
    calibration, quantized = tmp_path / "calibration.h5", tmp_path / "quantized.h5"
    comq_torch.capture(model, batches, calibration)
    comq_np.quantize_file(calibration, quantized, 2, codebook="planes")
    before = model[0].weight.detach().clone()
    with pytest.raises(comq_np.InputError, match=r"^layer '0': must have uniform codes to be packed"):
        comq_torch.apply(model, quantized, packed=True)
    assert torch.equal(model[0].weight, before)


def test_onnx_models_need_uniform_codes(tmp_path):
    require("onnx")
    import onnx

    import comq_onnx

    helper, rng = onnx.helper, np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.normal(size=(6, 3)).astype(np.float32), "W")
    x, y = (helper.make_tensor_value_info(*named) for named in (("x", 1, ["n", 6]), ("y", 1, ["n", 3])))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"], "fc")], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    calibration, quantized = tmp_path / "calibration.h5", tmp_path / "quantized.h5"
    comq_onnx.capture(model, [rng.normal(size=(20, 6)).astype(np.float32)], calibration)
    comq_np.quantize_file(calibration, quantized, 2, codebook="planes")
    with pytest.raises(comq_np.InputError, match="must have uniform codes in an ONNX model"):
        comq_onnx.apply(model, quantized)
