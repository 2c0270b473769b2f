"""What does a new process pay? The import, and the first solve with the kernels in numba's disk cache.

    python benchmarks/startup.py --json startup.json

Each figure is the median over fresh processes. `import_seconds` is what ``import comq_np`` adds to
``import numpy, numba, scipy.linalg``; `first_solve_seconds` is the first ``solve`` at 384 x 384, once another process
has compiled the kernels.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import subprocess
import sys

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
    command = [sys.executable, "-c", code]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(runs + 1)]
    return statistics.median(float(text) for text in printed[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--recipe", nargs="+", default=["rtn", "paper", "balanced"])
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    figures, import_seconds = Figures(), median_seconds(IMPORT, options.runs)
    for recipe in options.recipe:
        first_solve = median_seconds(FIRST_SOLVE.replace("RECIPE", repr(recipe)), options.runs)
        figures.add("384x384", 4, recipe, import_seconds=import_seconds, first_solve_seconds=first_solve)
    figures.show(options.json)


if __name__ == "__main__":
    main()
