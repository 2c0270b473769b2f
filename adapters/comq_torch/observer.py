"""What layers get while the model runs, batch after batch, added up in their Grams."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from comq_np import Gram, InputError
from comq_torch.layers import WeightLayer, rows
from comq_torch.sharing import SharedGrams

Forward = Callable[[Any, Any], object]
Select = Callable[[Tensor, Any], Tensor]


class Observer:
    """Sees the inputs of layers and keeps the Grams of those that are wanted, in so many bytes if `room` says so."""

    def __init__(
        self, layers: list[WeightLayer], select: Select | None, wanted: Iterable[str] = (), room: int | None = None
    ) -> None:
        self.grams = SharedGrams(((layer.name, layer.geometry, len(layer.matrix)) for layer in layers), wanted, room)
        self._layers, self._select = layers, select
        self._number, self._batch = -1, None

    def watch(self, model: nn.Module, batches: Iterable[Any], forward: Forward | None) -> SharedGrams:
        """Run the model on the batches; the Grams of what its layers got."""
        with _evaluating(model), self._hooked():
            for batch in batches:
                self._number, self._batch = self._number + 1, batch
                (forward or _call)(model, batch)
                self.grams.end_batch()
        return self.grams

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        """Hooks in place on every module of the layers."""
        with contextlib.ExitStack() as hooks:
            for layer in self._layers:
                for module in layer.modules:
                    hook = functools.partial(self._observe, layer.name)
                    hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    def _observe(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        try:
            if not isinstance(x, Tensor):
                raise InputError(f"must be called with a tensor, got {type(x).__name__!r}.")
            self.grams.add(name, x, functools.partial(self._update, module, x))
        except InputError as error:
            raise InputError(f"layer {name!r}, batch {self._number}: {error}") from None

    def _update(self, module: nn.Module, x: Tensor, gram: Gram) -> None:
        chosen = x.detach() if self._select is None else self._select(x, self._batch).detach()
        for number, half in enumerate(_halves(module, x, chosen), start=self._number):
            for part in rows(module, half) if len(half) else ():
                gram.update(part, fold=number % 2)


def _halves(module: nn.Module, x: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
    """What was chosen of the input `x` in two halves, no image or vector torn apart; of a lone text all in one."""
    one = 3 if isinstance(module, nn.Conv2d) else 1
    items = chosen if chosen.dim() > one else chosen[None]
    return (items,) if x.dim() > 2 and len(x) == 1 else items.tensor_split(2)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; flag by flag, since a `train` method of the model's own may change more."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
