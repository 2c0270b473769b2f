"""A Keras model as its layers: their names, what they get while it runs, and its weights."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import keras

from comq_keras.layers import KernelLayer, Unsupported, array, kind_of
from comq_np import InputError, adapter


class KerasModel(adapter.Model):
    """A Keras model, with what runs in place of its plain call."""

    needs = "a Dense, an EinsumDense, a convolution or an Embedding"

    def __init__(self, model: Any, forward: adapter.Forward | None = None) -> None:
        if not isinstance(model, keras.layers.Layer):
            raise InputError(f"`model` must be a keras.Model, got {type(model).__name__!r}.")
        if not model.built:
            raise InputError("`model` must be built, which its first call on a batch does.")
        self.model, self.forward = model, forward
        #: Variables with the values that they are to have in place of their own.
        self._values: list[tuple[keras.Variable, Any]] = []
        self.skipped: dict[str, str] = {}
        found: dict[int, KernelLayer] = {}
        for name, layer in _named(model):
            try:
                new = KernelLayer(name, layer)
                first = found.setdefault(id(new.variable), new)
                if first is not new:
                    first.join(new)
            except Unsupported as reason:
                if _has_matrix(layer):
                    self.skipped[name] = str(reason)
        self._found = list(found.values())
        self.layers = [*self._found]

    def digest(self) -> str:
        """SHA-256 of the names and values of all weights."""
        digest = hashlib.sha256()
        for variable in self.model.weights:
            for part in (variable.path.encode(), *self.leaf(variable.value)):
                digest.update(part)
        return digest.hexdigest()

    def run(self, batch: Any, observe: adapter.Observe, wanted: Collection[str]) -> None:  # noqa: ARG002
        """Call the model as it is in use, or `forward`, with the call of every layer watched meanwhile."""
        errors: list[Exception] = []

        def see(layer: KernelLayer, x: Any) -> None:
            try:
                observe(layer, x)
            except Exception as error:
                errors.append(error)
                raise

        with contextlib.ExitStack() as calls:
            for layer in self._found:
                for each in layer.layers:
                    calls.enter_context(_watched(each, functools.partial(see, layer)))
            if self._values:
                calls.enter_context(keras.StatelessScope(self._values))
            try:
                (self.forward or _call)(self.model, batch)
            except Exception:
                if not errors:
                    raise
        if errors:  # as it was, without the arguments of each call that it went through, which Keras adds
            raise errors[0]

    def copy(self) -> KerasModel:
        """Return the same model, which runs with copies of the weights that the layers have now."""
        made = KerasModel(self.model, self.forward)
        variables = [variable for layer in self._found for variable in layer.variables]
        made._values = [(variable, keras.ops.copy(keras.ops.stop_gradient(variable.value))) for variable in variables]
        return made

    def version(self, x: Any) -> int:
        """PyTorch counts the changes made in place, JAX and TensorFlow make none."""
        if not keras.ops.is_tensor(x):
            raise InputError(f"must be called with a tensor, got {type(x).__name__!r}.")
        if keras.config.backend() in ("jax", "tensorflow"):
            return 0
        return -1 if keras.config.backend() != "torch" or x.is_inference() else int(x._version)

    def leaf(self, value: Any) -> Iterator[bytes]:
        """Type, shape and bytes of a tensor."""
        if keras.ops.is_tensor(value):
            values = array(value)
            yield f"{values.dtype} {values.shape} ".encode()
            yield values.tobytes()

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        """PyTorch would keep all that a gradient needs."""
        if keras.config.backend() != "torch":
            return contextlib.nullcontext()
        import torch

        return torch.no_grad()


def _named(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer by the names on the way to it, such as "block/attention/query", with a number where that is taken."""
    seen: dict[str, Any] = {}
    for path, layer in _below(model, ""):
        names = itertools.chain([path], (f"{path}_{number}" for number in itertools.count(1)))
        name = next(name for name in names if seen.get(name, layer) is layer)
        if name not in seen:
            seen[name] = layer
            yield name, layer


def _below(layer: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, layer
    for child in layer._layers:
        yield from _below(child, f"{path}/{child.name}" if path else child.name)


def _has_matrix(layer: Any) -> bool:
    """Whether a layer has weights of its own that are no vectors, or will have them, once it is built."""
    if not layer.built:
        return kind_of(layer) is not None
    below = {id(weight) for child in layer._layers for weight in child.weights}
    return any(len(weight.shape) > 1 for weight in layer.weights if id(weight) not in below)


@contextlib.contextmanager
def _watched(layer: Any, see: Callable[[Any], None]) -> Iterator[None]:
    """The layer tells what it is called with, as it may others, who stop to watch before or after."""
    watching: list[Callable[[Any], None]] | None = getattr(vars(layer).get("call"), "watching", None)
    if watching is None:
        watching = _watch(layer)
    watching.append(see)
    try:
        yield
    finally:
        watching.remove(see)
        if not watching:
            del vars(layer)["call"]


def _watch(layer: Any) -> list[Callable[[Any], None]]:
    """List of those that a layer tells what it is called with."""
    call, watching = layer.call, []  # type: ignore[var-annotated]

    @functools.wraps(call)
    def watched(*args: Any, **kwargs: Any) -> Any:
        for see in tuple(watching):
            see(args[0] if args else kwargs.get("inputs"))
        return call(*args, **kwargs)

    vars(watched)["watching"] = watching
    vars(layer)["call"] = watched
    return watching


def _call(model: Any, batch: Any) -> object:
    return model(batch, training=False)
