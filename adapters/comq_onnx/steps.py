"""A graph cut in steps, each from the input of one layer to that of the next, with the weights that there are by then.

A run of onnxruntime cannot be stopped at a layer. So each step is a graph and a session of its own, which starts once
all layers of the steps before it have their new weights. What it computes and later steps need goes on to these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from comq_np import ActivationGrid, ChannelGrid, InputError, adapter
from comq_onnx.finding import is_constant
from comq_onnx.integers import Array
from comq_onnx.layers import GraphLayer

Session = Any
#: Makes a session of a model.
Start = Callable[[onnx.ModelProto], Session]


class Step(NamedTuple):
    """Nodes from one layer's input to the next one's, what goes in, and comes out; and the layers that get `target`."""

    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    target: ir.Value
    layers: list[GraphLayer]
    #: What later steps need, of all that there is after this one.
    kept: set[ir.Value]


class Steps:
    """The steps of a graph up to the last of some layers, for batches that go through them one after the other."""

    def __init__(self, model: ir.Model, found: Sequence[GraphLayer], wanted: Collection[str], start: Start) -> None:
        self._model, self._found, self._start = model, found, start
        self._steps = _cut(model.graph, [layer for layer in found if layer.name in wanted])
        self._latest: tuple[int, Session] = -1, None

    def run(self, feeds: dict[str, Array], observe: adapter.Observe) -> None:
        """Run one batch, and call `observe` with what each of the layers gets at the first node that has its weight."""
        values: dict[ir.Value, Any] = {value: feeds[str(value.name)] for value in self._model.graph.inputs}
        for number, step in enumerate(self._steps):
            values |= self._results(number, step, values)
            x = values[step.target]
            for value in values.keys() - step.kept:
                del values[value]
            for layer in step.layers:
                observe(layer, x, layer.uses[0].node)

    def _results(self, number: int, step: Step, values: dict[ir.Value, Any]) -> dict[ir.Value, Any]:
        """What a step computes."""
        if not step.outputs:
            return {}
        if self._latest[0] != number:
            self._latest = number, self._start(self._graph_of(step, values))
        feeds = {str(value.name): values[value] for value in step.inputs}
        found = self._latest[1].run([str(value.name) for value in step.outputs], feeds)
        for value, array in zip(step.outputs, found, strict=True):
            if not isinstance(array, np.ndarray):
                what = f"{value.name!r}, which is no tensor, leads to a layer"
                raise InputError(f"`sequential` must be False where {what}, got True.")
        return dict(zip(step.outputs, found, strict=True))

    def _graph_of(self, step: Step, values: dict[ir.Value, Any]) -> onnx.ModelProto:
        """Model of a step, in which layers that are quantized have their new weights, biases and grids of inputs."""
        nodes = {node: ir.serde.serialize_node(node) for node in step.nodes}
        constants = {value.name: value.const_value for node in nodes for value in _read(node) if value.is_initializer()}
        arrays: dict[str, Array] = {}
        before: dict[ir.Node, list[onnx.NodeProto]] = {}
        for layer in self._found:
            if layer.quantized is None:
                continue
            (q, shift), name = layer.quantized, str(layer.weight.root.name)
            if name in constants:
                arrays[name] = layer.initializer(q.dequantize())
            for use in layer.uses:
                if use.bias is not None and use.bias.node in nodes and shift is not None:
                    nodes[use.bias.node].input[use.bias.slot] = f"{name}.bias"
                    arrays[f"{name}.bias"] = use.bias.shifted(shift)
                if q.activation is not None and use.node in nodes:
                    before[use.node] = _on_grid(nodes[use.node], layer, q.activation, arrays)
        tensors = [
            ir.serde.serialize_tensor(tensor)
            for name, tensor in constants.items()
            if name not in arrays and tensor is not None
        ]
        tensors += [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
        inputs = [
            onnx.helper.make_tensor_value_info(str(value.name), _type(value, values[value]), None)
            for value in step.inputs
        ]
        outputs = [onnx.ValueInfoProto(name=value.name) for value in step.outputs]
        all_nodes = [each for node, made in nodes.items() for each in (*before.get(node, ()), made)]
        graph = onnx.helper.make_graph(all_nodes, "step", inputs, outputs, tensors)
        opsets = [onnx.helper.make_opsetid(*pair) for pair in self._model.graph.opset_imports.items()]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self._model.ir_version)


def _on_grid(
    node: onnx.NodeProto, layer: GraphLayer, grid: ActivationGrid | ChannelGrid, arrays: dict[str, Array]
) -> list[onnx.NodeProto]:
    """Nodes that put the input of a node on a grid, by operators that every opset has, and their constants."""
    name, x = f"{node.output[0]}.input", node.input[layer.input_index]
    scales, points = (np.array(number, np.float32) for number in (grid.scale, grid.zero_point))
    absorbed = isinstance(grid, ChannelGrid)
    if absorbed:
        scales, points = layer.along(scales), layer.along(points)
    constants = {"scale": scales, "least": -points, "most": np.float32(2**grid.bits - 1) - points}
    arrays.update({f"{name}.{key}": np.array(value, np.float32) for key, value in constants.items()})
    scale, *ends = (f"{name}.{key}" for key in constants)
    kinds: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Div", [scale], {}),
        ("Round", [], {}),
        *([("Max", ends[:1], {}), ("Min", ends[1:], {})] if absorbed else [("Clip", ends, {}), ("Mul", [scale], {})]),
    ]
    dtype = layer.weight.root.dtype or ir.DataType.FLOAT
    if dtype != ir.DataType.FLOAT:
        kinds = [("Cast", [], {"to": int(ir.DataType.FLOAT)}), *kinds, ("Cast", [], {"to": int(dtype)})]
    made = []
    for number, (kind, others, attributes) in enumerate(kinds):
        made.append(onnx.helper.make_node(kind, [x, *others], [f"{name}.{number}"], **attributes))
        x = f"{name}.{number}"
    node.input[layer.input_index] = x
    return made


def _type(value: ir.Value, array: Array) -> int:
    """Type as the graph says it of its own inputs, or that of the values."""
    if value.is_graph_input() and value.dtype is not None:
        return int(value.dtype)
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _cut(graph: ir.Graph, layers: Sequence[GraphLayer]) -> list[Step]:
    """Steps to the inputs of all layers, those that get the same one after the other in one."""
    place = {node: number for number, node in enumerate(graph)}
    targets: list[tuple[ir.Value, list[GraphLayer]]] = []
    for layer in layers:
        value = layer.input(layer.uses[0])
        if value is None:
            continue
        if targets and targets[-1][0] is value:
            targets[-1][1].append(layer)
        else:
            targets.append((value, [layer]))
    done: set[ir.Node] = set()
    parts = []
    for value, _ in targets:
        nodes = sorted(_unfinished(value, done), key=place.__getitem__)
        # What is computed from constants alone is computed again in each step, as these may have changed.
        done.update(node for node in nodes if not all(map(is_constant, node.outputs)))
        parts.append((nodes, {each for node in nodes for each in _variable(node)} - _made(nodes)))
    steps: list[Step] = []
    kept: set[ir.Value] = set()
    for (target, some), (nodes, inputs) in zip(reversed(targets), reversed(parts), strict=True):
        outputs = _made(nodes) & (kept | {target})
        steps.append(Step(nodes, _sorted(inputs), _sorted(outputs), target, some, kept))
        kept = (kept | inputs | {target}) - _made(nodes)
    return steps[::-1]


def _sorted(values: set[ir.Value]) -> list[ir.Value]:
    return sorted(values, key=lambda value: str(value.name))


def _unfinished(value: ir.Value, done: set[ir.Node]) -> set[ir.Node]:
    """Nodes that a value is computed by, but for those that are done."""
    found: set[ir.Node] = set()
    left = [value]
    while left:
        node = left.pop().producer()
        if node is not None and node not in done and node not in found:
            found.add(node)
            left += _read(node)
    return found


def _made(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    return {value for node in nodes for value in node.outputs if value.name}


def _variable(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, but for initializers."""
    return (value for value in _read(node) if not value.is_initializer())


def _read(node: ir.Node) -> list[ir.Value]:
    """Values of its own graph that a node reads, in its sub-graphs, too."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            graphs = attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else [attribute.as_graph()]
            for graph in graphs:
                inner = [one for below in ir.traversal.RecursiveGraphIterator(graph) for one in below.inputs]
                found += [one for one in (*inner, *graph.outputs) if one is not None and one.graph is node.graph]
    return found
