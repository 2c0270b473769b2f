"""From a model and its inputs to a calibration file."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import comq_np
from comq_np import Gram, InputError
from comq_torch.layers import WeightLayer, check_finite, choose, find, rows
from comq_torch.sharing import SharedGrams

Path = str | os.PathLike[str]
Forward = Callable[[Any, Any], object]
Select = Callable[[Tensor, Any], Tensor]


def capture(
    model: nn.Module,
    batches: Iterable[Any],
    path: Path,
    layers: Iterable[str] | None = None,
    *,
    forward: Forward | None = None,
    select: Select | None = None,
    progress: bool = False,
) -> None:
    """Run a model and write weights and input Grams of its layers to a calibration file.

    Layers are `nn.Linear`, the `Conv1D` of Hugging Face transformers, and `nn.Conv2d` with one group, anywhere in the
    model; a `Conv2d` subclass with a forward of its own, and a weight that is computed (a parametrization), are left
    out. Modules that share one weight parameter are one layer, named by the first, with the inputs of all of them.
    The model runs in eval mode without gradients and is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        Model with its trained weights, of any float type.
    batches : iterable
        Inputs, on the model's device: a tensor is called ``model(x)``, a tuple or list ``model(*batch)``, a mapping
        ``model(**batch)``, anything else ``model(batch)``. Of what a layer gets in a batch, the first half goes to one
        fold of its Gram and the second to the other; a batch of one text or image goes to the two in turn.
    path : str or path-like
        Calibration file to write.
    layers : iterable of str, optional
        Names of layers, or patterns such as ``"encoder.*.fc?"``; by default all layers.
    forward : callable, optional
        Called as ``forward(model, batch)`` in place of the plain call.
    select : callable, optional
        Called as ``select(x, batch)`` on each input of a layer, (..., m) or (N, C, H, W); returns the samples of it
        that count, such as ``x[batch["attention_mask"].bool()]``.
    progress : bool
        Whether to show a progress bar on standard error.

    Raises
    ------
    InputError
        If there is nothing to capture, a pattern matches no layer, or a weight or input is not finite; the message
        names the layer and the number of the batch, counted from 0.
    FileError
        If the file cannot be written.

    Warns
    -----
    UserWarning
        If some layers got no input; they are left out.

    Examples
    --------
    >>> import comq_np, comq_torch, os, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> path = os.path.join(tempfile.mkdtemp(), "calibration.h5")
    >>> comq_torch.capture(model, [torch.ones(5, 4)], path)
    >>> with comq_np.CalibrationFile(path) as file:
    ...     {name: layer.weight.shape for name, layer in file.items()}
    {'0': (4, 3), '2': (3, 2)}
    """
    if isinstance(batches, Mapping) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise InputError(f"`batches` must be an iterable of batches, got {type(batches).__name__!r}.")
    chosen = choose(find(model), layers)
    for layer in chosen:
        check_finite(layer)
    with comq_np.CalibrationWriter(path) as file:
        observer = _Observer(chosen, select)
        with _evaluating(model), observer.hooked():
            for batch in tqdm(batches, desc="capture", unit="batch", disable=not progress):
                observer.start(batch)
                (forward or _call)(model, batch)
                observer.grams.end_batch()
        for layer in observer.reached():
            bias = None if layer.bias is None else _single(layer.bias).numpy()
            weight = _single(layer.matrix).numpy()
            file.add(comq_np.Layer(layer.name, weight, observer.grams[layer.name], bias, layer.kind))


class _Observer:
    """Sees the inputs of layers, batch after batch, and keeps their Grams."""

    def __init__(self, layers: list[WeightLayer], select: Select | None) -> None:
        self.grams = SharedGrams((layer.name, layer.geometry, len(layer.matrix)) for layer in layers)
        self._layers, self._select = layers, select
        self._number, self._batch = -1, None

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks in place on every module of the layers."""
        with contextlib.ExitStack() as hooks:
            for layer in self._layers:
                for module in layer.modules:
                    hook = functools.partial(self._observe, layer.name)
                    hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    def start(self, batch: Any) -> None:
        """From here on, the inputs are those of the next batch."""
        self._number, self._batch = self._number + 1, batch

    def reached(self) -> list[WeightLayer]:
        """Layers that got an input; a warning names the others."""
        if self._number < 0:
            raise InputError("`batches` must hold at least one batch, got none.")
        missed = [layer for layer in self._layers if self.grams[layer.name].count == 0]
        names = ", ".join(repr(layer.name) for layer in missed)
        if len(missed) == len(self._layers):
            raise InputError(f"`batches` must reach a layer, none of them got an input: {names}.")
        if missed:
            warnings.warn(f"No batch reached these layers, which are left out: {names}.", UserWarning, stacklevel=3)
        return [layer for layer in self._layers if layer not in missed]

    def _observe(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        try:
            if not isinstance(x, Tensor):
                raise InputError(f"must be called with a tensor, got {type(x).__name__!r}.")
            self.grams.add(name, x, functools.partial(self._update, module, x))
        except InputError as error:
            raise InputError(f"layer {name!r}, batch {self._number}: {error}") from None

    def _update(self, module: nn.Module, x: Tensor, gram: Gram) -> None:
        chosen = _single(x if self._select is None else self._select(x, self._batch))
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


def _single(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32)
