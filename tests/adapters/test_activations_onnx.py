"""Inputs of ONNX nodes on their grids: what onnxruntime computes is what the simulated model does."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from requirements import require

import comq_np

require("onnx")
require("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

import comq_onnx  # noqa: E402
import comq_torch  # noqa: E402

ROUNDING = 2e-6


def model_of(nodes, weights, x, axes):
    """Model of nodes (op, inputs, output, attributes), with the input `x` and the output `y` of so many axes."""
    made = [helper.make_node(op, inputs, [output], **attributes) for op, inputs, output, attributes in nodes]
    types = helper.np_dtype_to_tensor_dtype(x.dtype), TensorProto.FLOAT
    given, got = (
        helper.make_tensor_value_info(name, kind, [None] * size)
        for name, kind, size in zip("xy", types, (x.ndim, axes), strict=True)
    )
    arrays = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(made, "net", [given], [got], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


def without_grids(path, to):
    """The same file, with float inputs."""
    with comq_np.QuantizedFile(path) as file, comq_np.QuantizedWriter(to) as new:
        for name, q in file.items():
            new.add(name, dataclasses.replace(q, activation=None))


CASES = {
    "matmul": ("MatMul", (6, 5), (4, 3, 6), {}),
    "gemm": ("Gemm", (5, 6), (70, 6), {"transB": 1, "alpha": 0.5, "beta": 3.0}),
    "conv": ("Conv", (4, 3, 3, 2), (2, 3, 8, 7), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "groups": ("Conv", (6, 2, 3), (2, 6, 9), {"group": 3, "pads": [2, 1]}),
    "transposed": ("ConvTranspose", (6, 2, 3), (2, 6, 9), {"group": 3, "strides": [2], "output_padding": [1]}),
}


@pytest.mark.parametrize("activation_bits", [3, 8])
@pytest.mark.parametrize("name", CASES)
def test_nodes_get_their_inputs_on_the_grid(name, activation_bits, tmp_path):
    op, shape, size, attributes = CASES[name]
    rng = np.random.default_rng(len(name))
    x, W = rng.normal(0.5, 1, size).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    model = model_of([(op, ["x", "fc.weight"], "y", attributes)], {"fc.weight": W}, x, len(size))
    comq_onnx.capture(model, [x], tmp_path / "calibration.h5", activation_bits=activation_bits)
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", 8, recipe="fast")
    without_grids(tmp_path / "quantized.h5", tmp_path / "float.h5")
    made, plain = (comq_onnx.apply(model, tmp_path / f"{one}.h5") for one in ("quantized", "float"))
    onnx.checker.check_model(made)
    with comq_np.QuantizedFile(tmp_path / "quantized.h5") as file:
        (grid,) = [q.activation for q in file.values()]
    assert grid.bits == activation_bits
    expected = run(plain, grid.quantize(x))
    np.testing.assert_allclose(run(made, x), expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    assert np.abs(run(plain, x) - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(("activation_bits", "symmetric"), [(3, False), (8, True)])
@pytest.mark.parametrize("name", CASES)
def test_nodes_get_codes_of_channels(name, activation_bits, symmetric, tmp_path):
    """What they multiply is the code less the zero point of its channel, by weights that have absorbed the scales."""
    op, shape, size, attributes = CASES[name]
    rng, axis = np.random.default_rng(len(name)), -1 if len(shape) == 2 else 1
    ranges = np.geomspace(0.1, 30, size[axis]).reshape(-1, *[1] * (len(size) - 2 if axis == 1 else 0))
    x, W = (rng.normal(0.5, 1, size) * ranges).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    model = model_of([(op, ["x", "fc.weight"], "y", attributes)], {"fc.weight": W}, x, len(size))
    options = {"axis": "channel", "symmetric": symmetric}
    comq_onnx.capture(
        model, [x], tmp_path / "calibration.h5", activation_bits=activation_bits, activation_options=options
    )
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", 8, recipe="fast")
    without_grids(tmp_path / "quantized.h5", tmp_path / "float.h5")
    made, plain = (comq_onnx.apply(model, tmp_path / f"{one}.h5") for one in ("quantized", "float"))
    onnx.checker.check_model(made)
    with comq_np.QuantizedFile(tmp_path / "quantized.h5") as file:
        (grid,) = [q.activation for q in file.values()]
    assert (grid.channels, grid.bits) == (size[axis], activation_bits)
    expected = run(plain, grid.steps(x, axis=axis))
    np.testing.assert_allclose(run(made, x), expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    exact = run(model, x)
    assert np.square(run(made, x) - exact).sum() < (0.2 if activation_bits == 3 else 1e-3) * np.square(exact).sum()


def test_a_weight_that_is_gathered_too_keeps_one_scale(tmp_path):
    rng = np.random.default_rng(0)
    x, W = rng.integers(0, 9, (30,)), rng.normal(size=(9, 6)).astype(np.float32)
    nodes = [
        ("Gather", ["fc.weight", "x"], "a", {}),
        ("MatMul", ["a", "fc2.weight"], "b", {}),
        ("Transpose", ["fc.weight"], "t", {"perm": [1, 0]}),
        ("MatMul", ["b", "t"], "y", {}),
    ]
    model = model_of(nodes, {"fc.weight": W, "fc2.weight": rng.normal(size=(6, 6)).astype(np.float32)}, x, 2)
    options = {"activation_bits": 8, "activation_options": {"axis": "channel"}}
    comq_onnx.capture(model, [x], tmp_path / "c.h5", **options)
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        grids = {name: type(layer.gram.grid) for name, layer in file.items()}
    assert grids == {"fc": comq_np.ActivationGrid, "fc2": comq_np.ChannelGrid}


class Net(nn.Module):
    """Convolutions behind each other, one of groups, one transposed, and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=3, padding=1)
        self.transposed, self.fc, self.head = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Linear(4, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.transposed(torch.relu(self.grouped(torch.relu(self.conv(x))))))
        return self.head(nn.functional.gelu(self.fc(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    net = Net().eval()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    weights = {name: value.detach().numpy() for name, value in net.named_parameters()}
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "grouped.weight", "grouped.bias"], ["c"], pads=[1, 1, 1, 1], group=3),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("ConvTranspose", ["d", "transposed.weight", "transposed.bias"], ["e"], strides=[2, 2]),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("ReduceMean", ["f", "axes"], ["g"], keepdims=0),
        helper.make_node("Gemm", ["g", "fc.weight", "fc.bias"], ["h"], transB=1),
        helper.make_node("Gelu", ["h"], ["i"]),
        helper.make_node("Gemm", ["i", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    values = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    values.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    kinds = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * axes) for name, axes in (("x", 4), ("y", 2))
    ]
    graph = helper.make_graph(nodes, "net", kinds[:1], kinds[1:], values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return net, path, [torch.randn(8, 1, 9, 10) for _ in range(4)]


@pytest.mark.parametrize(("bits", "activation_bits"), [(8, 8), (4, 8), (4, 4), (2, 2)])
@pytest.mark.parametrize(("form", "axis"), [("qdq", "tensor"), ("qdq", "channel"), ("matmulnbits", "tensor")])
def test_a_file_of_pytorch_gives_the_same_outputs(exported, tmp_path, bits, activation_bits, form, axis):
    """Whatever onnxruntime fuses: but for inputs at the border of two codes, which may fall on either side."""
    net, path, batches = exported
    options = {"activation_bits": activation_bits, "activation_options": {"axis": axis}}
    comq_torch.capture(net, batches, tmp_path / "calibration.h5", **options)
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", bits, recipe="fast")
    made = comq_onnx.apply(path, tmp_path / "quantized.h5", format=form)
    assert sum(node.op_type == "QuantizeLinear" for node in made.graph.node) == 5
    simulated = comq_torch.apply(copy.deepcopy(net), tmp_path / "quantized.h5")
    x = torch.randn(50, 1, 9, 10)
    with torch.no_grad():
        expected, exact = simulated(x).numpy(), net(x).numpy()
    difference = np.abs(run(made, x.numpy()) - expected) / np.abs(expected).max()
    assert np.median(difference) < 5e-6
    assert (difference > 1e-5).mean() < 0.2
    assert difference.max() < max(0.002, 0.1 * np.abs(expected - exact).max() / np.abs(expected).max())


def test_quantize_in_one_call(exported, tmp_path):
    _, path, batches = exported
    inputs = [batch.numpy() for batch in batches]
    reports = comq_onnx.quantize(path, inputs, 8, output=tmp_path / "new.onnx", activation_bits=8)
    assert len(reports) == 5
    exact, found = (run(onnx.load(one), inputs[0]) for one in (path, tmp_path / "new.onnx"))
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("axis", ["tensor", "channel"])
@pytest.mark.parametrize("activation_bits", [3, 8])
def test_in_sequence_it_is_what_pytorch_does(exported, tmp_path, activation_bits, axis):
    """Each layer is calibrated on what those before it give, whose inputs are on their grids by then."""
    net, path, batches = exported
    inputs = [batch.numpy() for batch in batches]
    options = {"sequential": True, "activation_bits": activation_bits, "recipe": "fast"}
    options["activation_options"] = {"axis": axis}
    reports = comq_onnx.quantize(path, inputs, 8, output=tmp_path / "new.onnx", **options)
    changed = copy.deepcopy(net)
    assert set(comq_torch.quantize(changed, batches, 8, **options)) == set(reports)
    made = onnx.load(tmp_path / "new.onnx")
    word = "scale" if axis == "tensor" else "channel_scale"
    scales = {one.name: numpy_helper.to_array(one) for one in made.graph.initializer if f".input.{word}" in one.name}
    for name in reports:
        expected = getattr(changed, name).input_quantizer.scale.numpy()
        # Few bits of a channel with few values have several grids that are as good.
        rtol = 1e-3 if axis == "tensor" else 0.1 if activation_bits == 8 else 10
        np.testing.assert_allclose(scales[f"{name}.weight.input.{word}"], expected, rtol=rtol)
    with torch.no_grad():
        exact = net(batches[0]).numpy()
        error = np.square(changed(batches[0]).numpy() - exact).sum()
    assert np.square(run(made, inputs[0]) - exact).sum() < 1.3 * error + 1e-9


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_inputs_of_other_types(dtype, tmp_path):
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(30, 6)).astype(dtype), rng.normal(size=(6, 5)).astype(dtype)
    nodes = [("MatMul", ["x", "fc.weight"], "p", {}), ("Cast", ["p"], "y", {"to": TensorProto.FLOAT})]
    model = model_of(nodes, {"fc.weight": W}, x, 2)
    comq_onnx.quantize(model, [x], 8, output=tmp_path / "new.onnx", activation_bits=8)
    found, exact = run(onnx.load(tmp_path / "new.onnx"), x), run(model, x)
    assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()
