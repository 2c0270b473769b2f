"""Which inputs of layers are quantized, to how many bits, and on which grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from comq_np import widths
from comq_np.activations import LEAST_BITS, MOST_BITS, ActivationGrid, Histogram, activation_grid
from comq_np.adapter.interface import EMBEDDING, WeightLayer
from comq_np.adapter.sharing import New
from comq_np.checks import InputError
from comq_np.crossgram import CrossGram

#: Bits of the inputs of all layers, or of those whose names match a pattern.
ActivationBits = int | Mapping[str, int] | None
#: Options of `activation_grid`.
ActivationOptions = Mapping[str, Any] | None


@dataclasses.dataclass
class Activations:
    """Bits of the inputs of layers by their names, options of `activation_grid`, and the grids that are known."""

    bits: dict[str, int]
    options: dict[str, Any]
    grids: dict[str, ActivationGrid] = dataclasses.field(default_factory=dict)

    def solve(self, name: str, histogram: Histogram) -> ActivationGrid:
        """Find the grid of a layer."""
        grid = self.grids[name] = activation_grid(histogram, self.bits[name], **self.options)
        return grid

    def histogram(self, layer: WeightLayer) -> tuple[Hashable, New]:
        """What layers have in common whose inputs are in one histogram, and the histogram of none."""
        return layer.geometry, layer.gram if layer.kind == EMBEDDING else Histogram

    def gram(self, layer: WeightLayer) -> tuple[Hashable, New]:
        """What layers have in common that share a Gram, if their inputs are the same, and the Gram of none."""
        grid = self.grids.get(layer.name)
        if grid is None:
            return (layer.geometry, None), layer.gram
        *problems, m, _ = layer.shape
        return (layer.geometry, grid), lambda: CrossGram(m, problems[0] if problems else None, grid)


def activations(
    bits: ActivationBits, options: ActivationOptions, layers: Iterable[WeightLayer], skipped: Iterable[str]
) -> Activations:
    """What a user asks for, checked; embeddings have no inputs to quantize."""
    if options is not None and (bits is None or not isinstance(options, Mapping)):
        what = "None without `activation_bits`" if bits is None else "a mapping of options of `activation_grid`"
        raise InputError(f"`activation_options` must be {what}, got {options!r}.")
    given = dict(options or {})
    if bits is None:
        return Activations({}, given)
    kinds = {layer.name: layer.kind for layer in layers}
    chosen = widths.patterns(bits, "activation_bits", LEAST_BITS, MOST_BITS)
    for pattern in chosen:
        if not any(widths.matches(name, pattern) for name in (*kinds, *skipped)):
            raise InputError(
                f"`activation_bits` must hold names of layers or patterns that match some, got {pattern!r}."
            )
    _check(given)
    found = {}
    for name, kind in kinds.items():
        matching = [width for pattern, width in chosen.items() if widths.matches(name, pattern)]
        if matching and kind != EMBEDDING:
            found[name] = matching[-1]
    return Activations(found, given)


def _check(options: dict[str, Any]) -> None:
    """Refuse options that `activation_grid` does."""
    histogram = Histogram()
    histogram.update([1.0])
    try:
        activation_grid(histogram, LEAST_BITS, **options)
    except (InputError, TypeError) as error:
        raise InputError(f"`activation_options` must be options of `activation_grid`: {error}") from None


def check_inputs(layer: WeightLayer) -> None:
    """Refuse a layer whose inputs cannot be quantized."""
    if not layer.quantizes_inputs:
        raise InputError("must have float inputs, as models of this framework have no others here (`activation_bits`).")
