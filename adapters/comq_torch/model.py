"""A PyTorch model, as the passes over the batches take it."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from comq_np import InputError, adapter
from comq_torch.attention import Output, SeeOutputs
from comq_torch.forms import Linear
from comq_torch.layers import TorchLayer, find


class TorchModel(adapter.Model):
    """A module, what runs in place of its plain call, and whether `apply` packs its layers."""

    needs = "a linear, convolution, embedding or attention layer"

    def __init__(self, module: nn.Module, forward: adapter.Forward | None = None, packed: bool = False) -> None:
        if not isinstance(module, nn.Module):
            raise InputError(f"`model` must be a torch.nn.Module, got {type(module).__name__!r}.")
        self.module, self.forward = module, forward
        self._found, self.skipped = find(module, self._swap if packed else None)
        self.layers = [*self._found]

    def digest(self) -> str:
        """SHA-256 of the names and values of all parameters and buffers."""
        digest = hashlib.sha256()
        for name, tensor in itertools.chain(self.module.named_parameters(), self.module.named_buffers()):
            if not is_lazy(tensor):
                digest.update(name.encode())
                for part in self.leaf(tensor):
                    digest.update(part)
        return digest.hexdigest()

    def run(self, batch: Any, observe: adapter.Observe, wanted: Collection[str]) -> None:  # noqa: ARG002
        """Run the model with hooks on every module of its layers."""
        outputs: dict[int, tuple[TorchLayer, Output]] = {}
        with contextlib.ExitStack() as stack:
            for layer in self._found:
                for form in layer.forms:
                    hook = functools.partial(_observe, observe, layer, form)
                    stack.enter_context(form.module.register_forward_pre_hook(hook, with_kwargs=True))
                    if isinstance(form, Output):
                        outputs[id(form.module.weight)] = layer, form
            if any(isinstance(module, nn.MultiheadAttention) for module in self.module.modules()):
                stack.enter_context(SeeOutputs(observe, outputs))
            (self.forward or _call)(self.module, batch)

    def output(self, batch: Any) -> Any:
        """First tensor of floats in what the model returns, as an array."""
        found = _first_tensor((self.forward or _call)(self.module, batch))
        if found is None:
            raise InputError("`model` must return a tensor of floats, or what holds one, such as by `forward`.")
        return found.detach().to("cpu", torch.float64).numpy()

    def copy(self) -> TorchModel:
        """Return the same module with weights of its own."""
        return TorchModel(copy.deepcopy(self.module), self.forward)

    def version(self, x: Any) -> int:
        """Number of changes made to the tensor in place; inference tensors do not count them and get -1."""
        if not isinstance(x, Tensor):
            raise InputError(f"must be called with a tensor, got {type(x).__name__!r}.")
        return -1 if x.is_inference() else x._version

    def leaf(self, value: Any) -> Iterator[Any]:
        """Type, shape and bytes of a tensor."""
        if isinstance(value, Tensor):
            yield f"{value.dtype} {tuple(value.shape)} ".encode()
            if value.layout is torch.strided and not value.is_nested and not value.is_quantized:
                yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; flag by flag, since a `train` method of the model's own may change more."""
        flags = [(module, module.training) for module in self.module.modules()]
        try:
            for module, _ in flags:
                module.training = False
            with torch.inference_mode(False), torch.no_grad(), _uncompiled():
                yield
        finally:
            for module, flag in flags:
                module.training = flag

    def _swap(self, swaps: Mapping[nn.Module, nn.Module], names: list[str]) -> None:
        """Put new modules in the place of those with these names, or of the model."""
        for name in names:
            old = self.module.get_submodule(name)
            new = swaps.get(old, old)  # reached under another name of its parent, it is new already
            parent, _, leaf = name.rpartition(".")
            if name:
                setattr(self.module.get_submodule(parent), leaf, new)
            else:
                self.module = new


def _observe(
    observe: adapter.Observe,
    layer: TorchLayer,
    form: Linear,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Tell what a layer gets; a grid that it gets while this call waits (`sequential`) counts for the call, too."""
    before, (x, *more) = form.quantizer, form.input_of(args, kwargs)
    observe(layer, x, form, *more)
    quantizer = form.quantizer
    return None if quantizer is None or quantizer is before else form.with_input(args, kwargs, quantizer)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Where PyTorch can do so, what `torch.compile` made runs as it was before: compiled code hides what layers get."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return contextlib.nullcontext()
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("force_eager") if set_stance else contextlib.nullcontext()


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _first_tensor(thing: object) -> Tensor | None:
    if isinstance(thing, Tensor):
        return thing if thing.is_floating_point() else None
    parts = thing.values() if isinstance(thing, Mapping) else thing if isinstance(thing, tuple | list) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
