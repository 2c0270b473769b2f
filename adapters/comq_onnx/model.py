"""An ONNX model: read, run, and written with codes for weights."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common

from comq_np import InputError, adapter
from comq_onnx.finding import find
from comq_onnx.integers import Array, store
from comq_onnx.steps import Steps

Source = str | os.PathLike[str] | bytes | onnx.ModelProto
#: What makes nodes and constants of a graph easier to follow, and changes nothing else.
SIMPLER = (
    common.InlinePass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.RemoveInitializersFromInputsPass(),
    common.IdentityEliminationPass(),
)
#: Version of the format of ONNX files that has the types of an opset.
IR_VERSIONS = {21: 10, 25: 13}
#: Bytes of initializers from which on they have a file of their own: a protobuf takes less than 2 GiB.
OWN_FILE = 2**30 + 2**29


class GraphModel(adapter.Model):
    """The graph of an ONNX model and a session that runs it.

    All layers that get the same value share a Gram, so only the inputs of those that are wanted become outputs.
    """

    needs = "a MatMul, Gemm, Conv, ConvTranspose or Gather node with a constant float weight"
    shared_by_geometry = True

    def __init__(self, source: Source, providers: Sequence[str] | None = None) -> None:
        proto, self._folder = _read(source)
        self._model = _graph_of(proto, self._folder)
        self._providers = providers
        self._wanted: Collection[str] = ()
        self._session: onnxruntime.InferenceSession | None = None
        self._steps: tuple[Collection[str], Steps] | None = None
        found, self.skipped = find(self._model.graph)
        self.found, self.layers = found, [*found]

    def digest(self) -> str:
        """SHA-256 of the nodes and all initializers."""
        digest = hashlib.sha256()
        for node in self._model.graph.all_nodes():
            digest.update(f"{node}\n".encode())
        for name, value in self._model.graph.initializers.items():
            if value.const_value is not None:
                digest.update(f"{name} {value.const_value.dtype} {value.const_value.shape}\n".encode())
                digest.update(value.const_value.tobytes())
        return digest.hexdigest()

    def run(self, batch: Any, observe: adapter.Observe, wanted: Collection[str]) -> None:
        """Run the model on one batch."""
        seen = [(layer, use) for layer in self.found if layer.name in wanted for use in layer.uses]
        values = {str(value.name) for layer, use in seen if (value := layer.input(use)) is not None}
        if self._session is None or not set(wanted) <= set(self._wanted):
            self._session, self._wanted = self._start(values), set(wanted)
        feeds = _feeds(batch, [one.name for one in self._session.get_inputs()])
        outputs = sorted(values - feeds.keys())
        got = dict(zip(outputs, self._session.run(outputs, feeds) if outputs else [], strict=True))
        for layer, use in seen:
            value = layer.input(use)
            if value is not None:
                observe(layer, {**feeds, **got}[str(value.name)], use.node)

    def run_in_steps(self, batch: Any, observe: adapter.Observe, wanted: Collection[str]) -> None:
        """Run the model on one batch, up to each layer with the weights that those before it have by then."""
        if self._steps is None or self._steps[0] != wanted:
            self._steps = wanted, Steps(self._model, self.found, wanted, self._session_of)
        self._steps[1].run(_feeds(batch, [str(value.name) for value in self._model.graph.inputs]), observe)

    def copy(self) -> GraphModel:
        """Return the same model, with layers of its own that keep their weights."""
        made = copy.copy(self)
        found, _ = find(self._model.graph)
        made.found, made.layers, made._session, made._steps = found, [*found], None, None
        return made

    def leaf(self, value: Any) -> Iterable[Any]:
        """Bytes of what NumPy makes an array of."""
        array = np.asarray(value)
        return () if array.dtype == object else (f"{array.dtype} {array.shape} ".encode(), array.tobytes())

    def quantized(self, output: str | os.PathLike[str] | None, packed: bool) -> onnx.ModelProto:
        """The model with the codes that its layers have got, in the file `output`, too, if there is one."""
        written = {layer.name: (store(one[0]), one[1]) for layer in self.found if (one := layer.quantized)}
        opset = 25 if any(stored.bits == 2 for stored, _ in written.values()) else 21
        model, layers = self._model, self.found
        if (model.graph.opset_imports.get("") or 0) < opset:
            model = _graph_of(_convert(ir.to_proto(model), opset), self._folder)
            layers = find(model.graph)[0]
        model.ir_version = max(model.ir_version, IR_VERSIONS[opset])
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        grids = {layer.name: layer.quantized and layer.quantized[0].activation for layer in self.found}
        for layer in layers:
            if layer.name in written:
                layer.put(model.graph, *written[layer.name], packed)
                grid = grids[layer.name]
                if grid is not None:
                    layer.put_grid(model.graph, grid)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        return _save(model, output)

    def _start(self, values: set[str]) -> onnxruntime.InferenceSession:
        """Session of the model with more outputs."""
        graph = self._model.graph
        outputs = list(graph.outputs)
        have = {value.name for value in (*outputs, *graph.inputs)}
        new = {str(value.name): value for layer in self.found for use in layer.uses if (value := layer.input(use))}
        graph.outputs.extend(new[name] for name in sorted(values - have))
        try:
            return self._session_of(ir.to_proto(self._model))
        finally:
            graph.outputs[:] = outputs

    def _session_of(self, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
        """Session of a model whose data may be in the files of this one."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self._folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", self._folder)
        providers = self._providers or ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def _read(source: Source) -> tuple[onnx.ModelProto, str | None]:
    """Model without the data that are in other files, and the folder of these."""
    if isinstance(source, onnx.ModelProto):
        return source, None
    try:
        if isinstance(source, bytes):
            return onnx.load_from_string(source), None
        if isinstance(source, str | os.PathLike):
            return onnx.load(source, load_external_data=False), os.path.dirname(os.path.abspath(source))
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"`model` must be an ONNX model, got {str(source)[:200]!r}, which is none: {error}") from None
    raise InputError(f"`model` must be a path, bytes or an onnx.ModelProto, got {type(source).__name__!r}.")


def _graph_of(proto: onnx.ModelProto, folder: str | None) -> ir.Model:
    model = ir.from_proto(proto)
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    for simplify in SIMPLER:
        simplify(model)
    return model


def _convert(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Model of a later opset."""
    try:
        new = onnx.version_converter.convert_version(proto, opset)
    except Exception as error:
        raise InputError(f"`model` must be of opset {opset}, or of one that converts to it: {error}") from None
    properties = {node.name: node.metadata_props for node in proto.graph.node}
    for node in new.graph.node:  # which the conversion loses
        node.metadata_props.extend(properties.get(node.name, ()))
    return new


def _save(model: ir.Model, output: str | os.PathLike[str] | None) -> onnx.ModelProto:
    initializers = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if output is not None and sum(tensor.nbytes for tensor in initializers) > OWN_FILE:
        ir.save(model, output, external_data=f"{os.path.basename(output)}.data")
        return onnx.load(output, load_external_data=False)
    proto = ir.to_proto(ir.external_data.load_to_model(model))
    if output is not None:
        partial = f"{os.fspath(output)}.partial"
        onnx.save(proto, partial, format="protobuf")
        os.replace(partial, output)
    return proto


def _feeds(batch: Any, names: list[str]) -> dict[str, Array]:
    """Inputs of the session by name."""
    if isinstance(batch, Mapping):
        feeds = {str(name): np.asarray(value) for name, value in batch.items()}
    else:
        several = batch if isinstance(batch, tuple | list) else (batch,)
        feeds = dict(zip(names, map(np.asarray, several), strict=False)) if len(several) == len(names) else {}
    if set(feeds) != set(names):
        given = sorted(feeds) or type(batch).__name__
        raise InputError(f"`batches` must hold the inputs {names} of the model, got {given!r}.")
    return feeds
