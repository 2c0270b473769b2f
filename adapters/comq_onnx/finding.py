"""Which nodes of a graph have weights, and which of these can be quantized."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

import onnx_ir as ir

from comq_onnx.layers import Bias, Convolution, Embedding, GraphLayer, Linear, TransposedConvolution, Use, Weight

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
CLASSES: dict[str, type[GraphLayer]] = {
    "MatMul": Linear,
    "Gemm": Linear,
    "Conv": Convolution,
    "ConvTranspose": TransposedConvolution,
    "Gather": Embedding,
}
#: Names of the domain of ONNX's own operators.
ONNX = ("", "ai.onnx")
#: Other operators with weights; so are those of domains that are not ONNX's own.
WEIGHTED = ("Einsum", "LSTM", "GRU", "RNN", "DeformConv")


class UnsupportedError(Exception):
    """Why a node with a weight stays as it is."""


def find(graph: ir.Graph) -> tuple[list[GraphLayer], dict[str, str]]:
    """Layers of the graph, in its order, and why other nodes with weights are none, by name."""
    found: dict[tuple[Weight, type[GraphLayer], int], list[Use]] = {}
    left: list[tuple[ir.Node, ir.Value, str]] = []
    for node in ir.traversal.RecursiveGraphIterator(graph):
        value = _constant_weight(node)
        if value is None:
            continue
        try:
            if node.graph is not graph:
                raise UnsupportedError("it is in a sub-graph")
            weight = _weight(node, value)
        except UnsupportedError as error:
            left.append((node, value, f"{node.op_type} node: {error}."))
        else:
            key = weight, CLASSES[node.op_type], node.attributes.get_int("group", 1)
            found.setdefault(key, []).append(Use(node, _bias(node, weight)))
    layers: dict[ir.Value, GraphLayer] = {}
    taken: set[str] = set()
    # Of nodes that use one initializer in different ways the first are the layer, but for those that only gather its
    # rows; the others get what becomes of it.
    for (weight, kind, _), uses in sorted(found.items(), key=lambda item: item[0][1] is Embedding):
        if weight.root not in layers:
            names = [_name(use.node, weight.root, use.bias, taken) for use in uses]
            layers[weight.root] = kind(_kind(kind, weight), weight, uses, names)
    skipped = {_name(node, value, None, taken): reason for node, value, reason in left}
    place = {node: number for number, node in enumerate(graph)}
    return sorted(layers.values(), key=lambda layer: place[layer.uses[0].node]), skipped


def _constant_weight(node: ir.Node) -> ir.Value | None:
    """Input of a node that is a constant matrix, kernel or table, where another one is not constant."""
    inputs, op = list(node.inputs), node.op_type
    if node.domain in ONNX:
        if op not in CLASSES and op not in WEIGHTED:
            return None
        inputs = inputs[:1] if op == "Gather" else inputs[1::-1] if op in CLASSES else inputs
    if all(value is None or is_constant(value) for value in node.inputs):
        return None
    return next((value for value in inputs if value is not None and _is_weight(value, op)), None)


def _is_weight(value: ir.Value, op: str) -> bool:
    tensor = value.const_value
    if tensor is not None:
        return len(tensor.shape) > 1 and tensor.dtype in (*FLOATS, ir.DataType.BFLOAT16)
    return op != "Gather" and is_constant(value)


def is_constant(value: ir.Value) -> bool:
    """Whether it is an initializer, or computed from some."""
    left: list[ir.Value | None] = [value]
    known: set[ir.Value] = set()
    while left:
        one = left.pop()
        producer = None if one is None else one.producer()
        if one is not None and (one.is_initializer() or one in known):
            continue
        if one is None or producer is None or not producer.inputs:
            return False
        known.add(one)
        left += producer.inputs
    return True


def _weight(node: ir.Node, value: ir.Value) -> Weight:
    """Weight of a node from its constant input; it must be of a kind that can be quantized."""
    attributes, op = node.attributes, node.op_type
    if node.domain not in ONNX or op in WEIGHTED:
        raise UnsupportedError("an operator that is not supported")
    if CLASSES[op] is Linear and value is not node.inputs[1]:
        raise UnsupportedError("its constant is on the left")
    transposed = bool(attributes.get_int("transB", 0))
    while (producer := value.producer()) is not None:
        if producer.op_type != "Transpose" or CLASSES[op] is not Linear or producer.inputs[0] is None:
            raise UnsupportedError(f"its weight is computed by {producer.op_type}")
        transposed, value = not transposed, producer.inputs[0]
    tensor = value.const_value
    assert tensor is not None  # as nothing that computes it is left
    if tensor.dtype not in FLOATS or tensor.size == 0 or value.is_graph_output():
        raise UnsupportedError(f"its weight is of type {tensor.dtype}, empty, or an output of the graph")
    convolves = CLASSES[op] not in (Linear, Embedding)
    if not (3 <= len(tensor.shape) <= 5 if convolves else len(tensor.shape) == 2):
        raise UnsupportedError(f"its weight has the shape {tuple(tensor.shape)}")
    if attributes.get_int("axis", 0) not in (0, -2):
        raise UnsupportedError("it gathers no rows")
    if attributes.get_int("transA", 0) or attributes.get_float("alpha", 1.0) == 0:
        raise UnsupportedError("it has transA, or an alpha of 0")
    own_size = "output_shape" in attributes or attributes.get_string("auto_pad", "NOTSET").startswith("SAME")
    if op == "ConvTranspose" and own_size:
        raise UnsupportedError("it has an output_shape, or an auto_pad of SAME")
    return Weight(value, transposed)


def _kind(kind: type[GraphLayer], weight: Weight) -> str:
    if issubclass(kind, Convolution):
        return f"conv{'_transpose' if kind is TransposedConvolution else ''}{weight.array.ndim - 2}d"
    return kind.__name__.lower()


def _bias(node: ir.Node, weight: Weight) -> Bias | None:
    """Constant vector that a node adds, or for a matrix the one after it."""
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    if node.op_type == "Gather":
        return None
    if CLASSES[node.op_type] is not Linear:
        return Bias(node, 2, 1.0) if _is_vector(node, 2, None) else None
    columns, product = weight.array.shape[1], node.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return Bias(node, 2, beta / alpha) if beta and _is_vector(node, 2, columns) else None
    for added, slot in product.uses():
        own = added.op_type == "Add" and added.domain in ONNX and added.graph is node.graph
        if own and len(product.uses()) == 1 and not product.is_graph_output() and _is_vector(added, 1 - slot, columns):
            return Bias(added, 1 - slot, 1 / alpha)
    return None


def _is_vector(node: ir.Node, slot: int, size: int | None) -> bool:
    """Whether an input is an initializer of so many numbers, if that is given, all along its last axis."""
    value = node.inputs[slot] if slot < len(node.inputs) else None
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    *_, last = (0, *value.const_value.shape)
    return value.const_value.size == last and size in (None, last)


def _name(node: ir.Node, weight: ir.Value, bias: Bias | None, taken: set[str]) -> str:
    """Name of a layer: that of its module, where the exporter has left it in the name of the weight or the bias."""
    found = next(name for name in _names(node, weight, bias) if name and name not in taken)
    taken.add(found)
    return found


def _names(node: ir.Node, weight: ir.Value, bias: Bias | None) -> Iterator[str | None]:
    for value, word in ((weight, "weight"), (bias and bias.value, "bias")):
        match = re.fullmatch(rf"(.+)[._]{word}", str(value and value.name))
        yield match and match[1]
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    yield scopes[-2] if len(scopes) > 1 else None
    yield node.name
    yield weight.name
    yield from (f"{weight.name}.{number}" for number in itertools.count(2))
