"""Uniform codes bit by bit: from the most significant one on, each bit of all rows with the lower ones in their middle.

With the bits above bit k known, a code lies in a range of 2**(k + 1), and bit k says in which half of it. Until the
lower bits are known they stand for the middle of that half. So each bit is found by coordinate descent over two values
a row, and the objective counts all rows meanwhile, decided or not.
"""

from __future__ import annotations

import numpy as np

from comq_np import checks, kernels
from comq_np.grid import Grid
from comq_np.layouts import Float32
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile

#: Most sweeps for one bit.
SWEEPS = 4


def codes_of(problem: Problem, grid: Grid, pool: Workers) -> Float32:
    """Codes (b n, m) on a grid."""
    bits = (problem.levels - 1).bit_length()
    if problem.levels != 2**bits:
        raise checks.InputError(f"`levels` must be a power of two with `start` 'bitsplit', got {problem.levels}.")
    codes = np.full((problem.count, problem.W.shape[1]), np.float32((problem.levels - 1) / 2))

    def one_tile(tile: Tile) -> None:
        here, part, some = codes[tile.where], grid.part(tile.where), tile.problems
        scale, zero_point = (problem.spread(values, tile) for values in (part.scale, part.zero_point))
        error = (problem.weights_by_column(tile) - scale * (here - zero_point.astype(np.float64))).astype(np.float32)
        G = problem.G[some]
        residual = (tile.split(error) @ G).reshape(error.shape)
        rows = G, problem.inverse_diagonal[some], part.scale, problem.group[some]
        for k in reversed(range(bits)):
            middle = here.copy()
            for _ in range(SWEEPS):
                if not kernels.split_sweep(here, middle, residual, *rows, np.float32(2.0**k / 2)):
                    break

    pool.map(one_tile, problem.tiles)
    return codes
