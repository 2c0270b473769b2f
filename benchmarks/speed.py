"""How long does a solve take, in products `G @ W`? Recipes and peers, their stages, threads, and how the time grows.

    python benchmarks/speed.py --json speed.json
    python benchmarks/speed.py --case 1536x384 --recipe balanced ort_gptq torch_gptq --threads 2

The floor is one float32 product by the BLAS that NumPy uses, with as many threads as the solve has: `products` is the
time of a solve over that of the product. Both are taken in turn, each the fastest of `--repeat`, once all is compiled,
on layers made up by `problems.py`. `products_median` is the median of each solve over the product just before it: a
moment in which a core is fast, as others leave it alone, is long enough for a product and may never last for a solve.
`relative_error` is ``||X Wq - X W||**2 / ||X W||**2``. Run it on an idle machine.
How idle it was, `product_spread` tells, the slowest time of the product over the fastest, and on Linux `other_load`,
the cores that other processes kept busy meanwhile: threads that wait for each other, as those of BLAS do, lose far more
by it than the tiles of a solve, so that `products` is too low then.

- A size `MxN` is W (m, n) and G (m, m), a plain float32 array. A row for the most threads; for fewer, the case is named
  `MxN_threads_T`, and `thread_speedup` is the time with the fewest over that with the most. `products_STAGE` are the
  shares of the stages, those of the fastest solve, which add up to it; `products_first_sweep` is the first sweep alone.
- A batch `BxMxN` has b such problems in one call; `speedup_one_call` is the time of b calls over that. Recipes only.
- `shrinkage`: as `products_shrinkage`, what choosing it adds to a solve with a `Gram` at 2048 x 2048. Recipes only.
- `growth`: the time as ``m**exponent_m * n**exponent_n``, fitted to nine sizes from 512 to 2048.

`ort_gptq` and `keras_gptq` are those of `peers.py`, from the extra `test`, `torch_gptq` is GPTQ in plain PyTorch;
what is not installed is left out. All of them get float32. `balanced-128` is the recipe with a scale for each group of
128 rows of a column.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import threadpoolctl
from tqdm import tqdm

import comq_np
import peers
import problems
from comq_np.table import Figures
from stopwatch import Task, Timing, busy_seconds, limited

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

RECIPES = ("fast", "balanced", "best", "paper", "rtn")
PEERS: dict[str, Callable[..., Any]] = {**peers.PEERS, "torch_gptq": peers.torch_gptq}
SOME = ("fast", "balanced", *PEERS)
#: Cases of a full run, and what runs there unless `--recipe` says otherwise.
CASES: dict[str, tuple[str, ...]] = {
    "384x1536": SOME,
    "1536x384": SOME,
    "768x768": ("paper",),
    "768x3072": (*SOME, "balanced-128"),
    "2048x2048": (*SOME, "balanced-128"),
    "4096x4096": SOME,
    "672x9x1": ("fast", "balanced"),
    "shrinkage": ("balanced",),
    "growth": ("fast", "balanced"),
}
SHRINKAGE = (2048, 2048)
GROWTH = tuple(itertools.product((512, 1024, 2048), repeat=2))
#: Most problems, rows and columns of what is solved before the clock runs, for everything to be compiled and loaded.
WARM = (4, 64, 48)


@dataclasses.dataclass(frozen=True)
class How:
    """How to measure: numbers of threads in ascending order, and runs, no more of which start after `limit` seconds."""

    bits: int = 4
    threads: tuple[int, ...] = (1,)
    repeat: int = 5
    limit: float = 60


class Layers(NamedTuple):
    """Weights (m, n) and G (m, m), or b of both."""

    W: Float32
    G: Float32


def layers_of(shape: tuple[int, ...]) -> Layers:
    """Layers of a shape, (m, n) or (b, m, n)."""
    *batch, m, n = shape
    if not batch:
        return Layers(problems.weights(m, n), problems.matrix(m))
    made = [(problems.weights(m, n, seed), problems.matrix(m, seed)) for seed in range(*batch)]
    W, G = map(np.stack, zip(*made, strict=True))
    return Layers(W, G)


def warm_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what is solved to warm up for another one."""
    return tuple(map(min, shape, WARM[-len(shape) :]))


class Timings(NamedTuple):
    """Timings of one number of threads."""

    product: Timing
    tasks: dict[str, Timing]

    def products(self, seconds: float) -> float:
        return seconds / self.product.seconds


def alternate(layers: Layers, tasks: dict[str, Task], how: How) -> dict[int, Timings]:
    """Timings for each number of threads, all taken in turn, and the product before every task."""
    found = {threads: Timings(Timing(), {name: Timing() for name in tasks}) for threads in how.threads}
    for _ in range(how.repeat):
        for threads, timings in found.items():
            with limited(threads):
                for name, timing in timings.tasks.items():
                    if timing.spent < how.limit:
                        timings.product.run_product(*layers)
                        timing.run(tasks[name], threads)
                        timing.ratios.append(timing.runs[-1] / timings.product.runs[-1])
    return found


def task_of(name: str, layers: Layers, bits: int) -> Task:
    """Recipe or peer, to be run on those layers."""
    W, G = layers
    if name in PEERS:
        return lambda _: PEERS[name](W, G, bits)
    return lambda threads: comq_np.solve(W, G, bits, **options_of(name), threads=threads)


def options_of(name: str) -> dict[str, Any]:
    """Recipe, and the rows of its groups."""
    recipe, _, rows = name.partition("-")
    return {"recipe": recipe, "group_size": int(rows) if rows else None}


def tasks_of(names: tuple[str, ...], shape: tuple[int, ...], how: How) -> tuple[Layers, dict[str, Task]]:
    """Layers of that shape, and what is to be run on them, warmed up on a small one."""
    layers, small = layers_of(shape), layers_of(warm_shape(shape))
    for name in names:
        for threads in how.threads:
            task_of(name, small, how.bits)(threads)
    return layers, {name: task_of(name, layers, how.bits) for name in names}


def squared_norm(G: Float64, E: Float32) -> float:
    """``||X E||**2``."""
    return float(np.vdot(E, G @ E))


def relative_errors(layers: Layers, timings: Timings) -> dict[str, float]:
    """Error of what each task has found."""
    W, G = layers.W, layers.G.astype(np.float64)
    norm, errors = squared_norm(G, W), {}
    for name, timing in timings.tasks.items():
        Wq = timing.found.dequantize() if isinstance(timing.found, comq_np.QuantizedArray) else timing.found
        errors[name] = squared_norm(G, W - Wq) / norm
    return errors


def product_figures(layers: Layers, product: Timing) -> dict[str, float]:
    """Figures of the product itself."""
    operations = 2 * layers.G.size * layers.W.shape[-1]
    return {
        "seconds": product.seconds,
        "gflops": operations / product.seconds / 1e9,
        "product_spread": product.slowest / product.seconds,
    }


def time_figures(timings: Timings, timing: Timing) -> dict[str, float]:
    """Figures of the time that a task takes."""
    return {
        "products": timings.products(timing.seconds),
        "products_median": statistics.median(timing.ratios),
        "seconds": timing.seconds,
    }


def stage_figures(timings: Timings, timing: Timing) -> dict[str, float]:
    """Shares of the stages, in products."""
    shares = {f"products_{stage}": timings.products(seconds) for stage, seconds in timing.stages.items()}
    return {**shares, "products_first_sweep": timings.products(timing.first.get("sweep", 0.0))}


def thread_speedups(fewest: Timings, most: Timings) -> dict[str, float]:
    """Time with the fewest threads over that with the most, for each task and for the product."""
    found = {name: one.seconds / most.tasks[name].seconds for name, one in fewest.tasks.items()}
    return {**found, "product": fewest.product.seconds / most.product.seconds}


def add_size(figures: Figures, case: str, names: tuple[str, ...], how: How) -> None:
    """Add the figures of one size."""
    layers, tasks = tasks_of(names, shape_of(case), how)
    found = alternate(layers, tasks, how)
    most = how.threads[-1]
    errors, last = relative_errors(layers, found[most]), found[most].tasks
    for threads, timings in reversed(found.items()):
        label = case if threads == most else f"{case}_threads_{threads}"
        for name, timing in timings.tasks.items():
            figures.add(label, how.bits, name, **time_figures(timings, timing), relative_error=errors[name])
    for name, timing in last.items():
        if name not in PEERS:
            figures.add(case, how.bits, name, **stage_figures(found[most], timing))
    if len(found) > 1:
        for name, speedup in thread_speedups(found[how.threads[0]], found[most]).items():
            figures.add(case, how.bits, name, thread_speedup=speedup)
    for threads, timings in reversed(found.items()):
        label = case if threads == most else f"{case}_threads_{threads}"
        figures.add(label, how.bits, "product", **product_figures(layers, timings.product))


def add_batch(figures: Figures, case: str, names: tuple[str, ...], how: How) -> None:
    """Add the figures of many small problems, in one call and in as many calls."""
    how = dataclasses.replace(how, threads=how.threads[-1:])
    layers, tasks = tasks_of(names, shape_of(case), how)
    calls = {f"{name} by calls": one_by_one(name, layers, how.bits) for name in names}
    (timings,) = alternate(layers, {**tasks, **calls}, how).values()
    whole = Timings(timings.product, {name: timings.tasks[name] for name in names})
    errors = relative_errors(layers, whole)
    for name, timing in whole.tasks.items():
        figures.add(
            case,
            how.bits,
            name,
            **time_figures(whole, timing),
            relative_error=errors[name],
            speedup_one_call=timings.tasks[f"{name} by calls"].seconds / timing.seconds,
        )


def one_by_one(name: str, layers: Layers, bits: int) -> Task:
    """Make a call for each problem of a batch."""
    calls = [task_of(name, Layers(W, G), bits) for W, G in zip(*layers, strict=True)]
    return lambda threads: [call(threads) for call in calls]


def add_shrinkage(figures: Figures, shape: tuple[int, int], names: tuple[str, ...], how: How) -> None:
    """Add what choosing the shrinkage takes, over a solve with the same."""
    how = dataclasses.replace(how, threads=how.threads[-1:])
    (m, n), small = shape, warm_shape(shape)
    layers, gram = layers_of(shape), problems.gram(m)
    for name in names:
        solve_shrunk(problems.weights(*small), problems.gram(small[0]), how.bits, name, "auto", how.threads[0])
        share = solve_shrunk(layers.W, gram, how.bits, name, "auto", how.threads[0]).report.shrinkage
        tasks = {
            label: functools.partial(solve_shrunk, layers.W, gram, how.bits, name, value)
            for label, value in (("chosen", "auto"), ("given", share))
        }
        (timings,) = alternate(layers, tasks, how).values()
        chosen, given = (timings.tasks[label].seconds for label in ("chosen", "given"))
        figures.add(
            f"{m}x{n}",
            how.bits,
            name,
            products_shrinkage=timings.products(chosen - given),
            shrinkage=share,
        )


def solve_shrunk(
    W: Float32, gram: comq_np.Gram, bits: int, recipe: str, shrinkage: Any, threads: int
) -> comq_np.QuantizedArray:
    """Solve with a Gram."""
    return comq_np.solve(W, gram, bits, **options_of(recipe), shrinkage=shrinkage, threads=threads)


def add_growth(figures: Figures, shapes: tuple[tuple[int, int], ...], names: tuple[str, ...], how: How) -> None:
    """Add the exponents of m and n in the time, and in that of the product."""
    how = dataclasses.replace(how, threads=how.threads[-1:])
    seconds: dict[str, list[float]] = {name: [] for name in (*names, "product")}
    for shape in shapes:
        (timings,) = alternate(*tasks_of(names, shape, how), how).values()
        for name, timing in {**timings.tasks, "product": timings.product}.items():
            seconds[name].append(timing.seconds)
    for name, found in seconds.items():
        m, n = exponents(shapes, found)
        figures.add("growth", how.bits, name, exponent_m=m, exponent_n=n)


def exponents(shapes: tuple[tuple[int, int], ...], seconds: list[float]) -> tuple[float, float]:
    """Exponents of m and n that fit best, by least squares of the logarithms."""
    terms = np.column_stack([np.ones(len(shapes)), np.log(shapes)])
    _, m, n = np.linalg.lstsq(terms, np.log(seconds), rcond=None)[0]
    return float(m), float(n)


def shape_of(case: str) -> tuple[int, ...]:
    """Shape (m, n) or (b, m, n) that a case names."""
    shape = tuple(int(size) for size in case.split("x"))
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError
    return shape


def case_name(text: str) -> str:
    """Check the name of a case."""
    try:
        return text if text in CASES else "x".join(map(str, shape_of(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be MxN, BxMxN, shrinkage or growth, got {text!r}") from None


def recipe_name(text: str) -> str:
    """Check the name of a recipe, with or without the rows of its groups, or of a peer."""
    recipe, dash, rows = text.partition("-")
    if text in PEERS or (recipe in RECIPES and (not dash or (rows.isdecimal() and int(rows)))):
        return text
    known = ", ".join([*RECIPES, *PEERS])
    raise argparse.ArgumentTypeError(f"must be one of {known}, or a recipe and rows such as balanced-128, got {text!r}")


def positive(text: str) -> int:
    """Check a whole number that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def runnable(names: tuple[str, ...], bits: int) -> tuple[str, ...]:
    """Those that are installed and take so many bits; says which are left out."""
    found = []
    for name in names:
        lacking = peers.missing(peers.PACKAGES.get(name, ()))
        if lacking:
            print(f"{name} is left out: {', '.join(lacking)} missing", file=sys.stderr)
        elif not peers.supports(name, bits):
            print(f"{name} is left out: it does not take {bits} bits", file=sys.stderr)
        else:
            found.append(name)
    return tuple(found)


def planned(cases: list[str], recipes: list[str] | None, bits: int) -> dict[str, tuple[str, ...]]:
    """Names to run in each case, of those asked for; peers take one matrix, as it is."""
    asked = {
        case: [name for name in recipes or CASES.get(case, SOME) if name not in PEERS or takes_peers(case)]
        for case in cases
    }
    able = runnable(tuple(dict.fromkeys(itertools.chain(*asked.values()))), bits)
    found = {case: tuple(name for name in names if name in able) for case, names in asked.items()}
    return {case: names for case, names in found.items() if names}


def takes_peers(case: str) -> bool:
    """Whether the case is not one for recipes only."""
    return case == "growth" or (case != "shrinkage" and len(shape_of(case)) == 2)


def machine() -> str:
    """What the times depend on."""
    loaded = threadpoolctl.threadpool_info()
    found = {f"{one['internal_api']} {one['version']}" for one in loaded if one["user_api"] == "blas"}
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} cores{load}; BLAS: {', '.join(sorted(found))}"


def add_case(figures: Figures, case: str, names: tuple[str, ...], how: How) -> None:
    """Add the figures of one case."""
    if case == "growth":
        add_growth(figures, GROWTH, names, how)
    elif case == "shrinkage":
        add_shrinkage(figures, SHRINKAGE, names, how)
    elif len(shape_of(case)) == 3:
        add_batch(figures, case, names, how)
    else:
        add_size(figures, case, names, how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", type=case_name, default=list(CASES), metavar="CASE")
    parser.add_argument(
        "--recipe", nargs="+", type=recipe_name, metavar="RECIPE", help="by default what the case is for"
    )
    parser.add_argument("--bits", type=positive, default=4)
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, os.cpu_count() or 1], help="1 and all cores")
    parser.add_argument("--repeat", type=positive, default=5)
    parser.add_argument("--limit", type=positive, default=60, help="seconds after which a recipe is not run once more")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    how = How(options.bits, tuple(sorted(set(options.threads))), options.repeat, options.limit)
    plan = planned(options.case, options.recipe, options.bits)
    if not plan:
        raise SystemExit("nothing is left to run")

    print(f"{machine()}\n")
    figures, loads = Figures(), {}
    for case, names in tqdm(plan.items(), unit="case"):
        started, busy = time.perf_counter(), busy_seconds()
        add_case(figures, case, names, how)
        loads[case] = (busy_seconds() - busy) / (time.perf_counter() - started)
    for case, load in loads.items():
        if not math.isnan(load):
            figures.add(case, how.bits, "machine", other_load=load)
    figures.show(options.json)


if __name__ == "__main__":
    main()
