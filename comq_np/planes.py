"""Bit planes with scales of their own: any levels ``sum_k plane_scale_k * bit_k - offset`` in place of a uniform grid.

From uniform codes, whose planes have the scales 2**k d, two steps take turns. A sweep sets each weight to the best of
the 2**bits levels of its group, all else fixed, which flips any of its bits. Then the scales and the offset of a group
are the least squares solution in bits + 1 unknowns: with the columns of B the bits of its rows, and -1 for the offset,
the objective ``(w - B a).T @ G @ (w - B a)`` is least where ``(B.T @ G @ B) a = B.T @ G @ w``; from a solution with
the residual R = G e, ``a += (B.T @ G @ B)^-1 @ B.T @ R``. Both steps lower the objective or leave it.

Where the sweeps end depends on where they start. So there is a second start: the levels that are nearest to the
*targets* of Babai's nearest plane, weighted by its pivots, found as by Lloyd [1]_ in turns of rounding and least
squares without any product; then the pass is made with these levels, which moves the targets, and so on. Each column
keeps the better one in the end.

.. [1] S. Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on Information Theory 28 (1982) 129-137.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import feedback as feedbacks
from comq_np import kernels, layouts
from comq_np.feedback import Feedback
from comq_np.grid import Grid, plane_levels
from comq_np.judge import Judge
from comq_np.kernels import MOST_HALF
from comq_np.layouts import Float32, Float64, Real, by_column, dots
from comq_np.minimise import Callback, Outcome
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile
from comq_np.recipes import Recipe

#: Passes of the nearest plane, each with the levels that suit the one before.
PASSES = 4
#: Turns of rounding and least squares on the targets of one pass.
LLOYD = 10
#: Directions of the planes with less room than this (relative) are one: what it leaves undetermined stays as it is.
FLAT = 1e-6
#: Rounds end where the sum of all objectives falls by a smaller share.
STILL = 1e-5

#: Arrays of `Planes`.
TABLES = ("scale", "offset", "levels", "ranked", "edges")

Codes = npt.NDArray[np.uint8]


@dataclass
class Planes:
    """Scales (columns, groups, bits) and offsets (columns, groups) of bit planes.

    They give the `levels` (columns, groups, 2**bits) of the codes 0, 1 and so on; in order, these are those of the
    codes `ranked`, with the `edges` halfway between them.
    """

    scale: Float32
    offset: Float32

    def __post_init__(self) -> None:
        levels = plane_levels(np.moveaxis(self.scale, -1, 0), self.offset)
        self.levels: Float32 = np.ascontiguousarray(np.moveaxis(levels, 0, -1))
        ranked = np.argsort(self.levels, axis=-1, kind="stable")
        values = np.take_along_axis(self.levels, ranked, axis=-1)
        self.ranked: Codes = ranked.astype(np.uint8)
        self.edges: Float32 = values[..., :-1] + np.float32(0.5) * (values[..., 1:] - values[..., :-1])

    @property
    def bits(self) -> int:
        """Number of planes."""
        return int(self.scale.shape[2])

    def copy(self) -> Planes:
        """Return planes that share no memory with these."""
        return Planes(self.scale.copy(), self.offset.copy())

    def take(self, other: Planes, where: slice, columns: npt.NDArray[np.bool_]) -> None:
        """Replace some of the columns that are at `where` by those of `other`, which has these only."""
        for name in TABLES:
            getattr(self, name)[where][columns] = getattr(other, name)[columns]

    def put(self, part: Planes, columns: slice) -> None:
        """Replace some columns by planes of these columns."""
        for name in TABLES:
            getattr(self, name)[columns] = getattr(part, name)

    def part(self, columns: slice) -> Planes:
        """Planes of some columns."""
        return Planes(self.scale[columns], self.offset[columns])

    def moved(self, g: int, change: Float64, half: bool) -> Float64:
        """Change scales and offset of group g by (columns, bits + 1), to what can be stored; the change that was."""
        before = np.concatenate([self.scale[:, g], self.offset[:, g, None]], axis=1).astype(np.float64)
        after = stored_planes(before + change, half)
        self.scale[:, g], self.offset[:, g] = after[:, :-1], after[:, -1]
        return after - before


def stored_planes(values: Float64, half: bool) -> Float32:
    """Scales and offsets of planes as they are stored: the nearest that float16 holds with `half`, else in float32."""
    most = MOST_HALF if half else np.finfo(np.float32).max
    kept: Float32 = np.clip(values, -most, most).astype(np.float16 if half else np.float32).astype(np.float32)
    return kept


def uniform(grid: Grid, bits: int, half: bool) -> Planes:
    """Planes of a uniform grid: the scales 2**k d, and the offset d z."""
    counts = np.array([2.0**k for k in range(bits)])
    scale = grid.scale.astype(np.float64)
    return Planes(
        stored_planes(scale[:, :, None] * counts, half), stored_planes(scale * grid.zero_point.astype(np.float64), half)
    )


class PlaneDescent:
    """Turns of sweeps and refits from one start; its arrays become those of the descent.

    There are `codes` (b n, m) with their `residual`, and each column's `objective` (b n,), followed in double
    precision. The last sweep `changed` so many codes of each.
    """

    def __init__(self, problem: Problem, codes: Codes, planes: Planes, pool: Workers) -> None:
        self.problem, self.codes, self.planes, self.pool = problem, codes, planes, pool
        self.residual = np.empty(codes.shape, np.float32)
        self.objective = np.empty(problem.count)
        self.changed = np.zeros(problem.count, np.int64)
        self.measure()

    def measure(self) -> None:
        """Compute residual and objective from scratch."""
        self.pool.map(self._measure, self.problem.tiles)

    def _measure(self, tile: Tile) -> None:
        error = errors(self.problem, self.codes[tile.where], self.planes.levels[tile.where], tile)
        residual = tile.split(error) @ self.problem.G[tile.problems]
        self.residual[tile.where] = residual.reshape(error.shape)
        self.objective[tile.where] = dots(error, self.residual[tile.where])

    def sweep(self) -> None:
        """Set every weight of every column to its best level, one after another."""
        self.pool.map(self._visit, self.problem.tiles)

    def _visit(self, tile: Tile) -> None:
        problem, where, some = self.problem, tile.where, tile.problems
        planes, rows = self.planes, (self.residual[where], problem.G[some], problem.inverse_diagonal[some])
        levels, edges, ranked = planes.levels[where], planes.edges[where], planes.ranked[where]
        changed, objective = self.changed[where], self.objective[where]
        kernels.level_sweep(self.codes[where], *rows, levels, edges, ranked, problem.group[some], changed, objective)

    def errors(self, tile: Tile, double: bool) -> Real:
        """``W - Wq`` of a tile, (k c, m); in double precision, in which the difference is exact, or not."""
        codes, levels = self.codes[tile.where], self.planes.levels[tile.where]
        if not double:
            return errors(self.problem, codes, levels, tile)
        group = self.problem.group[tile.problems].astype(np.intp).repeat(tile.shape[1], axis=0)
        Wq = levels[np.arange(len(codes))[:, None], group, codes]
        return self.problem.weights_by_column(tile).astype(np.float64) - Wq

    def round_to(self, grid: Grid, columns: npt.NDArray[np.bool_]) -> None:
        """Round some columns to nearest on a uniform grid."""
        self.planes.take(uniform(grid, self.planes.bits, self.problem.half), slice(None), columns)
        for tile in self.problem.tiles:
            rounded = self.problem.nearest(grid.part(tile.where), tile).astype(np.uint8)
            np.copyto(self.codes[tile.where], rounded, where=columns[tile.where, None])
        self.measure()

    def round_dead_rows(self) -> int:
        """Round the rows whose input is always zero to the nearest levels; how many they are."""
        dead = self.problem.diagonal == 0
        for tile in self.problem.tiles if dead.any() else ():
            where, some = tile.where, tile.problems
            W, planes = self.problem.weights_by_column(tile), (self.planes.edges[where], self.planes.ranked[where])
            nearest = np.empty_like(self.codes[where])
            kernels.nearest_levels(W, *planes, self.problem.group[some], nearest)
            np.copyto(self.codes[where], nearest, where=dead[some].repeat(tile.shape[1], axis=0))
        return int(dead.sum())

    def take(self, other: PlaneDescent, columns: npt.NDArray[np.bool_]) -> None:
        """Replace some columns by those of another descent."""
        self.planes.take(other.planes, slice(None), columns)
        for name in ("codes", "residual", "objective", "changed"):
            getattr(self, name)[columns] = getattr(other, name)[columns]

    def tabu(self, moves: int) -> None:
        """Leave the minimum that the sweeps have reached, for a lower one that is that many moves away at most."""
        self.pool.map(lambda tile: self._tabu(tile, moves), self.problem.tiles)

    def _tabu(self, tile: Tile, moves: int) -> None:
        problem, where, some = self.problem, tile.where, tile.problems
        alive, changed, objective = problem.inverse_diagonal[some] > 0, self.changed[where], self.objective[where]
        levels, ranked, group = self.planes.levels[where], self.planes.ranked[where], problem.group[some]
        rows = self.residual[where], problem.G[some]
        kernels.level_tabu(self.codes[where], *rows, alive, levels, ranked, group, moves, changed, objective)

    def refit(self) -> None:
        """Refit the scales and the offset of each group, one group after the other, the others held."""
        self.pool.map(self._refit, self.problem.tiles)

    def _refit(self, tile: Tile) -> None:
        problem, where = self.problem, tile.where
        planes, residual = self.planes.part(where), self.residual[where]
        for g in range(planes.offset.shape[1]):
            rows = group_rows(problem, tile, g)
            B, R = bit_planes(rows_of(self.codes[where], rows), planes.bits), rows_of(residual, rows)
            G = problem.G[tile.problems]
            if rows is not None:
                G = G[np.arange(len(rows))[:, None], rows]
            products = [(tile.split(plane) @ G).reshape(residual.shape) for plane in B]
            A, rhs = normal(B, [rows_of(product, rows) for product in products], R)
            before = planes.scale.copy(), planes.offset.copy()
            change = planes.moved(g, least_squares(A, rhs), problem.half)
            gain = np.einsum("jk,jkl,jl->j", change, A, change) - 2 * np.einsum("jk,jk->j", change, rhs)
            worse = ~(gain < 0)
            planes.scale[worse], planes.offset[worse] = before[0][worse], before[1][worse]
            change[worse] = gain[worse] = 0.0
            for one, product in zip(change.T.astype(np.float32), products, strict=True):
                residual -= one[:, None] * product
            self.objective[where] += gain
        self.planes.put(Planes(planes.scale, planes.offset), where)


def errors(problem: Problem, codes: Codes, levels: Float32, tile: Tile) -> Float32:
    """``W - Wq`` of a tile, (k c, m)."""
    W = problem.weights_by_column(tile)
    made = np.empty_like(W)
    kernels.level_errors(W, codes, levels, problem.group[tile.problems], made)
    return made


def group_rows(problem: Problem, tile: Tile, g: int) -> npt.NDArray[np.intp] | None:
    """Rows (k, s) of a group; None if it has all."""
    if problem.group_size >= problem.W.shape[1]:
        return None
    return problem.by_group[tile.problems][:, g * problem.group_size : (g + 1) * problem.group_size]


def rows_of(values: npt.NDArray[Any], rows: npt.NDArray[np.intp] | None) -> npt.NDArray[Any]:
    """Some rows of values (k c, m)."""
    return values if rows is None else layouts.rows_of(values, rows)


def bit_planes(codes: Codes, bits: int) -> list[Float32]:
    """Columns of B: the bits of the codes, plane by plane, and -1."""
    ones: list[Float32] = [((codes >> k) & 1).astype(np.float32) for k in range(bits)]
    return [*ones, np.full(codes.shape, np.float32(-1))]


def normal(B: list[Float32], products: list[Float32], R: Float32) -> tuple[Float64, Float64]:
    """``B.T @ G @ B`` (columns, bits + 1, bits + 1) from the products ``B.T @ G``, and ``B.T @ R``."""
    size = len(B)
    A = np.empty((len(R), size, size))
    for k in range(size):
        for other in range(k + 1):
            A[:, k, other] = A[:, other, k] = dots(B[k], np.ascontiguousarray(products[other]))
    return A, np.stack([dots(plane, R) for plane in B], axis=1)


def least_squares(A: Float64, rhs: Float64) -> Float64:
    """Smallest solution of ``A x = rhs`` for each column, in the unit of its diagonal: planes may be constant."""
    size = np.sqrt(np.diagonal(A, axis1=1, axis2=2))
    size = np.where(size > 0, size, 1.0)
    inverse = np.linalg.pinv(A / (size[:, :, None] * size[:, None]), rcond=FLAT, hermitian=True)
    found: Float64 = np.einsum("jkl,jl->jk", inverse, rhs / size) / size
    return found


class NearestPlane:
    """Passes of Babai's nearest plane over the rows, on levels that are made to suit its targets."""

    def __init__(self, problem: Problem, feedback: Feedback, tile: Tile) -> None:
        self.problem, self.feedback, self.tile = problem, feedback, tile
        self.group, self.diagonal = problem.group[tile.problems], feedback.diagonal[tile.problems]
        self.W = problem.weights(tile)

    def targets(self, error: Float32) -> Float32:
        """Targets (k c, m) of a pass that would have left these errors (k c, m)."""
        missed = error.copy()
        self.feedback.times(self.tile.problems, missed)
        inverse = np.divide(1, self.diagonal, out=np.zeros_like(self.diagonal), where=self.diagonal > 0)
        W = self.problem.weights_by_column(self.tile)
        return W - error + missed * inverse.repeat(self.tile.shape[1], axis=0)

    def suited(self, planes: Planes, targets: Float32) -> Planes:
        """Planes whose levels suit the targets better: rounding and least squares in turns, by the pivots."""
        weight = np.square(self.diagonal).repeat(len(targets) // len(self.group), axis=0)
        codes = np.empty(targets.shape, np.uint8)
        for _ in range(LLOYD):
            kernels.nearest_levels(targets, planes.edges, planes.ranked, self.group, codes)
            error = np.empty_like(targets)
            kernels.level_errors(targets, codes, planes.levels, self.group, error)
            scale, offset = planes.scale.copy(), planes.offset.copy()
            planes = Planes(scale, offset)
            for g in range(offset.shape[1]):
                rows = group_rows(self.problem, self.tile, g)
                B, shares = bit_planes(rows_of(codes, rows), planes.bits), rows_of(weight, rows)
                weighted = np.ascontiguousarray(shares * rows_of(error, rows))
                A, rhs = normal(B, [shares * plane for plane in B], weighted)
                planes.moved(g, least_squares(A, rhs), self.problem.half)
            planes = Planes(scale, offset)
        return planes

    def visit(self, planes: Planes) -> tuple[Codes, Float32, Float64]:
        """Codes (k c, m) of the pass on these levels, its errors, and its price (k c,), the objective with damping."""
        some, W = self.tile.problems, self.W
        targets, error, codes = np.empty_like(W), np.empty_like(W), np.empty(W.shape, np.uint8)
        price = np.zeros(self.tile.shape)
        levels, edges, ranked = (self.tile.split(values) for values in (planes.levels, planes.edges, planes.ranked))
        on = self.feedback.matrix[some], self.diagonal, levels, edges, ranked, self.group
        kernels.level_pass(W, *on, targets, codes, error, price)
        turned = np.ascontiguousarray(codes.transpose(0, 2, 1)).reshape(-1, W.shape[1])
        return turned, by_column(error), price.ravel()


def minimised(
    problem: Problem, steps: Recipe, found: Outcome, bits: int, pool: Workers, callback: Callback | None
) -> PlaneDescent:
    """Planes and codes from the uniform outcome, which goes on with their sweeps.

    Every start is left by one search, if there are any; then each column goes on from the better one.
    """
    codes = np.empty(found.best.codes.shape, np.uint8)
    np.copyto(codes, found.best.codes, casting="unsafe")
    descents = [PlaneDescent(problem, codes, uniform(found.best.grid, bits, problem.half), pool)]
    if not steps.rounds:
        return descents[0]
    if steps.start == "babai":
        descents += _suited(problem, steps, descents[0], pool)
    turns = Turns(problem, steps, found, callback)
    turns.run(descents)
    leaps = steps.leaps_in(problem.W.shape[1])
    moves = [steps.trial] * (steps.trial > 0) + [steps.moves] * leaps
    for one in moves[:1]:
        turns.leap(descents, one)
    best, *others = descents
    for other in others:
        best.take(other, other.objective < best.objective)
    for one in moves[1:]:
        turns.leap([best], one)
    return best


@dataclass(frozen=True)
class Turns:
    """Refits and sweeps in turns, and searches, which the outcome and the callback are told of."""

    problem: Problem
    steps: Recipe
    found: Outcome
    callback: Callback | None

    def run(self, descents: Sequence[PlaneDescent]) -> None:
        """Refit and sweep as often as the recipe allows, or until little is won, and refit."""
        for _ in range(self.steps.rounds):
            before = [descent.objective.sum() for descent in descents]
            for descent in descents:
                descent.refit()
                descent.sweep()
            self._tell(descents)
            if all(now.objective.sum() >= (1 - STILL) * was for now, was in zip(descents, before, strict=True)):
                break
        for descent in descents:
            descent.measure()  # without what rounding has left in the residual
            descent.refit()

    def leap(self, descents: Sequence[PlaneDescent], moves: float) -> None:
        """Leave the minima that were reached by tabu searches with so many moves a row, and go on from there."""
        live = int((self.problem.inverse_diagonal > 0).sum(axis=1).max())
        for descent in descents:
            descent.tabu(math.ceil(moves * live))
        self._tell(descents)
        self.run(descents)

    def _tell(self, descents: Sequence[PlaneDescent]) -> None:
        """Write down how it went."""
        objectives = np.stack([descent.objective for descent in descents])
        best = objectives.argmin(axis=0)[None]
        changed = np.take_along_axis(np.stack([descent.changed for descent in descents]), best, axis=0)
        self.found.objectives.append(max(self.problem.total(objectives.min(axis=0)), 0.0))
        self.found.changed.append(int(changed.sum()))
        self.found.converged = not changed.any()
        if self.callback is not None:
            self.callback(len(self.found.objectives), self.found.objectives[-1])


def judged(
    problem: Problem, best: PlaneDescent, plain: Grid, rounding: Float64, judge: Judge, share: float
) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Objective of each column on the given matrix, and which ones keep plain rounding, which has none above it."""
    objective = judge.of(best.errors, best.objective, share)
    worse, zero = rounding < objective, problem.zero_columns
    if (worse | zero).any():
        best.round_to(plain, worse | zero)
        objective = judge.of(best.errors, best.objective, share)
    return objective, worse & ~zero


def _suited(problem: Problem, steps: Recipe, first: PlaneDescent, pool: Workers) -> list[PlaneDescent]:
    """Start by the best of some passes of the nearest plane, if it has a factor."""
    codes, planes, price = np.empty_like(first.codes), first.planes.copy(), np.full(problem.count, np.inf)
    share = feedbacks.default_damping(2**planes.bits) if steps.damping is None else steps.damping
    with feedbacks.triangular(problem, share, pool) as feedback:
        if not feedback.factored.all():
            return []

        def one_tile(tile: Tile) -> None:
            where, nearest = tile.where, NearestPlane(problem, feedback, tile)
            now = planes.part(where)
            error = errors(problem, first.codes[where], now.levels, tile)
            for _ in range(PASSES):
                now = nearest.suited(now, nearest.targets(error))
                made, error, offer = nearest.visit(now)
                better = offer < price[where]
                codes[where][better], price[where][better] = made[better], offer[better]
                planes.take(now, where, better)

        pool.map(one_tile, problem.tiles)
    return [PlaneDescent(problem, codes, planes, pool)]
