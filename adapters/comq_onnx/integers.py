"""Codes in a graph: integer initializers, and the nodes that make weights of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_np import ActivationGrid, ChannelGrid, QuantizedArray, pack_codes

Array = npt.NDArray[Any]
#: Types of codes by their bits, the smallest first.
TYPES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8, 16: ir.DataType.UINT16}


class Stored(NamedTuple):
    """Codes (..., m, n) as a type of ONNX holds them, with scale and zero point (..., groups, n) and rows of a group.

    Codes and zero point may both lie higher than as solved, by the same number: ONNX wants them of one type.
    """

    bits: int
    codes: Array
    scale: Array
    zero_point: Array
    group_size: int

    @property
    def dtype(self) -> ir.DataType:
        """Type of the codes."""
        return TYPES.get(self.bits, ir.DataType.INT32)

    @property
    def grouped(self) -> bool:
        """Whether a column has several scales."""
        return bool(self.scale.shape[-2] > 1)


def store(q: QuantizedArray) -> Stored:
    """Codes in the smallest type that holds them and the zero points.

    Where none does, they are numbers of 32 bits, the differences, and the zero points are 0.
    """
    rows = q.codes.shape[-2]
    size = min(q.group_size, rows) if isinstance(q.group_size, int) else rows
    zero_point = q.zero_point.astype(np.int64)
    low = np.minimum(zero_point, 0)
    span = int((np.maximum(zero_point, q.levels - 1) - low).max())
    bits = next((bits for bits in TYPES if span < 2**bits), 32)
    low = zero_point if bits == 32 else low
    codes = q.codes - np.take(low, np.arange(rows) // size, axis=-2)
    return Stored(bits, codes, q.scale, zero_point - low, size)


class Builder:
    """New nodes and initializers, which take the place of an initializer of this name."""

    def __init__(self, graph: ir.Graph, prefix: str, numbers: Iterator[int] | None = None) -> None:
        self._graph, self._prefix, self._tape = graph, prefix, ir.tape.Tape()
        self._numbers = numbers or itertools.count()

    def another(self) -> Builder:
        """Builder of nodes for another place."""
        return Builder(self._graph, self._prefix, self._numbers)

    def constant(self, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Initializer with these values; the same one for the same name."""
        name = f"{self._prefix}.{name}"
        if name not in self._graph.initializers:
            array = np.asarray(array if dtype is None else array.astype(dtype.numpy()), order="C")
            tensor = ir.tensor(array, dtype=dtype, name=name)
            self._graph.register_initializer(ir.Value(name=name, const_value=tensor))
        return self._graph.initializers[name]

    def integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """Initializer of such numbers as shapes and axes are made of."""
        return self.constant(name, np.array(numbers, np.int64))

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Output of a new node."""
        name = f"{self._prefix}.{next(self._numbers)}"
        return self._tape.op(kind, inputs, attributes, name=name, output=ir.Value(name=name))

    def dequantize(
        self, x: ir.Value, stored: Stored, dtype: ir.DataType, arrange: Callable[[Array], Array], **attributes: int
    ) -> ir.Value:
        """Weights in float32 of codes of this type; `arrange` puts scale and zero point as the attributes want them."""
        scale = self.constant("scale", arrange(stored.scale))
        if stored.scale.dtype == np.float16:  # which would make weights of float16
            scale = self.op("Cast", scale, to=ir.DataType.FLOAT)
        zero_point = self.constant(f"zero_point.{dtype.name.lower()}", arrange(stored.zero_point), dtype)
        return self.op("DequantizeLinear", x, scale, zero_point, **attributes)

    def quantize(
        self, x: ir.Value | None, grid: ActivationGrid | ChannelGrid, along: Callable[[Array], Array] = np.asarray
    ) -> ir.Value:
        """Inputs on a grid: those beyond it are clipped, since codes of fewer than 8 bits are in bytes, too.

        Scales of channels, which weights have absorbed, are put `along` these.
        """
        if isinstance(grid, ChannelGrid):
            return self._quantize_channels(x, grid, along)
        scale = self.constant("scale", np.array(grid.scale, np.float32))
        zero_point = self.constant("zero_point", np.array(grid.zero_point, np.uint8))
        if grid.bits < 8:
            least, most = grid.decode([0, 2**grid.bits - 1])
            x = self.op("Clip", x, self.constant("least", np.array(least)), self.constant("most", np.array(most)))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, zero_point), scale, zero_point)

    def _quantize_channels(self, x: ir.Value | None, grid: ChannelGrid, along: Callable[[Array], Array]) -> ir.Value:
        """Codes less zero points of inputs whose channels have scales of their own.

        What QuantizeLinear gets has the scale 1. With one zero point for all, this makes operands as integer kernels
        take them; else it makes codes, from which the zero points are subtracted behind.
        """
        x = self.op("Div", x, self.constant("channel_scale", along(grid.scale)))
        first = int(grid.zero_point[0])
        if (grid.zero_point == first).all():
            return self.quantize(x, ActivationGrid(1.0, first, grid.bits))
        points = self.constant("channel_zero_point", along(grid.zero_point.astype(np.float32)))
        codes = self.op("Add", self.op("Round", x), points)
        return self.op("Sub", self.quantize(codes, ActivationGrid(1.0, 0, grid.bits)), points)

    def insert(self, node: ir.Node) -> None:
        """Put the new nodes before this one."""
        self._graph.insert_before(node, self._tape.nodes)


def become(node: ir.Node, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> None:
    """Make another node of a node, which keeps its outputs and their names."""
    node.op_type, node.domain, node.version = kind, domain, None
    node.attributes.clear()
    node.attributes.update({attr.name: attr for attr in ir.convenience.convert_attributes(attributes)})
    node.resize_inputs(len(inputs))
    for number, value in enumerate(inputs):
        node.replace_input_with(number, value)


def block_of(stored: Stored) -> int | None:
    """Rows of the blocks of a MatMulNBits: the largest power of two up to 128 that divides a group, if 16 or more."""
    if stored.bits > 4:
        return None
    block = min(stored.group_size & -stored.group_size, 128)
    if not stored.grouped and block < 16:  # of a single group, the last block may have fewer rows
        return 32
    return block if block >= 16 else None


def nbits(build: Builder, stored: Stored, block: int) -> tuple[list[ir.Value], dict[str, int]]:
    """Packed codes, scales and zero points for a MatMulNBits with blocks of so many rows, and its attributes."""
    m, n = stored.codes.shape
    blocks = -(-m // block)
    group = np.arange(blocks) * block // stored.group_size
    padded = np.zeros((blocks * block, n), np.uint8)
    padded[:m] = stored.codes
    arrays = {
        "packed": pack_codes(padded, 4).reshape(n, blocks, block // 2),
        "scales": stored.scale[group].T.astype(np.float32).reshape(-1),
        "zero_points": pack_codes(stored.zero_point[group], 4).reshape(-1),
    }
    sizes = {"K": m, "N": n, "bits": 4, "block_size": block}
    return [build.constant(name, array) for name, array in arrays.items()], sizes
