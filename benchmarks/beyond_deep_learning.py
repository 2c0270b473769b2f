"""Is `solve` of use outside deep learning? Filter coefficients, integer least squares and sensor tables.

    python benchmarks/beyond_deep_learning.py --json beyond.json

Three kinds of problem, all ``min ||X @ Wq - X @ W||**2`` over codes:

`fir_*`: coefficients of linear-phase low-pass filters (scipy.signal `remez` and `firls`), for six pass bands each.
Signed codes on the power of two that holds the largest coefficient, or, in the cases `*_gain`, on any scale, which a
gain behind the filter takes up. `mean_square_error` and `peak_error` are those of the response against the float
filter's, over pass and stop band with the weights of the design: geometric means over the filters. `stopband_db` is the
mean attenuation, `float_stopband_db` that of the float filters.

`ils_<size>_<noise>`: integer least squares ``min ||A @ x - y||`` over x in {0, 1, 2, 3}, for four square Gaussian A and
16 right-hand sides each: y is A times a random x, and noise so many dB below. `rtn` rounds the real solution.
`true_share` says how often the x behind y is found, and `mean_square_error` is that of ``A @ x - y``.

`lut_33` and `poly_8`: temperatures from the readings of 16 thermistors, each with a table of 33 entries, between which
one interpolates, or the 8 coefficients of a polynomial; all share one scale. The Gram is that of readings in use, among
which mild temperatures are frequent. `rms_error` and `peak_error` are those of the temperature in K, on other readings
in use, `float_rms_error` and `float_peak_error` those of the unrounded tables.

`babai` is one pass of Babai's nearest plane in the order `pivoted`, the classical detector. `exact` has the best codes
on the grid of the recipe before it: by brute force where that is possible for integer least squares, by `certify`
otherwise. `objective_over_exact` is the geometric mean of the objective over that of `exact`, and `optimal_share` the
share of columns that are no worse than a proven optimum: in the row `exact`, the share that was proven.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.signal

import comq_np
from comq_np.table import Figures

Array = npt.NDArray[np.float64]

BABAI = comq_np.Recipe("babai", ("minmax",), order="pivoted", start="babai", sweeps=0, refit=False)
RECIPES = ("rtn", BABAI, "balanced", "best")
NODES = 500_000
#: An objective that is above another by less than this share is no worse.
CLOSE = 1e-6

FILTERS = (("remez", 8), ("firls", 15), ("remez", 31), ("firls", 63), ("remez", 128))
FILTER_BITS = (4, 8, 12)
PASS_BANDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
TRANSITION, STOP_WEIGHT = 0.1, 10.0

SIZES, NOISES, MATRICES, COLUMNS, BRUTE_FORCE = (4, 8, 16, 32, 64), (25, 15), 4, 16, 2**16

SENSORS, SAMPLES, TABLE_BITS = 16, 2000, (8, 10, 12)
THERMISTOR = ((10e3, 0.03), (3950.0, 0.01))  # resistance at 25 °C and B, each with its tolerance
COLDEST, HOTTEST, KELVIN, RESISTOR = -20.0, 85.0, 273.15, 10e3


class Result(NamedTuple):
    """Weights that a recipe, or the exact search, came to, the objective of each column, and which ones are proven."""

    recipe: str
    Wq: Array
    objective: Array
    proven: npt.NDArray[np.bool_]


def side_by_side(parts: Sequence[Result]) -> Result:
    """What one recipe came to in several problems of one shape, their columns in a row."""
    _, Wq, objective, proven = zip(*parts, strict=True)
    return Result(parts[0].recipe, np.hstack(Wq), np.concatenate(objective), np.concatenate(proven))


def geometric_mean(values: npt.ArrayLike) -> float:
    return float(np.exp(np.log(values).mean()))


def judged(results: list[Result]) -> Iterator[tuple[Result, dict[str, float]]]:
    """Each result, and how it compares with the last one, the exact."""
    exact = results[-1]
    for result in results:
        ratio = result.objective / exact.objective
        optimal = exact.proven & (ratio <= 1 + CLOSE)
        yield result, {"objective_over_exact": geometric_mean(ratio), "optimal_share": float(optimal.mean())}


def solved(
    W: Array,
    G: Array,
    bits: int,
    objective: Callable[[Array], Array],
    **options: object,
) -> list[Result]:
    """Result of every recipe, and the best codes on the last one's grid."""
    results, q = [], None
    for recipe in RECIPES:
        q = comq_np.solve(W, G, bits, recipe=recipe, **options)
        Wq = q.dequantize().astype(np.float64)
        results.append(Result(q.report.recipe, Wq, objective(Wq), np.zeros(W.shape[1], dtype=bool)))
    proof = comq_np.certify(W, G, q, node_limit=NODES)
    Wq = dataclasses.replace(q, codes=proof.codes).dequantize().astype(np.float64)
    return [*results, Result("exact", Wq, objective(Wq), proof.optimal)]


class Filter(NamedTuple):
    """Distinct taps W (half, 1), what gives their weighted response at each frequency, and which ones are stopped."""

    W: Array
    X: Array
    stopped: npt.NDArray[np.bool_]

    def stopband_db(self, W: Array) -> float:
        """Attenuation of the stop band."""
        return float(-20 * np.log10(np.abs(self.X[self.stopped] @ W).max() / STOP_WEIGHT))


def design(kind: str, taps: int, pass_band: float) -> Filter:
    """Low-pass filter, band edges in units of half the sampling rate."""
    edges, stop_band = [0, pass_band, pass_band + TRANSITION, 1], pass_band + TRANSITION
    if kind == "remez":
        h = scipy.signal.remez(taps, edges, [1, 0], weight=[1, STOP_WEIGHT], fs=2)
    else:  # whose weights are those of the squared error
        h = scipy.signal.firls(taps, edges, [1, 1, 0, 0], weight=[1, STOP_WEIGHT**2], fs=2)
    frequencies = np.linspace(0, 1, 16 * taps + 1)
    frequencies = frequencies[(frequencies <= pass_band) | (frequencies >= stop_band)]
    stopped = frequencies >= stop_band
    delays = (taps - 1) / 2 - np.arange((taps + 1) // 2)  # from the middle, where an odd number of taps has its last
    response = np.where(delays == 0, 1, 2) * np.cos(np.pi * np.outer(frequencies, delays))
    return Filter(h[: len(delays), None], np.where(stopped, STOP_WEIGHT, 1.0)[:, None] * response, stopped)


def power_of_two(W: Array, bits: int) -> float:
    """Least power of two on which signed codes hold all weights."""
    return float(2 ** np.ceil(np.log2(np.abs(W).max() / (2 ** (bits - 1) - 1))))


def filter_results(one: Filter, bits: int, gain: bool) -> list[Result]:
    """Results for one filter, on a power of two or with a free gain."""
    options = {} if gain else {"scale": power_of_two(one.W, bits)}

    def objective(Wq: Array) -> Array:
        return np.square(one.X @ (Wq - one.W)).sum(axis=0)

    return solved(one.W, one.X.T @ one.X, bits, objective, symmetric=True, **options)


def add_filters(figures: Figures, kind: str, taps: int, bits: int, gain: bool) -> None:
    """Figures of the filters of one kind and length."""
    filters = [design(kind, taps, pass_band) for pass_band in PASS_BANDS]
    results = [filter_results(one, bits, gain) for one in filters]
    for result, comparison in judged([side_by_side(parts) for parts in zip(*results, strict=True)]):
        rounded = np.split(result.Wq, len(filters), axis=1)
        errors = [one.X @ (Wq - one.W) for one, Wq in zip(filters, rounded, strict=True)]
        figures.add(
            f"fir_{kind}_{taps}" + "_gain" * gain,
            bits,
            result.recipe,
            mean_square_error=geometric_mean([np.square(error).mean() for error in errors]),
            peak_error=geometric_mean([np.abs(error).max() for error in errors]),
            stopband_db=float(np.mean([one.stopband_db(Wq) for one, Wq in zip(filters, rounded, strict=True)])),
            float_stopband_db=float(np.mean([one.stopband_db(one.W) for one in filters])),
            **comparison,
        )


class Integers(NamedTuple):
    """Integer least squares ``min ||A @ x - y||``: A (m, m), x (m, columns) that were sent, and y."""

    A: Array
    x: Array
    y: Array

    def objective(self, x: Array) -> Array:
        """``||A @ x - y||**2`` of each column."""
        return np.square(self.A @ x - self.y).sum(axis=0)


def integers(size: int, noise: int, seed: int, bits: int = 2) -> Integers:
    """Problem with that many unknowns, and noise so many dB below what the x vary by about their mean."""
    rng = np.random.default_rng([size, noise, seed])
    A = rng.normal(size=(size, size))
    x = rng.integers(0, 2**bits, size=(size, COLUMNS)).astype(np.float64)
    power = size * (4**bits - 1) / 12
    return Integers(A, x, A @ x + np.sqrt(power / 10 ** (noise / 10)) * rng.normal(size=x.shape))


def brute_force(problem: Integers, levels: int) -> Array:
    """Best x in the box 0 ... levels - 1, of all of them."""
    box = np.array(list(itertools.product(range(levels), repeat=len(problem.A))), dtype=np.float64).T
    image = problem.A @ box
    return box[:, (np.square(image).sum(axis=0) - 2 * problem.y.T @ image).argmin(axis=1)]


def integer_results(problem: Integers, bits: int = 2) -> list[Result]:
    """Results for all columns: the codes are x, since scale is 1 and zero point 0."""
    W, G = np.linalg.solve(problem.A, problem.y), problem.A.T @ problem.A
    results = solved(W, G, bits, problem.objective, scale=1.0, zero_point=0)
    if 2 ** (bits * len(W)) > BRUTE_FORCE:
        return results
    x = brute_force(problem, 2**bits)
    return [*results[:-1], Result("exact", x, problem.objective(x), np.ones(x.shape[1], dtype=bool))]


def add_integers(figures: Figures, size: int, noise: int, bits: int = 2) -> None:
    """Figures of integer least squares of one size and noise."""
    problems = [integers(size, noise, seed, bits) for seed in range(MATRICES)]
    results = [integer_results(problem, bits) for problem in problems]
    sent = np.hstack([problem.x for problem in problems])
    for result, comparison in judged([side_by_side(parts) for parts in zip(*results, strict=True)]):
        figures.add(
            f"ils_{size}_{noise}dB",
            bits,
            result.recipe,
            mean_square_error=float(result.objective.mean() / size),
            true_share=float((result.Wq == sent).all(axis=0).mean()),
            **comparison,
        )


class Sensors(NamedTuple):
    """Coefficients W (m, sensors), Gram of the basis in use, and the basis at other readings (sensors, samples, m)."""

    W: Array
    gram: comq_np.Gram
    basis: Array
    temperature: Array

    def errors(self, W: Array) -> Array:
        """Error of the temperature, (sensors, samples)."""
        return np.einsum("jki,ij->jk", self.basis, W) - self.temperature


def hats(x: Array, count: int) -> Array:
    """What each of so many equally spaced table entries has in the linear interpolation at x, from 0 to 1."""
    return np.maximum(0, 1 - np.abs((count - 1) * x[..., None] - np.arange(count)))


def powers(x: Array, count: int) -> Array:
    """Powers of x, from 0 to 1, about its middle."""
    return (2 * x[..., None] - 1) ** np.arange(count)


BASES = {"lut_33": (hats, 33), "poly_8": (powers, 8)}


def sensors(basis: Callable[[Array, int], Array], count: int) -> Sensors:
    """Thermistors in dividers: fitted in baths of all temperatures, used where mild ones are frequent."""
    rng = np.random.default_rng(0)
    resistance, b = (middle * (1 + tolerance * rng.uniform(-1, 1, (SENSORS, 1))) for middle, tolerance in THERMISTOR)

    def reading(temperature: Array) -> Array:
        part = resistance * np.exp(b * (1 / (temperature + KELVIN) - 1 / (25 + KELVIN))) / RESISTOR
        return part / (1 + part)

    ends = reading(np.array([[HOTTEST, COLDEST]]))
    low, high = ends.min(), ends.max()
    baths = np.linspace(COLDEST, HOTTEST, SAMPLES)
    in_use = COLDEST + (HOTTEST - COLDEST) * rng.beta(2, 3, size=(2, SENSORS, SAMPLES))
    fit, use, other = (basis((reading(t) - low) / (high - low), count) for t in (baths, *in_use))
    gram = comq_np.Gram(count)
    gram.update(use)
    W = np.stack([np.linalg.lstsq(X, baths)[0] for X in fit], axis=1)
    return Sensors(W, gram, other, in_use[1])


def add_sensors(figures: Figures, name: str, bits: int) -> None:
    """Figures of the bank of thermistors, each with coefficients in one basis, on a scale that all share."""
    bank = sensors(*BASES[name])
    G = bank.gram.matrix
    exact = bank.errors(bank.W)

    def objective(Wq: Array) -> Array:
        return np.einsum("ij,ij->j", Wq - bank.W, G @ (Wq - bank.W))

    for result, comparison in judged(solved(bank.W, G, bits, objective, group_size="tensor")):
        errors = bank.errors(result.Wq)
        figures.add(
            name,
            bits,
            result.recipe,
            rms_error=float(np.sqrt(np.square(errors).mean())),
            float_rms_error=float(np.sqrt(np.square(exact).mean())),
            peak_error=float(np.abs(errors).max()),
            float_peak_error=float(np.abs(exact).max()),
            **comparison,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    figures = Figures()
    for kind, taps in FILTERS:
        for bits in FILTER_BITS:
            add_filters(figures, kind, taps, bits, gain=False)
    for bits in FILTER_BITS:
        add_filters(figures, "remez", 31, bits, gain=True)
    for size, noise in itertools.product(SIZES, NOISES):
        add_integers(figures, size, noise)
    for name, bits in itertools.product(BASES, TABLE_BITS):
        add_sensors(figures, name, bits)
    figures.show(options.json)


if __name__ == "__main__":
    main()
