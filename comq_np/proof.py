"""From a solution to the best codes at its scales, in turns with the best scales for its codes."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from comq_np import exact
from comq_np.descent import Descent, Solution, Start, measured, winner
from comq_np.layouts import Float64
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile
from comq_np.recipes import Recipe

#: Nodes that the proof of one column may visit, and how often codes and scales may take turns in it.
NODE_LIMIT, TURNS = 30_000, 20
#: Most rows times levels of a problem that is proven: the search tabulates what each code of a column stands for.
MAX_TABLE = 2**17
#: A turn that gains less than this share of the objective is no gain.
NO_GAIN = 1e-12


@dataclasses.dataclass
class Proof:
    """For each column (n,): what no codes at its scale could go below, and whether its codes are proven optimal."""

    bound: Float64
    optimal: npt.NDArray[np.bool_]


def is_provable(rows: int, levels: int, steps: Recipe) -> bool:
    """Whether the recipe proves the codes of problems with so many rows."""
    return rows <= steps.exact and rows * levels <= MAX_TABLE


def prove(problem: Problem, refit: bool, best: Solution, pool: Workers) -> Proof:
    """Turn a solution into the best codes at its scales, as far as that can be proven.

    The best codes have other best scales, and these other best codes: both take turns as long as that gains anything.
    """
    proof = Proof(np.zeros(problem.count), np.zeros(problem.count, dtype=np.bool_))
    _search(problem, best, proof, np.ones(problem.count, dtype=np.bool_), pool)
    for _ in range(TURNS if refit else 0):
        descent = Descent(problem, Start(best.grid.copy(), best.codes.copy()), pool)
        descent.refit_to_rest()
        descent.sweep(None)
        better = measured(problem, descent.solution.codes, descent.solution.grid, pool)
        gains = winner(problem, [best.objective * (1 - NO_GAIN), better.objective]) == 1
        if not gains.any():
            break
        best.take(better, gains)
        _search(problem, best, proof, gains, pool)
    return proof


def _search(problem: Problem, best: Solution, proof: Proof, columns: npt.NDArray[np.bool_], pool: Workers) -> None:
    """Put the best codes in, and the proof, for some columns."""
    double = problem.double
    assert double is not None, "MOST_EXACT rows have it"

    def one_tile(tile: Tile) -> None:
        some, where = columns[tile.where], tile.where
        if not some.any():
            return
        G = double[tile.problems]
        grid = [problem.spread(values[where], tile) for values in (best.grid.scale, best.grid.zero_point)]
        parts = problem.weights_by_column(tile), best.codes[where], *grid
        if some.all():
            W, codes, scale, zero_point = (tile.split(values) for values in parts)
        else:  # each column as a problem of its own
            G = G.repeat(tile.shape[1], axis=0)[some]
            W, codes, scale, zero_point = (values[some][:, None] for values in parts)
        found = exact.search(W, G, codes, scale, zero_point, problem.levels, NODE_LIMIT)
        numbers = where.start + np.flatnonzero(some)
        best.codes[numbers], best.objective[numbers] = found.codes.reshape(len(numbers), -1), found.objective.ravel()
        proof.bound[numbers], proof.optimal[numbers] = found.bound.ravel(), found.optimal.ravel()

    pool.map(one_tile, problem.tiles)
