"""How much memory does a solve take? The peak beyond its inputs, beside what `comq_np.estimate` says beforehand.

    python benchmarks/memory.py --json memory.json
    python benchmarks/memory.py --case 2048x2048 --recipe best --threads 2

Linux only. Each solve has a process of its own, with everything compiled and warm and the inputs read from files; its
`peak_mb` is the highest resident memory during the solve over what there was before. Case is ``MxN_TYPE`` for W (m, n)
and G (m, m) of that type, with ``_overwrite`` where the solve may use up G. `estimate_mb` is what `comq_np.estimate`
says, `peak_over_estimate` the one over the other. `gram_copies` is the peak without four times W in float32, in
matrices of the size of G as given. Below 1024 x 1024, what the libraries take for themselves shows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

import numpy as np

import comq_np
import problems
from comq_np.table import Figures
from speed import positive, shape_of

CASES = ("768x3072", "1536x384", "2048x2048", "4096x4096")
TYPES = ("float32", "float64")
#: What is solved first, so that kernels, threads and the buffers of BLAS are there.
WARM = (256, 256)
MB = 1e6
#: Writing that to /proc/self/clear_refs makes the peak of resident memory what there is at the moment.
RESET_PEAK = "5"


@dataclasses.dataclass(frozen=True)
class Run:
    """One solve, for a process of its own: its inputs are ``W.npy`` and ``G.npy`` in a folder."""

    folder: pathlib.Path
    bits: int
    recipe: str
    threads: int
    overwrite: bool

    def solve(self, W: Any, G: Any) -> None:
        options = {"overwrite": self.overwrite, "threads": self.threads}
        comq_np.solve(W, G, self.bits, recipe=self.recipe, backend="cpu", **options)  # nor is CUDA's driver looked for


def resident(what: str) -> int:
    """Bytes of resident memory of this process: "VmRSS" now, "VmHWM" at most."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    (found,) = re.findall(rf"^{what}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return 1024 * int(found)


def peak(run: Run) -> int:
    """Bytes that a solve takes beyond its inputs; to be called in a process of its own."""
    G = np.load(run.folder / "G.npy")
    W = np.load(run.folder / "W.npy")
    run.solve(problems.weights(*WARM), problems.matrix(WARM[0]).astype(G.dtype))
    pathlib.Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    before = resident("VmRSS")
    run.solve(W, G)
    return resident("VmHWM") - before


def measured(run: Run) -> int:
    """`peak` in a fresh process: neither what this one has ever had nor its heap counts there."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(peak, run).result()


def estimated(shape: tuple[int, int], kind: str, run: Run) -> int:
    """What `comq_np.estimate` says, in bytes."""
    options = {"recipe": run.recipe, "dtype": kind, "overwrite": run.overwrite, "threads": run.threads}
    return comq_np.estimate(*shape, run.bits, **options)


def figures_of(shape: tuple[int, int], kind: str, run: Run) -> dict[str, float]:
    """Figures of one solve."""
    (m, n), found, estimate = shape, measured(run), estimated(shape, kind, run)
    figures = {"peak_mb": found / MB, "gram_copies": (found - 4 * 4 * m * n) / (m * m * np.dtype(kind).itemsize)}
    return {**figures, "estimate_mb": estimate / MB, "peak_over_estimate": found / estimate}


def case_name(text: str) -> str:
    """Check a size."""
    try:
        m, n = shape_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be MxN, got {text!r}") from None
    return f"{m}x{n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", type=case_name, default=CASES, metavar="MxN")
    parser.add_argument("--recipe", nargs="+", default=["balanced"])
    parser.add_argument("--bits", type=positive, default=4)
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="by default one for each core")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise SystemExit("memory.py needs Linux, whose /proc tells the peak of a process")

    figures = Figures()
    for case, kind in itertools.product(options.case, TYPES):
        m, n = shape_of(case)
        with tempfile.TemporaryDirectory() as folder:
            np.save(pathlib.Path(folder, "W.npy"), problems.weights(m, n))
            np.save(pathlib.Path(folder, "G.npy"), problems.matrix(m).astype(kind))
            for recipe, overwrite in itertools.product(options.recipe, (False, True)):
                run = Run(pathlib.Path(folder), options.bits, recipe, options.threads, overwrite)
                label = f"{case}_{kind}_overwrite" if overwrite else f"{case}_{kind}"
                figures.add(label, options.bits, recipe, **figures_of((m, n), kind, run))
    figures.show(options.json)


if __name__ == "__main__":
    main()
