"""The multiple-choice knapsack problem, solved exactly: one choice for each layer, the least cost in so many bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

#: Relative rounding of sums of costs: what is within it of a bound is not given up.
ROUNDING = 1e-12


class Curve(NamedTuple):
    """Choices of a layer: bytes and cost of each."""

    sizes: Int64
    costs: Float64


class _States(NamedTuple):
    """Choices for the first layers: bytes and cost of each combination, whose last choice and predecessor they have."""

    sizes: Int64
    costs: Float64
    choice: npt.NDArray[np.intp]
    before: npt.NDArray[np.intp]

    def at(self, some: npt.NDArray[Any]) -> _States:
        return _States(*(values[some] for values in self))


def best_choices(curves: Sequence[Curve], budget: int) -> list[int]:
    """Choice of each layer with the least sum of costs among those whose bytes do not exceed the budget, exactly.

    Dynamic programming over the layers keeps the combinations that no other one beats in both bytes and cost. A price
    `p` of a byte bounds what can come of one: a layer costs, its bytes paid for, at least ``min(cost + p size)``, so
    all layers cost at least the sum of that less p times the budget. What lies above a known solution by that is given
    up, which at the right price leaves few.
    """
    price, known = _price(curves, budget)
    paid = [curve.costs + price * curve.sizes for curve in curves]
    least = np.array([values.min() for values in paid])
    rest = np.append(least[::-1].cumsum()[::-1], 0.0)
    spare = np.append(np.cumsum([curve.sizes.min() for curve in reversed(curves)])[::-1], 0)
    upper = math.fsum(curve.costs[choice] for curve, choice in zip(curves, known, strict=True))
    slack = ROUNDING * (upper + price * budget + float(sum(np.abs(values).max() for values in paid)))
    zero = np.zeros(1, np.intp)
    states, history = _States(np.zeros(1, np.int64), np.zeros(1), zero, zero), []
    for number, curve in enumerate(curves, start=1):
        states = _extended(states, curve)
        bound = states.costs + price * (states.sizes - budget) + rest[number]
        states = states.at((states.sizes + spare[number] <= budget) & (bound <= upper + slack))
        states = _undominated(states)
        history.append(states)
    place = len(states.costs) - 1  # of those that no other beats, the largest costs least
    chosen = []
    for states in reversed(history):
        chosen.append(int(states.choice[place]))
        place = states.before[place]
    return chosen[::-1]


def _extended(states: _States, curve: Curve) -> _States:
    """Every combination with every choice of one more layer."""
    sizes, costs = states.sizes[:, None] + curve.sizes, states.costs[:, None] + curve.costs
    before, choice = np.indices(sizes.shape)
    return _States(sizes.ravel(), costs.ravel(), choice.ravel(), before.ravel())


def _undominated(states: _States) -> _States:
    """Those that cost less than all that are no larger, by size."""
    states = states.at(np.lexsort((states.costs, states.sizes)))
    least_before = np.append(np.inf, np.minimum.accumulate(states.costs)[:-1])
    return states.at(states.costs < least_before)


def _price(curves: Sequence[Curve], budget: int) -> tuple[float, list[int]]:
    """Price of a byte at which the layers' own best choices just fit into the budget, and a solution made from these.

    The solution spends what is left on what still fits.
    """
    low, high = 0.0, 1.0
    chosen = _at_price(curves, low)
    if _size(curves, chosen) <= budget:
        return low, chosen
    while _size(curves, _at_price(curves, high)) > budget and high < 1e300:
        low, high = high, 2 * high
    smallest = [int(np.lexsort((curve.costs, curve.sizes))[0]) for curve in curves]
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _size(curves, _at_price(curves, middle)) > budget else (low, middle)
    chosen = _at_price(curves, high)
    return high, _filled(curves, chosen if _size(curves, chosen) <= budget else smallest, budget)


def _at_price(curves: Sequence[Curve], price: float) -> list[int]:
    """What is best for each layer by itself at that price of a byte; of equals the smallest."""
    return [int(np.lexsort((curve.sizes, curve.costs + price * curve.sizes))[0]) for curve in curves]


def _filled(curves: Sequence[Curve], chosen: list[int], budget: int) -> list[int]:
    """The same with better choices where there is room for them."""
    left = budget - _size(curves, chosen)
    for number, curve in enumerate(curves):
        fits = np.flatnonzero(curve.sizes - curve.sizes[chosen[number]] <= left)
        better = int(fits[np.argmin(curve.costs[fits])])
        left -= int(curve.sizes[better] - curve.sizes[chosen[number]])
        chosen[number] = better
    return chosen


def _size(curves: Sequence[Curve], chosen: list[int]) -> int:
    return sum(int(curve.sizes[choice]) for curve, choice in zip(curves, chosen, strict=True))
