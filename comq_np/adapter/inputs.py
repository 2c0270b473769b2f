"""Which inputs of layers are quantized, to how many bits, and on which grids."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from comq_np import checks, widths
from comq_np.activations import LEAST_BITS, MOST_BITS, Histogram, activation_grid
from comq_np.adapter.interface import EMBEDDING, WeightLayer
from comq_np.adapter.sharing import New
from comq_np.channels import SIDE, ChannelHistogram, InputGrid, channel_grid
from comq_np.checks import InputError
from comq_np.crossgram import CrossGram

#: Bits of the inputs of all layers, or of those whose names match a pattern.
ActivationBits = int | Mapping[str, int] | None
#: Options of `activation_grid`, and the "axis" that scales are along.
ActivationOptions = Mapping[str, Any] | None
#: What finds the grid of a layer.
AnyHistogram = Histogram | ChannelHistogram
#: Option that says along what scales are, and its value for one of each channel.
AXIS, CHANNEL = "axis", "channel"


@dataclasses.dataclass
class Activations:
    """Bits of the inputs of layers by their names, what the user asks for beside, and the grids that are known."""

    bits: dict[str, int]
    options: dict[str, Any]
    grids: dict[str, InputGrid] = dataclasses.field(default_factory=dict)

    def solve(self, name: str, histogram: AnyHistogram) -> InputGrid:
        """Find the grid of a layer."""
        options = {key: value for key, value in self.options.items() if key != AXIS}
        if isinstance(histogram, ChannelHistogram):
            self.grids[name] = channel_grid(histogram, self.bits[name], **options)
        else:
            self.grids[name] = activation_grid(histogram, self.bits[name], **options)
        return self.grids[name]

    def empty(self, layer: WeightLayer) -> AnyHistogram:
        """Histogram of no inputs yet: one for each channel, where that is asked for and the weights can absorb it."""
        channels = self._channels(layer)
        return Histogram() if channels is None else ChannelHistogram(channels, _positions(layer, channels))

    def histogram(self, layer: WeightLayer) -> tuple[Hashable, New]:
        """What layers have in common whose inputs are in one histogram, and the histogram of none."""
        new = layer.gram if layer.kind == EMBEDDING else functools.partial(self.empty, layer)
        return (layer.geometry, self._channels(layer)), new

    def histogram_bytes(self, layers: Iterable[WeightLayer]) -> int:
        """Bytes of the histograms of these layers, and of one more, which is merged into its own."""
        channels = [self._channels(layer) for layer in layers]
        sizes = [Histogram.nbytes if each is None else 2 * 2 * SIDE * 8 * each for each in channels]
        return sum(sizes) + max(sizes)

    def _channels(self, layer: WeightLayer) -> int | None:
        return layer.channels if self.options.get(AXIS) == CHANNEL else None

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
    layers = list(layers)
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
    if given.get(AXIS) == CHANNEL and not any(layer.channels for layer in layers if layer.name in found):
        raise InputError(
            f"`activation_options` must not have {AXIS!r} {CHANNEL!r} where no layer has weights that can absorb the "
            f"scales, got {given!r}."
        )
    return Activations(found, given)


def _check(options: dict[str, Any]) -> None:
    """Refuse options that `activation_grid` does."""
    histogram = Histogram()
    histogram.update([1.0])
    others = {key: value for key, value in options.items() if key != AXIS}
    try:
        checks.choice(AXIS, options.get(AXIS, "tensor"), ("tensor", CHANNEL))
        activation_grid(histogram, LEAST_BITS, **others)
    except (InputError, TypeError) as error:
        raise InputError(f"`activation_options` must be options of `activation_grid`: {error}") from None


def _positions(layer: WeightLayer, channels: int) -> int:
    """Rows of W for each channel."""
    return math.prod(layer.shape[:-1]) // channels


def check_inputs(layer: WeightLayer) -> None:
    """Refuse a layer whose inputs cannot be quantized."""
    if not layer.quantizes_inputs:
        raise InputError("must have float inputs, as models of this framework have no others here (`activation_bits`).")
