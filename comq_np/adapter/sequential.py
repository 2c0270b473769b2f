"""Layer after layer: each is calibrated on what the layers before it, which are quantized already, make of the batches.

All batches run through two models at once, the one that is being quantized and a float copy, each in a thread of its
own that waits at the next layer. So every batch runs once through either, whatever the model does between its layers,
and no more is in memory than what the models hold at one layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import threading
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from comq_np import checks, tasks
from comq_np.adapter.capture import choose
from comq_np.adapter.interface import Model, Select, WeightLayer
from comq_np.counts import TokenCounts
from comq_np.gram import Fold, Gram
from comq_np.layouts import combined
from comq_np.pipeline import Reports
from comq_np.result import Solved, SolveReport
from comq_np.solver import solve
from comq_np.widths import layer_bits

Float64 = npt.NDArray[np.float64]


def quantize_in_sequence(
    model: Model,
    batches: Iterable[Any],
    bits: int | Mapping[str, int] = 4,
    layers: Iterable[str] | None = None,
    *,
    select: Select | None = None,
    fit_bias: bool = True,
    strict: bool = False,
    progress: bool = False,
    **options: Any,
) -> Reports:
    """Quantize a model layer after layer, each on the inputs that it gets from the quantized ones before it.

    The codes are to give the outputs that the float model has: with X~ the inputs from the quantized model and X those
    of the float one, they minimise ``||X~ Wq - X W||**2`` (`comq_np.matched_weights`), and the bias takes up the mean
    of what is left.

    Parameters
    ----------
    model : Model
        Model to change; it must have a `copy`.
    batches : iterable
        Inputs, as in `capture`. All of them are in memory, and what the model holds of each between two layers.
    bits : int from 1 to 16, or mapping from str to such an int
        Bits of one code, as in `comq_np.quantize_file`.
    layers : iterable of str, optional
        Names of layers, or patterns.
    select : callable, optional
        Picks the samples that count.
    fit_bias : bool
        Whether biases take up the mean of the output error.
    strict : bool
        Whether the first layer that cannot be solved stops the run; else it stays float.
    progress : bool
        Whether to show a progress bar on standard error.
    **options : keyword arguments
        Options of `comq_np.solve`.

    Returns
    -------
    comq_np.Reports
        The report of each layer that is solved, by name; `kept` and `skipped` have the reasons why others stay float.
        The reports refer to the weights that match the float model's outputs best.

    Raises
    ------
    InputError
        If an option is wrong, there is no layer, or no batch, or an input is not finite: the message names the layer.
    """
    fit_bias, strict = checks.boolean("fit_bias", fit_bias), checks.boolean("strict", strict)
    if isinstance(batches, Mapping):
        raise checks.InputError(
            "`batches` must be an iterable of batches with `sequential`, which cannot balance named groups, got "
            f"{type(batches).__name__!r}."
        )
    chosen, skipped = choose(model, layers)
    for layer in chosen:
        layer.check_writable()
    widths = layer_bits(bits, [layer.name for layer in chosen], skipped=skipped)
    for width in set(widths.values()):
        tasks.check({**options, "bits": width})
    exact = model.copy()
    reports: dict[str, SolveReport] = {}
    kept: dict[str, str] = {}
    wanted = [layer.name for layer in chosen]
    with model.evaluating(), exact.evaluating(), _started(model, exact, batches, wanted) as samples:
        steps = _Steps(chosen, samples, select)
        for layer in tqdm(steps, desc="sequence", unit="layer", total=len(chosen), disable=not progress):
            try:
                with checks.layer(layer.name):
                    q = _solved(layer, steps.seen(layer), widths[layer.name], fit_bias, options)
            except checks.InputError as error:
                if strict:
                    raise
                kept[layer.name] = str(error).removeprefix(f"layer {layer.name!r}: ")
                continue
            with checks.layer(layer.name):
                layer.check(q)
            layer.write(q.dequantize(), q.bias_shift, q)
            reports[layer.name] = q.report
    missed = {layer.name: "no batch reached it." for layer in chosen if layer.name not in (*reports, *kept)}
    return Reports(reports, {**kept, **missed}, skipped)


class Seen(NamedTuple):
    """What a layer has got: the Gram of its inputs X~; for each fold X~.T @ (X - X~), and the sum of the float X."""

    gram: Gram | TokenCounts
    apart: Float64
    sums: Float64


class _Steps:
    """The layers that batches wait at, first to last; after each, those that waited there go on."""

    def __init__(self, layers: list[WeightLayer], samples: list[_Sample], select: Select | None) -> None:
        self._order = {layer.name: number for number, layer in enumerate(layers)}
        self._layers, self._samples, self._select = layers, samples, select
        self._last: tuple[Hashable, list[Any], Seen] | None = None

    def __iter__(self) -> Iterator[WeightLayer]:
        for sample in self._samples:
            sample.own.go_on(self._order)
        while True:
            waiting = [sample.own.at for sample in self._samples if sample.own.at is not None]
            if not waiting:
                return
            name = min(waiting, key=self._order.__getitem__)
            number = self._order[name]
            ahead = [one for one, place in self._order.items() if place >= number]
            for sample in self._samples:
                sample.exact.go_on(ahead, stay=True)
            yield self._layers[number]
            del self._order[name]
            for sample in self._samples:
                if sample.own.at == name:
                    sample.own.go_on(self._order)

    def seen(self, layer: WeightLayer) -> Seen:
        """What the layer gets; that of the layer before, if it is the very same."""
        here = [sample for sample in self._samples if sample.own.at == layer.name]
        inputs = [run.input for sample in here for run in (sample.own, sample.exact)]
        key = layer.geometry, tuple(run.version for sample in here for run in (sample.own, sample.exact))
        if self._last is not None:
            same_inputs = len(inputs) == len(self._last[1]) and all(map(operator.is_, inputs, self._last[1]))
            if key == self._last[0] and same_inputs and -1 not in key[1]:
                return self._last[2]
        self._last = key, inputs, self._gathered(layer, here)
        return self._last[2]

    def _gathered(self, layer: WeightLayer, here: list[_Sample]) -> Seen:
        gram = layer.gram()
        shape = () if isinstance(gram, TokenCounts) else gram.mean.shape
        seen = Seen(gram, np.zeros((2, *shape, *shape[-1:])), np.zeros((2, *shape)))
        for sample in here:
            try:
                self._add(layer, sample, seen)
            except checks.InputError as error:
                raise checks.InputError(f"batch {sample.number}: {error}") from None
        return seen

    def _add(self, layer: WeightLayer, sample: _Sample, seen: Seen) -> None:
        """Add what the layer gets in one batch; where the float model has taken another way, it stands for both."""
        own, exact = sample.own, sample.exact
        both = own, exact if exact.at == layer.name and exact.input.shape == own.input.shape else own
        halves = [layer.halves(run.input, self._chosen(run), *run.extra) for run in both]
        for number, parts in enumerate(zip(*halves, strict=True), start=sample.number):
            if len(parts[0]):
                rows = [layer.rows(part, *run.extra) for run, part in zip(both, parts, strict=True)]
                _add(seen, number % 2, *rows)

    def _chosen(self, run: _Run) -> Any:
        return run.input if self._select is None else self._select(run.input, run.batch)


def _add(seen: Seen, fold: int, own: Iterator[Any], exact: Iterator[Any]) -> None:
    """Add rows that a layer gets in the quantized model, and those that it gets in the float one."""
    for part, other in zip(own, exact, strict=True):
        seen.gram.update(part, fold=fold)
        if isinstance(seen.gram, TokenCounts):
            continue
        shape = (-1, *seen.sums.shape[1:])
        rows, others = (np.asarray(values, np.float32).reshape(shape) for values in (part, other))
        left, right = (np.moveaxis(values, 0, -2) for values in (rows, others - rows))  # (b, samples, m)
        seen.apart[fold] += np.swapaxes(left, -1, -2) @ right
        seen.sums[fold] += others.sum(axis=0, dtype=np.float64)


def _solved(layer: WeightLayer, seen: Seen, bits: int, fit_bias: bool, options: dict[str, Any]) -> Solved:
    """Codes for what a layer has seen."""
    W, _ = layer.arrays()
    gram = seen.gram
    q: Solved
    if isinstance(gram, TokenCounts):
        q = solve(W, gram, bits, **options)
        return q
    cross = np.stack([fold.matrix for fold in gram.folds]) + seen.apart
    if not (fit_bias and layer.has_bias):
        q = solve(W, gram, bits, cross=_of_folds(cross, gram), **options)
        return q
    folds = []
    for k, (fold, total) in enumerate(zip(gram.folds, seen.sums, strict=True)):
        matrix = gram.fold_matrix(k, centred=True)
        cross[k] -= fold.sum[..., :, None] * total[..., None, :] / max(fold.count, 1)
        cross[k][np.diagonal(matrix, axis1=-2, axis2=-1) == 0] = 0.0  # inputs that do not vary
        folds.append(Fold(matrix, np.zeros_like(fold.sum), fold.count))
    centred = Gram.from_folds((folds[0], folds[1]))
    q = solve(W, centred, bits, cross=_of_folds(cross, gram), **options)
    mean = seen.sums.sum(axis=0) / gram.count
    shift = combined(mean, W) - combined(gram.mean, q.dequantize())
    return dataclasses.replace(q, bias_shift=shift.astype(np.float32))


def _of_folds(cross: Float64, gram: Gram) -> Float64:
    """Matrix of each fold, or their sum where only one has seen anything."""
    return cross if all(fold.count for fold in gram.folds) else cross.sum(axis=0)


class _Stopped(BaseException):
    """Ends a run that is not needed any more."""


class _Run:
    """One batch in one model, in a thread that stops at each layer; one thread runs at a time.

    It waits `at` a layer, with the `input` and what is `extra`; None once the batch is through.
    """

    def __init__(self, model: Model, batch: Any, wanted: list[str]) -> None:
        self.at: str | None = None
        self.input: Any = None
        self.extra: tuple[Any, ...] = ()
        self.version = 0
        self.batch = batch
        self._model, self._wanted, self._over = model, wanted, False
        self._error: BaseException | None = None
        self._go, self._here = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._begun = False

    def go_on(self, names: Collection[str], stay: bool = False) -> None:
        """Run up to the next layer with one of these names; with `stay`, not if it is at one."""
        if stay and self.at in names:
            return
        while not self._over:
            self._step()
            if self.at is None or self.at in names:
                return

    def stop(self) -> None:
        """End the thread."""
        if self._begun and not self._over:
            self._over = True
            with contextlib.suppress(Exception):  # whatever the model makes of that
                self._step()

    def _step(self) -> None:
        self.at, self.input, self.extra = None, None, ()
        if not self._begun:
            self._begun = True
            self._thread.start()
        self._go.release()
        self._here.acquire()
        if self._error is not None and not isinstance(self._error, _Stopped):
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        self._go.acquire()
        try:
            with self._model.evaluating():
                self._model.run_in_steps(self.batch, self._observe, self._wanted)
        except BaseException as error:  # the thread that waits raises it
            self._error = error
        self._over = True
        self._here.release()

    def _observe(self, layer: WeightLayer, x: Any, *extra: Any) -> None:
        if threading.current_thread() is not self._thread:
            return  # the model tells all runs of every input
        self.version = self._model.version(x)
        self.at, self.input, self.extra = layer.name, x, extra
        self._here.release()
        self._go.acquire()
        if self._over:
            raise _Stopped


class _Sample(NamedTuple):
    """A batch in the model that is being quantized, and in the float one."""

    number: int
    own: _Run
    exact: _Run


@contextlib.contextmanager
def _started(model: Model, exact: Model, batches: Iterable[Any], wanted: list[str]) -> Iterator[list[_Sample]]:
    """Runs of all batches through both models, up to the wanted layers."""
    samples = [
        _Sample(number, _Run(model, batch, wanted), _Run(exact, batch, wanted)) for number, batch in enumerate(batches)
    ]
    if not samples:
        raise checks.InputError("`batches` must hold at least one batch, got none.")
    try:
        yield samples
    finally:
        for sample in samples:
            sample.own.stop()
            sample.exact.stop()
