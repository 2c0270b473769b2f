"""What is won by solving several layers at once? Times from file to file, beside those of one layer after the other.

    python benchmarks/layers.py --json layers.json
    python benchmarks/layers.py --case 40x128x128 --recipe balanced --runs 5

Case is ``COUNTxMxN`` for so many layers of weights (m, n), or ``blocks``: six of a transformer like all-MiniLM-L6-v2,
each with four layers of 384 x 384, three of which share a Gram, one of 384 x 1536 and one of 1536 x 384. Seconds are
from file to file, the least of several runs in turn, always with the same number of threads in all: `one_seconds` with
one layer at a time on all threads, `default_seconds` with as many at once as fit into the memory that the largest
takes, `most_seconds` with as many at once as there are threads. `default_speedup` and `most_speedup` are the first over
the other two. The three files are compared: they are the same to the bit.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from typing import Any

import comq_np
import problems
from comq_np.table import Figures
from speed import positive, shape_of

CASES = ("60x64x64", "40x128x128", "16x384x384", "4x1024x1024", "blocks")
BLOCK = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
BLOCKS = 6
#: Limits of `quantize_file` by what they are called here.
WAYS: dict[str, dict[str, Any]] = {"one": {"workers": 1}, "default": {}, "most": {"memory": 2**62}}


def shapes_of(case: str) -> list[tuple[int, int]]:
    """Shapes of the layers of a case."""
    if case == "blocks":
        return BLOCK * BLOCKS
    count, m, n = shape_of(case)
    return [(m, n)] * count


def case_name(text: str) -> str:
    """Check a case."""
    try:
        shapes_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be COUNTxMxN or 'blocks', got {text!r}") from None
    return text


def write(path: pathlib.Path, case: str) -> None:
    """Write the calibration file of a case."""
    with comq_np.CalibrationWriter(path) as file:
        for number, (m, n) in enumerate(shapes_of(case)):
            if case != "blocks" or number % len(BLOCK) not in (1, 2):  # the layers of keys and values
                gram = problems.gram(m, number)
            file.add(comq_np.Layer(str(number), problems.weights(m, n, number), gram))


def seconds_of(folder: pathlib.Path, recipe: str, bits: int, threads: int, runs: int) -> dict[str, float]:
    """Least time of each way to solve the calibration file in a folder."""
    least = dict.fromkeys(WAYS, float("inf"))
    for _ in range(runs):
        for way, limits in WAYS.items():
            started = time.perf_counter()
            options: dict[str, Any] = {"recipe": recipe, "threads": threads, **limits}
            comq_np.quantize_file(folder / "calibration.h5", folder / f"{way}.h5", bits, **options)
            least[way] = min(least[way], time.perf_counter() - started)
    if len({(folder / f"{way}.h5").read_bytes() for way in WAYS}) > 1:
        raise SystemExit("layers.py: the files differ")
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", type=case_name, default=CASES, metavar="CASE")
    parser.add_argument("--recipe", nargs="+", default=["fast", "balanced"])
    parser.add_argument("--bits", type=positive, default=4)
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="by default one for each core")
    parser.add_argument("--runs", type=positive, default=3)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    figures = Figures()
    for case in options.case:
        with tempfile.TemporaryDirectory() as folder:
            write(pathlib.Path(folder, "calibration.h5"), case)
            for recipe in options.recipe:
                found = seconds_of(pathlib.Path(folder), recipe, options.bits, options.threads, options.runs)
                speedups = {f"{way}_speedup": found["one"] / found[way] for way in ("default", "most")}
                times = {f"{way}_seconds": seconds for way, seconds in found.items()}
                figures.add(case, options.bits, recipe, **times, **speedups)
    figures.show(options.json)


if __name__ == "__main__":
    main()
