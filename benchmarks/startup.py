"""What does a new process pay? The import, and the first solve: with the kernels in numba's disk cache, or without.

    python benchmarks/startup.py --json startup.json

Each figure is the median over fresh processes, but for the last. `import_seconds` is what ``import comq_np`` adds to
``import numpy, numba, scipy.linalg``; `first_solve_seconds` is the first ``solve`` at 384 x 384, once another process
has compiled the kernels; `compile_seconds` is the same of one process with an empty cache.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from comq_np.table import Figures

IMPORT = """
import numpy, numba, scipy.linalg, time
started = time.perf_counter()
import comq_np
print(time.perf_counter() - started)
"""

FIRST_SOLVE = """
import comq_np, numpy as np, time
rng = np.random.default_rng(0)
X, W = rng.normal(size=(1000, 384)), rng.normal(size=(384, 384))
G = X.T @ X
started = time.perf_counter()
comq_np.solve(W, G, recipe=RECIPE)
print(time.perf_counter() - started)
"""


def median_seconds(code: str, runs: int) -> float:
    """Median of the time that `code` prints, over fresh processes, the first of which does not count."""
    return statistics.median([seconds(code, {}) for _ in range(runs + 1)][1:])


def cold_seconds(code: str) -> float:
    """The same time in one process that has to compile all that it needs."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(code, {"NUMBA_CACHE_DIR": folder})


def seconds(code: str, environment: dict[str, str]) -> float:
    """The time that `code` prints in a fresh process, with some variables in its environment."""
    command, environment = [sys.executable, "-c", code], {**os.environ, **environment}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--recipe", nargs="+", default=["rtn", "paper", "balanced"])
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    figures, import_seconds = Figures(), median_seconds(IMPORT, options.runs)
    for recipe in options.recipe:
        code = FIRST_SOLVE.replace("RECIPE", repr(recipe))
        solves = {"first_solve_seconds": median_seconds(code, options.runs), "compile_seconds": cold_seconds(code)}
        figures.add("384x384", 4, recipe, import_seconds=import_seconds, **solves)
    figures.show(options.json)


if __name__ == "__main__":
    main()
