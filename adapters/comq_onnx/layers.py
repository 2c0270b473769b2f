"""What can be quantized in a graph: weights of nodes, the rows of their inputs, and codes in place of the weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

import comq_np
from comq_np import ActivationGrid, ChannelGrid, InputError, PlaneArray, QuantizedArray, adapter
from comq_onnx.integers import Array, Builder, Stored, become, block_of, nbits


class Weight(NamedTuple):
    """An initializer, or its transpose."""

    root: ir.Value
    transposed: bool

    @property
    def array(self) -> Array:
        """Values as a node gets them."""
        found = values_of(self.root)
        return found.T if self.transposed else found


class Bias(NamedTuple):
    """Input of a node that is a constant vector; times `factor` it is what the layer adds to its products."""

    node: ir.Node
    slot: int
    factor: float

    @property
    def value(self) -> ir.Value | None:
        """The constant."""
        return self.node.inputs[self.slot]

    def shifted(self, shift: Array) -> Array:
        """The constant with so much more of what the layer adds."""
        old = values_of(self.value)
        shifted: Array = old + (shift.reshape(old.shape) / self.factor).astype(old.dtype)
        return shifted


class Use(NamedTuple):
    """A node that uses a weight, and its bias."""

    node: ir.Node
    bias: Bias | None


def values_of(value: ir.Value | None) -> Array:
    """Values of an initializer."""
    if value is None or value.const_value is None:
        raise InputError(f"must have values in the file, {value and value.name!r} has none.")
    return value.const_value.numpy()


class GraphLayer(adapter.WeightLayer):
    """A weight, and the nodes that multiply their inputs by it."""

    quantizes_inputs = True
    #: Which inputs of a node are the weight and what is multiplied by it.
    weight_index, input_index = 1, 0

    def __init__(self, kind: str, weight: Weight, uses: list[Use], names: list[str]) -> None:
        self.kind, self.weight, self.uses, self.names = kind, weight, uses, names
        self.quantized: tuple[QuantizedArray, Array | None] | None = None
        biases = {use.bias and (use.bias.value, use.bias.factor) for use in uses}
        self.bias = uses[0].bias if len(biases) == 1 else None
        self.has_bias = self.bias is not None
        self.shape = self.matrix(weight.array).shape
        self.geometry = (kind, self.shape[:-1], *((self.input(use), self.cut(use.node)) for use in uses))

    def input(self, use: Use) -> ir.Value | None:
        """What the node multiplies by the weight."""
        return use.node.inputs[self.input_index]

    def matrix(self, array: Array) -> Array:
        """W (m, n) or (b, m, n) of the weight as a node gets it."""
        return array

    def cut(self, node: ir.Node) -> Hashable:  # noqa: ARG002
        """What decides about the rows beside the input."""
        return None

    def arrays(self) -> tuple[adapter.Weights, adapter.Weights | None]:
        """W and the bias in float32."""
        W = np.array(self.matrix(self.weight.array), np.float32, order="C")
        if self.bias is None:
            return W, None
        bias = values_of(self.bias.value).astype(np.float32) * np.float32(self.bias.factor)
        return W, bias.reshape(W.shape[:-2] + W.shape[-1:])

    def initializer(self, W: Array) -> Array:
        """Values of the initializer of which W is the matrix, in its type."""
        old = values_of(self.weight.root)
        places = np.arange(old.size).reshape(old.shape)
        new = np.empty(old.size, old.dtype)
        new[self.matrix(places.T if self.weight.transposed else places)] = W
        return new.reshape(old.shape)

    def rows(self, x: Array, *extra: Any) -> Iterator[Array]:  # noqa: ARG002
        """Vectors as they are."""
        yield x

    def check(self, q: QuantizedArray | PlaneArray) -> None:
        """Refuse what ONNX has no type for."""
        if isinstance(q, PlaneArray):
            raise InputError('must have uniform codes in an ONNX model, has those of `codebook="planes"`.')
        if q.zero_point.dtype.kind == "f":
            raise InputError("must have whole zero points in an ONNX model, has real ones.")

    def write(self, W: adapter.Weights, bias_shift: adapter.Weights | None, q: QuantizedArray | PlaneArray) -> None:  # noqa: ARG002
        """Keep the codes until it is known which opset they need."""
        assert isinstance(q, QuantizedArray), "as `check` says"
        self.quantized = q, bias_shift

    def put(self, graph: ir.Graph, stored: Stored, shift: Array | None, packed: bool) -> None:
        """Put codes in place of the weight and a new bias; `packed` means a MatMulNBits where there may be one."""
        root = self.weight.root
        build = Builder(graph, str(root.name))
        for use in self.uses:
            if use.bias is not None and shift is not None:
                new = build.constant("bias", use.bias.shifted(shift))
                use.bias.node.replace_input_with(use.bias.slot, new)
        value = self._cast(build, self._dequantized(build, stored))
        for use in self.uses:
            self._replace(build, use.node, value, stored, packed)
        # Whatever else uses the initializer gets the same weights. What nothing uses is removed at the end.
        root.replace_all_uses_with(build.op("Transpose", value, perm=[1, 0]) if self.weight.transposed else value)
        build.insert(graph[0])

    @property
    def channels(self) -> int | None:  # type: ignore[override]
        """Channels of an input, where nothing else uses the weight."""
        return None if {*_users(self.weight.root)} - {use.node for use in self.uses} else self.inputs

    @property
    def inputs(self) -> int | None:
        """Channels of an input."""
        return self.shape[-2]

    def along(self, array: Array) -> Array:
        """An array of the channels, along their axis of an input."""
        return array.reshape(-1, *[1] * (self.axes - 1))

    def put_grid(self, graph: ir.Graph, grid: ActivationGrid | ChannelGrid) -> None:
        """Put the codes of a grid before what the nodes multiply, which they get in the type that it has."""
        build = Builder(graph, f"{self.weight.root.name}.input")
        dtype = self.weight.root.dtype
        for use in self.uses:
            near, x = build.another(), self.input(use)
            if dtype != ir.DataType.FLOAT:
                x = near.op("Cast", x, to=ir.DataType.FLOAT)
            x = self._cast(near, near.quantize(x, grid, self.along))
            near.insert(use.node)
            use.node.replace_input_with(self.input_index, x)

    def _dequantized(self, build: Builder, stored: Stored) -> ir.Value:
        """Weight in float32, in the shape in which a node gets it."""
        raise NotImplementedError

    def _cast(self, build: Builder, value: ir.Value) -> ir.Value:
        """Float32 in the type of the initializer."""
        dtype = self.weight.root.dtype
        return value if dtype == ir.DataType.FLOAT else build.op("Cast", value, to=dtype)

    def _replace(self, build: Builder, node: ir.Node, value: ir.Value, stored: Stored, packed: bool) -> None:  # noqa: ARG002
        """Give a node its new weight."""
        node.replace_input_with(self.weight_index, value)


class Linear(GraphLayer):
    """MatMul or Gemm, whose weight is W itself here, also if it has transB."""

    def _dequantized(self, build: Builder, stored: Stored) -> ir.Value:
        # With a third axis, onnxruntime does not find the pair that it would turn into a MatMulNBits which rounds the
        # inputs to 8 bits, and which computes something else (1.32) if codes of 2 bits have a ragged last block.
        codes = build.constant("codes", stored.codes[None], stored.dtype)
        if stored.grouped:
            grid = {"axis": 1, "block_size": stored.group_size}
            value = build.dequantize(codes, stored, stored.dtype, lambda array: array[None], **grid)
        else:
            value = build.dequantize(codes, stored, stored.dtype, lambda array: array[0], axis=2)
        return build.op("Squeeze", value, build.integers("axis", [0]))

    def _replace(self, build: Builder, node: ir.Node, value: ir.Value, stored: Stored, packed: bool) -> None:
        attributes, block = node.attributes, block_of(stored)
        plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1
        added = node.inputs[2] if len(node.inputs) > 2 else None
        vector = added is None or (added.shape is not None and tuple(added.shape) == self.shape[-1:])
        if packed and block and plain and vector and self.weight.root.dtype == ir.DataType.FLOAT:
            arrays, sizes = nbits(build, stored, block)
            become(node, "MatMulNBits", [node.inputs[0], *arrays, None, added], "com.microsoft", **sizes)
        else:
            attributes.pop("transB", None)
            super()._replace(build, node, value, stored, packed)


class Convolution(GraphLayer):
    """Conv; `rows` gets the node beside the input."""

    def __init__(self, kind: str, weight: Weight, uses: list[Use], names: list[str]) -> None:
        self.groups = uses[0].node.attributes.get_int("group", 1)
        self.whole = weight.array.shape
        self.kernel = self.whole[2:]
        self.axes = 1 + len(self.kernel)
        super().__init__(kind, weight, uses, names)

    def matrix(self, array: Array) -> Array:
        """W, whose rows run over (input channel, positions)."""
        out = self.whole[0] // self.groups
        return _one(array.reshape(self.groups, out, -1).swapaxes(1, 2))

    @property
    def inputs(self) -> int | None:
        """Channels of an image."""
        return int(self.whole[1] * self.groups)

    def cut(self, node: ir.Node) -> Hashable:
        """Attributes of the node, and the kernel."""
        return (self.kernel, self.groups, *sorted(str(attr) for attr in node.attributes.values()))

    def rows(self, x: Array, *extra: Any) -> Iterator[Array]:
        """Patches."""
        sizes, pads = _sizes(extra[0], self.kernel), _pads(extra[0], self.kernel, x.shape[2:])
        return comq_np.patches(x, self.kernel, **sizes, padding=pads, groups=self.groups)

    def _dequantized(self, build: Builder, stored: Stored) -> ir.Value:
        flat = _rows_first(stored.codes)
        if not stored.grouped:
            codes = build.constant("codes", flat.reshape(self.whole), stored.dtype)
            return build.dequantize(codes, stored, stored.dtype, lambda array: _rows_first(array)[:, 0], axis=0)
        return build.op("Reshape", self._blocks(build, stored, flat), build.integers("shape", self.whole))

    def _blocks(self, build: Builder, stored: Stored, flat: Array) -> ir.Value:
        """Weights (output channels, rows) of codes in groups of rows."""
        codes = build.constant("codes", flat, stored.dtype)
        return build.dequantize(codes, stored, stored.dtype, _rows_first, axis=1, block_size=stored.group_size)


class TransposedConvolution(Convolution):
    """ConvTranspose: the convolution of images with zeros between the pixels, with the kernel turned round."""

    @property
    def inputs(self) -> int | None:
        """Channels of an image."""
        return int(self.whole[0])

    def matrix(self, array: Array) -> Array:
        """W, whose rows run over (input channel, positions from the last to the first)."""
        channels, out = self.whole[0] // self.groups, self.whole[1]
        parts = np.flip(array, tuple(range(2, array.ndim))).reshape(self.groups, channels, out, -1)
        return _one(parts.swapaxes(2, 3).reshape(self.groups, -1, out))

    def rows(self, x: Array, *extra: Any) -> Iterator[Array]:
        """Patches."""
        sizes, pads = _sizes(extra[0], self.kernel), _pads(extra[0], self.kernel, x.shape[2:])
        sizes["output_padding"] = _ints(extra[0], "output_padding", [0] * len(self.kernel))
        return comq_np.transposed_patches(x, self.kernel, **sizes, padding=pads, groups=self.groups)

    def _dequantized(self, build: Builder, stored: Stored) -> ir.Value:
        flat, space = _rows_first(stored.codes), tuple(range(3, 3 + len(self.kernel)))
        channels, out = self.whole[0] // self.groups, self.whole[1]
        parts = (self.groups, out, channels, *self.kernel)
        if stored.grouped:
            value = build.op("Reshape", self._blocks(build, stored, flat), build.integers("parts", parts))
            steps = [build.integers(name, [number] * len(space)) for name, number in (("last", -1), ("all", -(2**62)))]
            value = build.op("Slice", value, *steps, build.integers("space", space), steps[0])
        else:
            turned = np.flip(flat.reshape(parts), space).reshape(len(flat), -1)
            codes = build.constant("codes", turned, stored.dtype)
            value = build.dequantize(codes, stored, stored.dtype, lambda array: _rows_first(array)[:, 0], axis=0)
            value = build.op("Reshape", value, build.integers("parts", parts))
        value = build.op("Transpose", value, perm=[0, 2, 1, *space])
        return build.op("Reshape", value, build.integers("shape", self.whole))


class Embedding(GraphLayer):
    """Gather of rows of a table."""

    weight_index, input_index = 0, 1
    axes = 0
    quantizes_inputs = False
    inputs = None  # indices

    def rows(self, x: Array, *extra: Any) -> Iterator[Array]:  # noqa: ARG002
        """Indices, of which negative ones count from the end."""
        yield np.where(x < 0, x + self.shape[0], x)

    def _dequantized(self, build: Builder, stored: Stored) -> ir.Value:
        codes = build.constant("codes", stored.codes, stored.dtype)
        if stored.grouped:
            grid = {"axis": 0, "block_size": stored.group_size}
            return build.dequantize(codes, stored, stored.dtype, lambda array: array, **grid)
        return build.dequantize(codes, stored, stored.dtype, lambda array: array[0], axis=1)

    def _replace(self, build: Builder, node: ir.Node, value: ir.Value, stored: Stored, packed: bool) -> None:
        if stored.grouped:
            super()._replace(build, node, value, stored, packed)
            return
        # The codes are gathered, so that only what is asked for is dequantized.
        near = build.another()
        codes, dtype = _gathered(near, stored, node.inputs[self.input_index])
        found = self._cast(near, near.dequantize(codes, stored, dtype, lambda array: array[0], axis=-1))
        near.insert(node)
        become(node, "Identity", [found])


def _gathered(build: Builder, stored: Stored, indices: ir.Value | None) -> tuple[ir.Value, ir.DataType]:
    """Codes of some rows, and their type: onnxruntime gathers nothing smaller than bytes, so these hold several."""
    share, columns = 8 // min(stored.bits, 8), stored.codes.shape[1]
    dtype = stored.dtype if stored.bits >= 8 else ir.DataType.UINT8
    if share == 1 or columns % share:
        return build.op("Gather", build.constant(f"codes.{dtype.name.lower()}", stored.codes, dtype), indices), dtype
    shifts = np.arange(share, dtype=np.uint8) * np.uint8(stored.bits)
    parts = stored.codes.reshape(-1, share, columns // share) << shifts[:, None]
    held = build.op("Gather", build.constant("codes.bytes", parts.sum(1), dtype), indices)
    mask = build.constant("mask", np.array(2**stored.bits - 1, np.uint8))
    found = []
    for shift in shifts:
        part = build.op("BitShift", held, build.constant(f"shift.{shift}", np.array(shift)), direction="RIGHT")
        found.append(build.op("BitwiseAnd", part, mask))
    return build.op("Concat", *found, axis=-1), dtype


def _users(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that use a value, or its transpose."""
    for node, _ in value.uses():
        if node.op_type == "Transpose":
            yield from _users(node.outputs[0])
        else:
            yield node


def _one(matrices: Array) -> Array:
    """The only one of some matrices, or all."""
    return matrices[0] if len(matrices) == 1 else matrices


def _rows_first(array: Array) -> Array:
    """Arrays (m, n) or (b, m, n) with a row for each output channel, (b n, m)."""
    return array.swapaxes(-1, -2).reshape(-1, array.shape[-2])


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """Attribute of a node, or what it is without one."""
    return tuple(node.attributes.get_ints(name, default))


def _sizes(node: ir.Node, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Stride and dilation."""
    names = {"stride": "strides", "dilation": "dilations"}
    return {key: _ints(node, name, [1] * len(kernel)) for key, name in names.items()}


def _pads(node: ir.Node, kernel: tuple[int, ...], space: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pixels before and behind, for each axis of space."""
    mode, sizes = node.attributes.get_string("auto_pad", "NOTSET"), _sizes(node, kernel)
    if not mode.startswith("SAME"):
        pads = _ints(node, "pads", [0] * 2 * len(kernel))
        return [(0, 0) if mode == "VALID" else pair for pair in zip(pads, pads[len(kernel) :], strict=False)]
    wholes = [
        max((-(-size // stride) - 1) * stride + dilation * (points - 1) + 1 - size, 0)
        for size, points, stride, dilation in zip(space, kernel, sizes["stride"], sizes["dilation"], strict=True)
    ]
    pairs = [(whole // 2, whole - whole // 2) for whole in wholes]
    return pairs if mode == "SAME_UPPER" else [(behind, before) for before, behind in pairs]
