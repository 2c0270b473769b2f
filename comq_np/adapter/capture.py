"""From a model and its inputs to a calibration file."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from comq_np import checks, planning
from comq_np.adapter.batches import Batches, Named
from comq_np.adapter.inputs import ActivationBits, ActivationOptions, Activations, AnyHistogram, activations
from comq_np.adapter.interface import EMBEDDING, Model, Select, WeightLayer
from comq_np.adapter.sharing import AnyGram, SharedGrams
from comq_np.calibration import CalibrationWriter, Layer
from comq_np.checks import InputError, bytes_of
from comq_np.modalities import NamedGrams
from comq_np.widths import matches

Path = str | os.PathLike[str]


def capture(
    model: Model,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    path: Path,
    layers: Iterable[str] | None = None,
    *,
    select: Select | None = None,
    memory: int | str | None = None,
    activation_bits: ActivationBits = None,
    activation_options: ActivationOptions = None,
    restart: bool = False,
    progress: bool = False,
) -> None:
    """Run a model and write weights and input Grams of its layers to a calibration file.

    Inputs are never kept, only their Grams. Where these take more than `memory`, they are gathered in several passes
    over the batches; the file is the same to the bit. What a pass has gathered is on the disk before the next one
    starts: after an interruption, the same call goes on there.

    With `activation_bits`, the first pass gathers histograms of the inputs, by which `comq_np.activation_grid` finds
    codes for them; what follows gathers the Grams of the quantized inputs, with their products with the float ones
    (`comq_np.CrossGram`), so that the weights make up for a part of what the inputs lose.

    Parameters
    ----------
    model : Model
        Model of the framework.
    batches : iterable
        What `Model.run` takes. Of what a layer gets in a batch, the first half goes to one fold of its Gram and the
        second to the other; a batch of one text or image goes to the two in turn. For several passes they must be the
        same each time. A mapping has named groups of batches, such as images and texts, each with a Gram of its own:
        they are balanced where a layer is solved, and its report has the error of each (`comq_np.NamedGrams`). Of an
        embedding, the tokens of all groups are counted together.
    path : str or path-like
        Calibration file to write.
    layers : iterable of str, optional
        Names of layers, or patterns such as ``"encoder.*.fc?"``; by default all layers.
    select : callable, optional
        Called as ``select(x, batch)`` on each input of a layer; returns the samples of it that count.
    memory : int or str, optional
        Bytes for the Grams of one pass and the work on them, a number or a text such as "4GiB". The model runs once
        more on the first batch, to find out which layers share a Gram, unless it is `shared_by_geometry`. By default
        there is one pass, and nothing to go on from.
    activation_bits : int from 2 to 8, or mapping from str to such an int, optional
        Bits of the inputs of all layers but embeddings; or of those whose names match a pattern, of which the last that
        matches counts. Others have float inputs.
    activation_options : mapping, optional
        Options of `comq_np.activation_grid`, such as ``{"symmetric": True}``. Beside them, ``{"axis": "channel"}``
        gives each channel of an input a scale of its own, which the weights absorb (`comq_np.ChannelGrid`); layers
        without `channels` have one scale all the same.
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
        the batches cannot be gone through often enough (which is told before the first pass) or change, or the
        `activation_` options are not as above.
    FileError
        If the file cannot be written, another process writes it, or layers of another capture are kept.

    Warns
    -----
    UserWarning
        If some layers got no input; they are left out.
    """
    source = Batches(batches, model.leaf)
    chosen, skipped = choose(model, layers)
    for layer in chosen:
        _check_finite(layer)
    names = [layer.name for layer in chosen]
    inputs = activations(activation_bits, activation_options, chosen, skipped)
    if inputs.bits and source.groups is not None:
        raise InputError(f"`batches` must have no named groups with `activation_bits`, got {source.groups}.")
    run = None if memory is None else _run(model, names, source, select, inputs)
    with CalibrationWriter(path, run=run, order=[*names, *skipped], restart=restart) as file:
        passes = _Capture(file, model, chosen, source, memory, select, inputs)
        with tqdm(desc="capture", unit="batch", disable=not progress) as bar:
            passes.run(bar)
        passes.check()
        for name, why in skipped.items():
            if name not in file:
                file.skip(name, why)


def choose(model: Model, patterns: Iterable[str] | None) -> tuple[list[WeightLayer], dict[str, str]]:
    """Those layers, and what is skipped, that a pattern matches, if each pattern matches a layer."""
    if not model.layers:
        raise InputError(f"`model` must have {model.needs}, has none.")
    patterns = ["*"] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise InputError("`layers` must hold at least one name or pattern, got none.")
    for pattern in patterns:
        if not any(_matches(layer.names, [pattern]) for layer in model.layers):
            reasons = [f" {name!r}: {why}" for name, why in model.skipped.items() if _matches([name], [pattern])]
            raise InputError(
                f"`layers` must name layers that can be quantized, got {pattern!r}, which matches none."
                + "".join(reasons[:1])
            )
    chosen = [layer for layer in model.layers if _matches(layer.names, patterns)]
    for layer in chosen:
        with checks.layer(layer.name):
            layer.check_readable()
    return chosen, {name: why for name, why in model.skipped.items() if _matches([name], patterns)}


def _matches(names: list[str], patterns: list[str]) -> bool:
    return any(matches(name, pattern) for name in names for pattern in patterns)


def _check_finite(layer: WeightLayer) -> None:
    """Refuse a weight with NaN or infinite entries."""
    W, _ = layer.arrays()
    bad = W.size - int(np.isfinite(W).sum())
    if bad:
        raise InputError(
            f"layer {layer.name!r}: `weight` must be finite, got {bad} NaN or infinite of {W.size} entries."
        )


def _run(
    model: Model, names: list[str], batches: Batches, select: Select | None, inputs: Activations
) -> dict[str, object]:
    """What the file depends on, as far as it can be told."""
    functions = {"`forward`": model.forward, "`select`": select}
    named = {name: given and getattr(given, "__qualname__", type(given).__name__) for name, given in functions.items()}
    model_and_data = {"the model": model.digest(), "the first batch": batches.digest_of_first()}
    named |= {} if batches.groups is None else {"the names of the groups of batches": batches.groups}
    asked = {"`activation_bits`": inputs.bits or None, "`activation_options`": inputs.options or None}
    return {"the list of layers": names, **named, **asked, **model_and_data}


class _Observer:
    """Sees the inputs of layers and adds them to the Grams of those that are wanted."""

    def __init__(self, model: Model, grams: SharedGrams, select: Select | None) -> None:
        self._model, self._grams, self._select = model, grams, select
        self._number, self._batch = -1, None
        self._group: str | None = None

    def watch(self, batches: Iterable[Any]) -> None:
        """Run the model on the batches."""
        with self._model.evaluating():
            for batch in batches:
                self._number += 1
                self._group, self._batch = batch if isinstance(batch, Named) else (None, batch)
                self._model.run(self._batch, self._observe, self._grams.observed())
                self._grams.end_batch()

    def _observe(self, layer: WeightLayer, x: Any, *extra: Any) -> None:
        if layer.name not in self._grams:
            return
        try:
            version = self._model.version(x)
            self._grams.add(layer.name, x, version, functools.partial(self._update, layer, x, extra))
        except InputError as error:
            raise InputError(f"layer {layer.name!r}, batch {self._number}: {error}") from None

    def _update(self, layer: WeightLayer, x: Any, extra: tuple[Any, ...], gram: AnyGram) -> None:
        into = gram.grams[self._group] if isinstance(gram, NamedGrams) and self._group is not None else gram
        chosen = x if self._select is None else self._select(x, self._batch)
        for number, half in enumerate(layer.halves(x, chosen, *extra), start=self._number):
            for part in layer.rows(half, *extra) if len(half) else ():
                into.update(part) if isinstance(into, AnyHistogram) else into.update(part, fold=number % 2)


class _Capture:
    """Passes over the batches, until the file has every layer that they reach."""

    def __init__(
        self,
        file: CalibrationWriter,
        model: Model,
        layers: list[WeightLayer],
        batches: Batches,
        memory: int | str | None,
        select: Select | None,
        inputs: Activations,
    ) -> None:
        self._file, self._model, self._layers, self._batches = file, model, layers, batches
        self._memory, self._select, self._inputs = memory, select, inputs
        self._left = [layer for layer in layers if layer.name not in file]
        self._missed: list[str] = []

    def run(self, bar: tqdm[Any]) -> None:
        """Gather the Grams, pass after pass: each is in the file before the next one starts."""
        number, sets, planned = 0, [], False
        if any(layer.name in self._inputs.bits for layer in self._left):
            number, sets = 1, self._find_grids(bar)
        elif self._left and self._memory is not None:
            sets = self._first_sets()
        while self._left:
            number += 1
            plan = self._plan(sets, self._memory)
            if not planned and self._memory is not None:
                _tell(bar, str(plan))
                planned = True
            first, last = plan.passes[0], number + len(plan.passes) - 1
            if last > 1:
                self._check_repeatable(last, sets)
                bar.set_description(f"capture, pass {number} of {last}")
            sets = self._gather(self._one_pass(number, len(plan.passes), bar), first, bar)

    def _find_grids(self, bar: tqdm[Any]) -> list[set[str]]:
        """Go through the batches once for the grids of the inputs; which layers get the same ones."""
        wanted = [layer.name for layer in self._left if layer.name in self._inputs.bits]
        if self._batches.once:
            raise InputError(
                f"`batches` must be a list or a loader, to be gone through twice with `activation_bits`, got "
                f"{self._batches.kind!r}, which one pass uses up."
            )
        needed = self._inputs.histogram_bytes(layer for layer in self._left if layer.name in wanted)
        if self._memory is not None and bytes_of("memory", self._memory) < needed:
            raise InputError(
                f"`memory` must be at least {needed} bytes for the histograms of the inputs of {len(wanted)} layers, "
                f"got {self._memory!r}."
            )
        bar.set_description("capture, pass 1, histograms")
        geometry, kind = self._model.shared_by_geometry, self._inputs.histogram
        histograms = SharedGrams(self._layers, wanted, None, geometry, kind=kind)
        _Observer(self._model, histograms, self._select).watch(self._one_pass(1, 2, bar))
        for name in wanted:
            histogram = histograms[name]
            if histogram is not None and histogram.count:
                self._inputs.solve(name, histogram)
        return histograms.sets()

    def _first_sets(self) -> list[set[str]]:
        """Which layers share a Gram, as far as that is known, or the first batch tells it."""
        grams = SharedGrams(
            self._layers, shared_by_geometry=self._model.shared_by_geometry, groups=self._batches.groups
        )
        if not self._model.shared_by_geometry:
            _Observer(self._model, grams, None).watch([self._batches.first])
        return grams.sets()

    def _gather(self, batches: Iterable[Any], layers: planning.CalibrationPass, bar: tqdm[Any]) -> list[set[str]]:
        """Go through the batches once; which layers share a Gram."""
        room = None if layers.spare is None else layers.gram_bytes + layers.spare
        geometry, groups = self._model.shared_by_geometry, self._batches.groups
        kind = self._inputs.gram if self._inputs.bits else None
        grams = SharedGrams(self._layers, layers.layers, room, geometry, groups, kind)
        _Observer(self._model, grams, self._select).watch(batches)
        self._write(grams, bar)
        return grams.sets()  # the Grams are let go before the next pass

    def check(self) -> None:
        """Name the layers that got no input."""
        names = ", ".join(map(repr, self._missed))
        if len(self._missed) == len(self._layers):
            raise InputError(f"`batches` must reach a layer, none of them got an input: {names}.")
        if names:
            warnings.warn(f"No batch reached these layers, which are left out: {names}.", UserWarning, stacklevel=4)

    def _plan(self, sets: list[set[str]], memory: int | str | None) -> planning.CalibrationPlan:
        shapes = {layer.name: layer.shape for layer in self._left}
        grids = self._inputs.grids
        alike = [[name for name in shapes if name in names] for names in sets]
        shared = [
            [name for name in names if grids.get(name) == grid]
            for names in alike
            for grid in dict.fromkeys(map(grids.get, names))
        ]
        counted = [layer.name for layer in self._left if layer.kind == EMBEDDING]
        groups = len(self._batches.groups or [""])
        return planning.plan_calibration(shapes, memory, shared=shared, counted=counted, groups=groups, crossed=grids)

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
        for batch in self._batches.one_pass(number, compare=self._memory is not None or bool(self._inputs.bits)):
            yield batch
            bar.update()

    def _write(self, grams: SharedGrams, bar: tqdm[Any]) -> None:
        """Put what a pass has gathered into the file."""
        scarce = []
        for layer in self._left:
            gram = grams[layer.name]
            if grams.missed(layer.name):
                self._missed.append(layer.name)
            elif layer.name in grams.wanted and gram:
                weight, bias = layer.arrays()
                self._file.add(Layer(layer.name, weight, gram, bias, layer.kind))
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
