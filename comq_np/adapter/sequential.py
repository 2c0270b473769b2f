"""Layer after layer: each is calibrated on what the layers before it, which are quantized already, make of the batches.

All batches run through two models at once, the one that is being quantized and a float copy, each in a thread of its
own that waits at the next layer. So every batch runs once through either, whatever the model does between its layers,
and no more is in memory than what the models hold at one layer.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from comq_np import checks, tasks
from comq_np.adapter.capture import choose
from comq_np.adapter.inputs import ActivationBits, ActivationOptions, Activations, activations, check_inputs
from comq_np.adapter.interface import Model, Select, WeightLayer
from comq_np.channels import InputGrid
from comq_np.counts import TokenCounts
from comq_np.crossgram import CrossGram
from comq_np.gram import Gram
from comq_np.pipeline import Reports
from comq_np.result import Solved, SolveReport
from comq_np.solver import solve
from comq_np.widths import layer_bits


def quantize_in_sequence(
    model: Model,
    batches: Iterable[Any],
    bits: int | Mapping[str, int] = 4,
    layers: Iterable[str] | None = None,
    *,
    select: Select | None = None,
    activation_bits: ActivationBits = None,
    activation_options: ActivationOptions = None,
    fit_bias: bool = True,
    strict: bool = False,
    progress: bool = False,
    **options: Any,
) -> Reports:
    """Quantize a model layer after layer, each on the inputs that it gets from the quantized ones before it.

    The codes are to give the outputs that the float model has: with X~ the inputs from the quantized model and X those
    of the float one, they minimise ``||X~ Wq - X W||**2`` (`comq_np.matched_weights`), and the bias takes up the mean
    of what is left. With `activation_bits`, X~ are quantized, too, by the grid of their histogram.

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
    activation_bits : int from 2 to 8, or mapping from str to such an int, optional
        Bits of the inputs of layers, as in `capture`.
    activation_options : mapping, optional
        Options of `comq_np.activation_grid`.
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
    inputs = activations(activation_bits, activation_options, chosen, skipped)
    for layer in chosen:
        with checks.layer(layer.name):
            layer.check_writable()
            if layer.name in inputs.bits:
                check_inputs(layer)
    widths = layer_bits(bits, [layer.name for layer in chosen], skipped=skipped)
    for width in set(widths.values()):
        tasks.check({**options, "bits": width})
    exact = model.copy()
    reports: dict[str, SolveReport] = {}
    kept: dict[str, str] = {}
    wanted = [layer.name for layer in chosen]
    with model.evaluating(), exact.evaluating(), _started(model, exact, batches, wanted) as samples:
        steps = _Steps(chosen, samples, select, inputs)
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


class _Steps:
    """The layers that batches wait at, first to last; after each, those that waited there go on."""

    def __init__(
        self, layers: list[WeightLayer], samples: list[_Sample], select: Select | None, inputs: Activations
    ) -> None:
        self._order = {layer.name: number for number, layer in enumerate(layers)}
        self._layers, self._samples, self._select, self._inputs = layers, samples, select, inputs
        self._last: tuple[Hashable, list[Any], CrossGram | TokenCounts] | None = None

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

    def seen(self, layer: WeightLayer) -> CrossGram | TokenCounts:
        """What the layer gets; that of the layer before, if it is the very same."""
        here = [sample for sample in self._samples if sample.own.at == layer.name]
        inputs = [run.input for sample in here for run in (sample.own, sample.exact)]
        versions = tuple(run.version for sample in here for run in (sample.own, sample.exact))
        key = versions, layer.geometry, self._inputs.bits.get(layer.name), layer.channels
        if self._last is not None:
            same_inputs = len(inputs) == len(self._last[1]) and all(map(operator.is_, inputs, self._last[1]))
            if key == self._last[0] and same_inputs and -1 not in versions:
                return self._last[2]
        self._last = key, inputs, self._gathered(layer, here)
        return self._last[2]

    def _gathered(self, layer: WeightLayer, here: list[_Sample]) -> CrossGram | TokenCounts:
        gram = layer.gram()
        if isinstance(gram, Gram):
            grid = self._grid(layer, here) if layer.name in self._inputs.bits else None
            gram = CrossGram(len(gram), gram.problems, grid)
        for sample in here:
            with _in_batch(sample):
                self._add(layer, sample, gram)
        return gram

    def _grid(self, layer: WeightLayer, here: list[_Sample]) -> InputGrid:
        """Codes for what the layer gets in the quantized model."""
        histogram = self._inputs.empty(layer)
        for sample in here:
            with _in_batch(sample):
                for half in layer.halves(sample.own.input, self._chosen(sample.own), *sample.own.extra):
                    for part in layer.rows(half, *sample.own.extra) if len(half) else ():
                        histogram.update(part)
        return self._inputs.solve(layer.name, histogram)

    def _add(self, layer: WeightLayer, sample: _Sample, gram: CrossGram | TokenCounts) -> None:
        """Add what the layer gets in one batch; where the float model has taken another way, it stands for both."""
        own, exact = sample.own, sample.exact
        both = own, exact if exact.at == layer.name and exact.input.shape == own.input.shape else own
        halves = [layer.halves(run.input, self._chosen(run), *run.extra) for run in both]
        for number, parts in enumerate(zip(*halves, strict=True), start=sample.number):
            if len(parts[0]):
                rows = (layer.rows(part, *run.extra) for run, part in zip(both, parts, strict=True))
                for part, other in zip(*rows, strict=True):
                    others = {} if isinstance(gram, TokenCounts) else {"exact": other}
                    gram.update(part, fold=number % 2, **others)

    def _chosen(self, run: _Run) -> Any:
        return run.input if self._select is None else self._select(run.input, run.batch)


@contextlib.contextmanager
def _in_batch(sample: _Sample) -> Iterator[None]:
    """Put the number of a batch before the message of what is refused inside."""
    try:
        yield
    except checks.InputError as error:
        raise checks.InputError(f"batch {sample.number}: {error}") from None


def _solved(
    layer: WeightLayer, gram: CrossGram | TokenCounts, bits: int, fit_bias: bool, options: dict[str, Any]
) -> Solved:
    """Codes for what a layer has seen."""
    W, _ = layer.arrays()
    fit_bias = fit_bias and layer.has_bias and isinstance(gram, CrossGram)
    q: Solved = solve(W, gram, bits, fit_bias=fit_bias, **options)
    return q


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
