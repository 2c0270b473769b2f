"""What the tests of the ONNX adapter share: models of one node, files of codes for them, and what they must compute."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import comq_np

#: What initializers are called.
WORDS = (".codes", ".scale", ".zero_point")
#: Largest difference of outputs in float32, relative to the largest of them.
ROUNDING = 2e-6


def model_of(nodes, weights, x, axes=None, opset=21):
    """Model of nodes (op, inputs, output, attributes), with the input `x` and the output `y` of so many axes."""
    made = [
        helper.make_node(op, inputs, [output], name=f"node_{number}", **attributes)
        for number, (op, inputs, output, attributes) in enumerate(nodes)
    ]
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        made,
        "net",
        [helper.make_tensor_value_info("x", kind, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (axes or x.ndim))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    text = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(text, options).run(None, {"x": x})[0]


def initializers(model):
    return {one.name: ir.serde.deserialize_tensor(one).numpy() for one in model.graph.initializer}


@dataclasses.dataclass
class Case:
    """A node with a weight, as ONNX has it, and what it is to the solver."""

    op: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    attributes: dict = dataclasses.field(default_factory=dict)
    bias: bool = True

    @property
    def groups(self):
        return self.attributes.get("group", 1)

    def model(self, weight=None, bias=None, dtype=np.float32, **more):
        """Model of the node, and its input."""
        rng = np.random.default_rng([ord(self.op[-1]), *self.weight, *self.x])
        if self.op == "Gather":
            x = rng.integers(-self.weight[0], self.weight[0], self.x)
            inputs = ["fc.weight", "x"]
        else:
            x, inputs = rng.normal(0.5, 1, self.x).astype(dtype), ["x", "fc.weight"]
        W = rng.normal(0, 1, self.weight).astype(dtype)
        vector = rng.normal(0, 1, self.columns).astype(dtype)
        weights = {"fc.weight": W if weight is None else weight}
        nodes = [(self.op, inputs, "y", self.attributes)]
        if self.bias:
            weights["fc.bias"] = vector if bias is None else bias
            if self.op == "MatMul":
                nodes = [(self.op, inputs, "product", {}), ("Add", ["fc.bias", "product"], "y", {})]
            else:
                nodes[0] = (self.op, [*inputs, "fc.bias"], "y", self.attributes)
        return model_of(nodes, weights, x, x.ndim + (self.op == "Gather"), **more), x

    @property
    def columns(self):
        if self.op == "Conv":
            return self.weight[0]
        if self.op == "ConvTranspose":
            return self.weight[1] * self.groups
        return self.weight[0 if self.attributes.get("transB") else 1]

    def matrix(self, weight):
        """W of the weight, by loops."""
        b = self.groups
        if self.op in ("MatMul", "Gather"):
            return weight
        if self.op == "Gemm":
            return weight.T if self.attributes.get("transB") else weight
        channels_first = weight if self.op == "Conv" else np.concatenate([*np.split(weight, b)], axis=1).swapaxes(0, 1)
        found = []
        for part in np.split(channels_first, b):
            columns = []
            for kernel in part:
                turned = (
                    kernel if self.op == "Conv" else kernel[(slice(None), *[slice(None, None, -1)] * (kernel.ndim - 1))]
                )
                columns.append(turned.ravel())
            found.append(np.stack(columns, axis=1))
        return found[0] if b == 1 else np.stack(found)

    def weight_of(self, W):
        """The weight of W: each entry is put where it came from."""
        place = self.matrix(np.arange(math.prod(self.weight)).reshape(self.weight))
        weight = np.empty(math.prod(self.weight), W.dtype)
        weight[place.ravel()] = W.ravel()
        return weight.reshape(self.weight)


CASES = {
    "matmul": Case("MatMul", (6, 5), (4, 3, 6)),
    "matmul-none": Case("MatMul", (6, 5), (7, 6), bias=False),
    "gemm": Case("Gemm", (6, 5), (7, 6)),
    "gemm-scaled": Case("Gemm", (5, 6), (7, 6), {"transB": 1, "alpha": 0.5, "beta": 3.0}),
    "gemm-none": Case("Gemm", (5, 6), (7, 6), {"transB": 1}, bias=False),
    "conv1": Case("Conv", (4, 3, 3), (2, 3, 9), {"pads": [2, 1], "strides": [2]}),
    "conv1-depthwise": Case("Conv", (6, 1, 3), (2, 6, 9), {"group": 6, "dilations": [2]}),
    "conv2": Case("Conv", (4, 3, 3, 2), (2, 3, 7, 8), {"pads": [0, 1, 2, 1], "dilations": [2, 1]}),
    "conv2-groups": Case("Conv", (6, 2, 2, 3), (2, 6, 7, 8), {"group": 3, "strides": [2, 1]}),
    "conv2-upper": Case("Conv", (4, 3, 3, 2), (2, 3, 8, 7), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv2-lower": Case("Conv", (4, 3, 4, 2), (2, 3, 8, 7), {"auto_pad": "SAME_LOWER", "strides": [3, 1]}),
    "conv2-valid": Case("Conv", (4, 3, 3, 2), (2, 3, 8, 7), {"auto_pad": "VALID"}, bias=False),
    "conv3": Case("Conv", (4, 2, 2, 1, 3), (2, 4, 4, 3, 5), {"group": 2, "pads": [1, 0, 0, 0, 0, 1]}),
    "transposed1": Case("ConvTranspose", (3, 4, 3), (2, 3, 6), {"strides": [2], "pads": [1, 0]}),
    "transposed2": Case(
        "ConvTranspose", (4, 3, 3, 2), (2, 4, 5, 4), {"group": 2, "strides": [2, 1], "output_padding": [1, 0]}
    ),
    "transposed2-dilated": Case(
        "ConvTranspose", (3, 4, 2, 3), (2, 3, 5, 4), {"dilations": [2, 3], "pads": [1, 0, 0, 2]}, bias=False
    ),
    "transposed3": Case("ConvTranspose", (2, 3, 2, 1, 2), (2, 2, 3, 3, 2), {"strides": [2, 1, 2]}),
    "gather": Case("Gather", (9, 6), (4, 7), bias=False),
    "gather-odd": Case("Gather", (9, 7), (4, 7), bias=False),
}
FORMS = ("qdq", "matmulnbits")


def solved(case, path, bits, seed=0, **options):
    """A quantized file of the case's weight, with any Gram, and what is in it."""
    W = case.matrix(initializers(case.model()[0])["fc.weight"]).astype(np.float32)
    rng = np.random.default_rng(seed)
    X = rng.normal(0.3, 1, (*W.shape[:-2], 40, W.shape[-2]))
    G = X.swapaxes(-1, -2) @ X
    q = comq_np.solve(W, G, bits, **options)
    with comq_np.QuantizedWriter(path) as file:
        file.add("fc", q)
    return q


def expected(case, q, shift=None):
    """Output of the model with the weights that the codes stand for."""
    model, x = case.model()
    bias = initializers(model).get("fc.bias")
    if shift is not None:
        bias = bias + shift.ravel() * (case.attributes.get("alpha", 1) / case.attributes.get("beta", 1))
    model, x = case.model(weight=case.weight_of(q.dequantize()), bias=bias)
    return run(model, x)


def assert_same(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())
