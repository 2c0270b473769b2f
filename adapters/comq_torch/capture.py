"""From a model and its inputs to a calibration file."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from tqdm import tqdm

import comq_np
from comq_np import InputError
from comq_torch.batches import Batches, digest_of, digest_of_model
from comq_torch.layers import WeightLayer, check_finite, choose, find
from comq_torch.observer import Forward, Observer, Select
from comq_torch.sharing import SharedGrams

Path = str | os.PathLike[str]


def capture(
    model: nn.Module,
    batches: Iterable[Any],
    path: Path,
    layers: Iterable[str] | None = None,
    *,
    forward: Forward | None = None,
    select: Select | None = None,
    memory: int | str | None = None,
    restart: bool = False,
    progress: bool = False,
) -> None:
    """Run a model and write weights and input Grams of its layers to a calibration file.

    Layers are `nn.Linear`, the `Conv1D` of Hugging Face transformers, and `nn.Conv2d` with one group, anywhere in the
    model; a `Conv2d` subclass with a forward of its own, and a weight that is computed (a parametrization), are left
    out. Modules that share one weight parameter are one layer, named by the first, with the inputs of all of them.
    The model runs in eval mode without gradients and is left as it was.

    Inputs are never kept, only their Grams. Where these take more than `memory`, they are gathered in several passes
    over the batches; the file is the same to the bit. What a pass has gathered is on the disk before the next one
    starts: after an interruption, the same call goes on there.

    Parameters
    ----------
    model : torch.nn.Module
        Model with its trained weights, of any float type.
    batches : iterable
        Inputs, on the model's device: a tensor is called ``model(x)``, a tuple or list ``model(*batch)``, a mapping
        ``model(**batch)``, anything else ``model(batch)``. Of what a layer gets in a batch, the first half goes to one
        fold of its Gram and the second to the other; a batch of one text or image goes to the two in turn. For several
        passes they must be the same each time, as those of a list are, and of a loader that does not shuffle.
    path : str or path-like
        Calibration file to write.
    layers : iterable of str, optional
        Names of layers, or patterns such as ``"encoder.*.fc?"``; by default all layers.
    forward : callable, optional
        Called as ``forward(model, batch)`` in place of the plain call.
    select : callable, optional
        Called as ``select(x, batch)`` on each input of a layer, (..., m) or (N, C, H, W); returns the samples of it
        that count, such as ``x[batch["attention_mask"].bool()]``.
    memory : int or str, optional
        Bytes for the Grams of one pass and the work on them, a number or a text such as "4GiB"; what running the model
        takes, and a float32 copy of one input, is beyond it. The model runs once more on the first batch, to find out
        which layers share a Gram. By default there is one pass, and nothing to go on from.
    restart : bool
        Whether to drop what an interrupted capture has finished. Where the layers, the model, the first batch, or the
        names of `forward` and `select` are other ones, there is no going on from that; all else must be the same.
    progress : bool
        Whether to show the plan of the passes, a progress bar, and which layers got fewer samples than they have rows,
        on standard error.

    Raises
    ------
    InputError
        If there is nothing to capture, a pattern matches no layer, or a weight or input is not finite; the message
        names the layer and the number of the batch, counted from 0. Also if `memory` does not hold the largest Gram, or
        the batches cannot be gone through often enough (which is told before the first pass) or change.
    FileError
        If the file cannot be written, another process writes it, or layers of another capture are kept.

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
    source, chosen = Batches(batches), choose(find(model), layers)
    for layer in chosen:
        check_finite(layer)
    names = [layer.name for layer in chosen]
    run = None if memory is None else _run(model, names, source, forward, select)
    with comq_np.CalibrationWriter(path, run=run, order=names, restart=restart) as file:
        passes = _Capture(file, chosen, source, memory, select)
        with tqdm(desc="capture", unit="batch", disable=not progress) as bar:
            passes.run(model, forward, bar)
        passes.check()


def _run(
    model: nn.Module, names: list[str], batches: Batches, forward: Forward | None, select: Select | None
) -> dict[str, object]:
    """What the file depends on, as far as it can be told."""
    functions = {"`forward`": forward, "`select`": select}
    named = {name: given and getattr(given, "__qualname__", type(given).__name__) for name, given in functions.items()}
    model_and_data = {"the model": digest_of_model(model), "the first batch": digest_of(batches.first)}
    return {"the list of layers": names, **named, **model_and_data}


class _Capture:
    """Passes over the batches, until the file has every layer that they reach."""

    def __init__(
        self,
        file: comq_np.CalibrationWriter,
        layers: list[WeightLayer],
        batches: Batches,
        memory: int | str | None,
        select: Select | None,
    ) -> None:
        self._file, self._layers, self._batches = file, layers, batches
        self._memory, self._select = memory, select
        self._left = [layer for layer in layers if layer.name not in file]
        self._missed: list[str] = []

    def run(self, model: nn.Module, forward: Forward | None, bar: tqdm[Any]) -> None:
        """Gather the Grams, pass after pass: each is in the file before the next one starts."""
        sets: list[set[str]] = []
        if self._left and self._memory is not None:
            sets = Observer(self._layers, None).watch(model, [self._batches.first], forward).sets()
        number = 0
        while self._left:
            number += 1
            plan = self._plan(sets, self._memory)
            if number == 1 and self._memory is not None:
                _tell(bar, str(plan))
            first, last = plan.passes[0], number + len(plan.passes) - 1
            if last > 1:
                self._check_repeatable(last, sets)
                bar.set_description(f"capture, pass {number} of {last}")
            sets = self._gather(model, self._one_pass(number, len(plan.passes), bar), first, forward, bar)

    def _gather(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: comq_np.CalibrationPass,
        forward: Forward | None,
        bar: tqdm[Any],
    ) -> list[set[str]]:
        """Go through the batches once; which layers share a Gram."""
        room = None if layers.spare is None else layers.gram_bytes + layers.spare
        grams = Observer(self._layers, self._select, layers.layers, room).watch(model, batches, forward)
        self._write(grams, bar)
        return grams.sets()  # the Grams are let go before the next pass

    def check(self) -> None:
        """Name the layers that got no input."""
        names = ", ".join(map(repr, self._missed))
        if len(self._missed) == len(self._layers):
            raise InputError(f"`batches` must reach a layer, none of them got an input: {names}.")
        if names:
            warnings.warn(f"No batch reached these layers, which are left out: {names}.", UserWarning, stacklevel=3)

    def _plan(self, sets: list[set[str]], memory: int | str | None) -> comq_np.CalibrationPlan:
        shapes = {layer.name: (layer.matrix.shape[0], layer.matrix.shape[1]) for layer in self._left}
        return comq_np.plan_calibration(shapes, memory, shared=[[*shapes.keys() & names] for names in sets])

    def _check_repeatable(self, passes: int, sets: list[set[str]]) -> None:
        """Refuse batches that can be gone through only once before they are, where that is not enough."""
        if self._batches.once:
            needed = self._plan(sets, None).passes[0].memory
            raise InputError(
                f"`batches` must be a list or a loader, to be gone through {passes} times with `memory` "
                f"{self._memory!r}, got {self._batches.kind!r}, which one pass uses up. For one, {needed} bytes "
                "are enough; or capture some of the `layers` at a time and merge the files by `comq_np.merge_files`."
            )

    def _one_pass(self, number: int, passes: int, bar: tqdm[Any]) -> Iterator[Any]:
        """The batches, with progress over this pass and the others to come."""
        bar.total = None if self._batches.count is None else bar.n + passes * self._batches.count
        for batch in self._batches.one_pass(number, compare=self._memory is not None):
            yield batch
            bar.update()

    def _write(self, grams: SharedGrams, bar: tqdm[Any]) -> None:
        """Put what a pass has gathered into the file."""
        scarce = []
        for layer in self._left:
            gram = grams[layer.name]
            if not grams.reached(layer.name) or (layer.name in grams.wanted and not (gram and gram.count)):
                self._missed.append(layer.name)
            elif layer.name in grams.wanted and gram:
                weight, bias = layer.arrays()
                self._file.add(comq_np.Layer(layer.name, weight, gram, bias, layer.kind))
                if gram.count < len(gram):
                    scarce.append(f"{layer.name!r} ({gram.count} for {len(gram)})")
        if scarce:
            _tell(bar, f"Fewer samples than rows, so that only shrinkage makes up for the rest: {', '.join(scarce)}")
        self._left = [
            layer for layer in self._left if layer.name not in {*self._missed} and layer.name not in self._file
        ]


def _tell(bar: tqdm[Any], text: str) -> None:
    """Say something above the progress bar, where there is one."""
    if not bar.disable:
        bar.write(text, file=sys.stderr)
