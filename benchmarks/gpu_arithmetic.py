"""Work out what the CUDA kernels take of a GPU, and how long passes and sweeps must take at least. Nothing is timed.

    python benchmarks/gpu_arithmetic.py --json arithmetic.json

Every kernel that works on a layer M x M is compiled for both cards, which needs no GPU: `registers` of a thread,
`shared` bytes of a block, and `occupancy`, the share of a multiprocessor's warps that such blocks fill. `milliseconds`
are arithmetic, not measured: the larger of the bytes that have to come from memory over the card's bandwidth and of the
operations over its float32 rate, both from its datasheet. A pass is that with the products between its launches; a
sweep moves 2.4 % of the codes, as the first one after a pass on a text encoder's layers at 4 bits, or all of them.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import NamedTuple

import cuda_compile
from comq_np import cuda
from comq_np.table import Figures


class Card(NamedTuple):
    """Compute capability, and bytes and float32 operations a second, from the datasheet."""

    capability: tuple[int, int]
    bandwidth: float
    operations: float


CARDS = {"A100 80GB SXM": Card((8, 0), 2.039e12, 19.5e12), "H100 SXM": Card((9, 0), 3.35e12, 67e12)}
SIZES = (1024, 4096, 16384)
#: Share of the codes that a sweep moves.
MOVING = {"sweep after a pass": 0.024, "sweep that moves all": 1.0}
BITS = 4


def work(name: str, m: int) -> tuple[float, float]:
    """Bytes that have to be moved, and operations, for a layer m x m."""
    matrix = weights = 4.0 * m * m
    if name == "pass":  # half the factor; weights read, and targets, codes, errors and misses written
        return matrix / 2 + 5 * weights, float(m) ** 3
    moves = MOVING[name] * m * m  # codes and residual read and written; G comes from the cache but once
    return matrix + 4 * weights, 2 * moves * m


def kernel_of(name: str, m: int) -> cuda.Kernel:
    """Kernel that a layer of m rows gets."""
    return cuda.KERNELS["pass" if name == "pass" else "sweep " + "x".join(map(str, cuda.rows_and_places(m)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    figures = Figures()
    for label, card in CARDS.items():
        for m in SIZES:
            for name in ("pass", *MOVING):
                kernel = kernel_of(name, m)
                usage = cuda_compile.report(kernel.kernel, kernel.signature, card.capability)
                moved, operations = work(name, m)
                figures.add(
                    f"{m}x{m}",
                    BITS,
                    f"{label}: {name}",
                    registers=usage.registers,
                    shared=usage.shared_bytes,
                    occupancy=cuda_compile.occupancy(usage, kernel.threads, card.capability),
                    milliseconds=1e3 * max(moved / card.bandwidth, operations / card.operations),
                )
    figures.show(options.json)


if __name__ == "__main__":
    main()
