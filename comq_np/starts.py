"""Where the sweeps start: a grid for every column, and the codes of one pass over the rows on it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comq_np import bitsplit, kernels
from comq_np import feedback as feedbacks
from comq_np import grid as grids
from comq_np.descent import MOST_LEVELS, Start, Told, refitted, sums_of_one
from comq_np.feedback import Pass, Scratch
from comq_np.grid import Candidates, Grid
from comq_np.layouts import Float32, Float64, by_column, dots, squares, written_at_once
from comq_np.orders import ORDERS
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile
from comq_np.recipes import Recipe
from comq_np.teams import Map, Team, View, by_team, search

FACTOR_FAILED = (
    "`G` could not be factored, it is not positive semidefinite: the sweeps start from COMQ's own first pass."
)
#: Grids beside a good one: factor of the scale, and shift of the zero point.
NEIGHBOURS = ((1.0, 1), (1.0, -1), (0.95, 0), (1.05, 0), (0.92, 1), (0.92, -1), (1.08, 0), (0.97, 0))


def start_grid(problem: Problem, name: str, pool: Workers, candidates: Candidates = grids.SHRINK) -> Grid:
    """Grid called `name`, one of `recipes.GRIDS`; the `candidates` are those of the shrunk one."""
    if name == "paper" and problem.whole:
        return grids.tensor_paper(np.abs(problem.W).max(axis=1), problem.levels, problem.real, problem.half)
    grid = problem.span.copy()

    def shrink(team: list[Tile], run: Map, _: Scratch) -> None:
        values = run(problem.weights_by_column, team)
        shrunk = search(problem, team, grid, values, problem.diagonal, candidates, run)[0]
        for tile, better in zip(team, shrunk, strict=True):
            grid.put(better, tile.where)

    if name == "shrunk":
        by_team(problem, shrink, pool)
    return grid


def starts(problem: Problem, steps: Recipe, given: Grid | None, pool: Workers) -> list[Start]:
    """A start from each grid of the recipe, or from the given one."""
    candidates = grids.COARSE if steps.start == "babai" else grids.SHRINK
    found = [given] if given else [start_grid(problem, name, pool, candidates) for name in steps.grids]
    if steps.start == "float" and steps.sweeps:
        shape = problem.count, problem.W.shape[1]
        return [Start(grid, np.empty(shape, np.float32), real=True) for grid in found]
    if steps.start == "bitsplit":
        return [Start(grid, bitsplit.codes_of(problem, grid, pool)) for grid in found]
    if steps.start in ("float", "rounding"):
        return [Start(grid, rounded(problem, grid, pool)) for grid in found]
    with contextlib.ExitStack() as stack:
        passes = Passes(problem, _views(problem, steps, found, stack, pool), steps, pool)
        if given or not passes.factored.any():  # only the nearest plane's error can judge other grids
            return [passes.start(grid) for grid in found]
        named = zip(found, steps.grids, strict=True)
        searched = [passes.start(grid, steps.search, suited=name == "shrunk") for grid, name in named]
        others = [beside(problem, one.grid, move) for one in searched for move in neighbours(problem, steps)]
        return searched + [passes.start(grid) for grid in others]


def rounded(problem: Problem, grid: Grid, pool: Workers) -> Float32:
    """Nearest codes on a grid, (b n, m)."""
    codes = np.empty((problem.count, problem.W.shape[1]), np.float32)

    def round_tile(tile: Tile) -> None:
        codes[tile.where] = problem.nearest(grid.part(tile.where), tile)

    pool.map(round_tile, problem.tiles)
    return codes


def _views(
    problem: Problem, steps: Recipe, found: list[Grid], stack: contextlib.ExitStack, pool: Workers
) -> list[View]:
    """Views for the passes that the recipe starts by; where `G` cannot be factored, with what needs no factor."""
    if steps.start == "gram":
        return [View(problem, feedbacks.gram(problem))]
    share = feedbacks.default_damping(problem.levels) if steps.damping is None else steps.damping
    orders = [None, *(ORDERS[name](problem.G) for name in steps.other_orders)]
    problems = [problem if order is None else problem.arranged(order) for order in orders]
    views = [
        View(one, stack.enter_context(feedbacks.triangular(one, share, pool)), order)
        for one, order in zip(problems, orders, strict=True)
    ]
    if not views[0].feedback.factored.all():
        for grid in found:
            grid.notes.append(FACTOR_FAILED)
    return [view for view in views if view.feedback.factored.all()] or views[:1]


@dataclass(frozen=True)
class Passes:
    """Passes over the rows in one order or several."""

    problem: Problem
    views: list[View]
    steps: Recipe
    pool: Workers

    @property
    def factored(self) -> npt.NDArray[np.bool_]:
        """For which problems the errors of the passes are objectives, which can be compared."""
        return self.views[0].feedback.factored

    def start(self, grid: Grid, rounds: int = 0, suited: bool = False) -> Start:
        """Start from the best pass for each column, after so many rounds of refining the grid to suit the pass.

        With `suited`, even without any rounds it is made to suit what can be told before the pass.
        """
        paths = self.steps.paths
        if (rounds or suited) and paths > 1:
            return self.start(self._best(grid, rounds, 1, suited).grid)
        return self._best(grid, rounds, paths, suited)

    def _best(self, grid: Grid, rounds: int, paths: int, suited: bool) -> Start:
        (best, price), *others = (self._made(view, grid.copy(), rounds, paths, suited) for view in self.views)
        for other, offer in others:
            better = self._pooled(offer) < self._pooled(price)
            best.grid.take(other.grid, better)
            best.codes[better], price[better] = other.codes[better], offer[better]
        return best

    def _pooled(self, price: Float64) -> Float64:
        tiles = self.problem.tiles
        return np.concatenate(self.problem.pooled(tiles, [price[tile.where] for tile in tiles]))

    def _made(self, view: View, grid: Grid, rounds: int, paths: int, suited: bool) -> tuple[Start, Float64]:
        """Start by the passes of one view, and their prices (b n,)."""
        shape = self.problem.count, self.problem.W.shape[1]
        codes, price, told = written_at_once(*shape, self.pool), np.empty(self.problem.count), self._told(grid)
        residual = None if told is None else told.residual

        def one_team(team: list[Tile], run: Map, scratch: Scratch) -> None:
            def weights(tile: Tile) -> Float32:  # where the residual is put in the end, if there is one
                problems, columns = tile.shape
                size = problems, shape[1], columns
                made = scratch("W", *size) if residual is None else residual[tile.where].reshape(size)
                return view.problem.weights(tile, made)

            def store(one: tuple[Tile, Float32, Pass]) -> None:
                tile, W, found = one
                if view.order is None:
                    by_column(found.codes, codes[tile.where])
                else:
                    codes[tile.where] = view.back(by_column(found.codes), tile)
                price[tile.where] = found.price
                if told is not None:
                    kernels.misses(W, found.error, view.feedback.diagonal[tile.problems], found.targets)
                    self._tell(view, tile, codes[tile.where], found, grid.part(tile.where), told, scratch)

            rows = run(weights, team)
            found = self._refined(Team(view, team, rows, grid, paths, run, scratch, codes), rounds, suited)
            run(store, list(zip(team, rows, found, strict=True)))

        by_team(self.problem, one_team, self.pool)
        return Start(grid, codes, told), price

    def _refined(self, team: Team, rounds: int, suited: bool) -> list[Pass]:
        """Passes of some tiles, whose grid is refined for them in place."""
        rows = self.problem.W.shape[1]
        refining = grids.refining(self.problem.symmetric, quick=not self.steps.leaps_in(rows))
        if rounds or suited:
            for candidates in (refining.rough, refining.close) if rounds else (refining.near,):
                team.suit(candidates)
        best, least = team.visited(), self.steps.least_promise(rows)
        for _ in range(rounds):
            team.improve(best, refining.fine, least)
        return best

    def _told(self, grid: Grid) -> Told | None:
        """Room for what a single pass over the rows tells, if its feedback is factored, of a start on a grid."""
        problem, count, steps = self.problem, self.problem.count, self.steps
        if steps.paths > 1 or len(self.views) > 1 or not self.factored.all() or problem.levels > MOST_LEVELS:
            return None
        sweeping = steps.sweeps or steps.leaps or steps.trial
        residual = written_at_once(count, problem.W.shape[1], self.pool) if sweeping else None
        single = grid.scale.shape[1] == 1 and not problem.whole and not problem.real
        return Told(np.empty(count), np.empty(count), residual, refitted=single and steps.refit == "ends")

    def _tell(
        self, view: View, tile: Tile, codes: Float32, found: Pass, grid: Grid, told: Told, scratch: Scratch
    ) -> None:
        """Put in what the pass of a tile tells of residual, objective and size, after a refit of the scale.

        The codes (k c, m) and what the rows have missed, in the place of the targets, are all that is left of the pass.
        """
        problem, feedback, where = self.problem, view.feedback, tile.where
        alive = problem.diagonal[tile.problems] > 0  # the others are damped, too, but of no account
        damping = np.where(alive, feedback.damping[tile.problems, None], np.float32(0))
        missed = scratch("best 0", *codes.shape) if told.residual is None else told.residual[where]
        by_column(found.targets, missed)
        W, reached = problem.weights_by_column(tile), scratch("best 1", *codes.shape)
        np.copyto(reached, W)
        feedback.times(tile.problems, reached)
        rr, mm = dots(reached, reached), found.price
        told.size[where] = rr - squares(W, damping)
        if told.refitted:
            before = grid.scale[:, 0].astype(np.float64)
            grid.scale[:, 0], _ = refitted(grid, 0, sums_of_one(grid, rr, dots(reached, missed), mm), real=False)
            kernels.move_towards(missed, reached, (grid.scale[:, 0] / before).astype(np.float32))
            mm = dots(missed, missed)
        error = problem.errors(codes, grid, tile, scratch("best 2", *codes.shape))
        told.objective[where] = mm - squares(error, damping)
        if told.residual is not None:
            feedback.back(tile.problems, missed)
            kernels.take_off(missed, error, damping)


def neighbours(problem: Problem, steps: Recipe) -> list[tuple[float, int]]:
    """Moves from a grid to those beside it."""
    return [move for move in NEIGHBOURS if not (problem.symmetric and move[1])][: steps.neighbours]


def beside(problem: Problem, grid: Grid, move: tuple[float, int]) -> Grid:
    """Grid with its scale times a factor and its zero point shifted."""
    factor, shift = move
    candidate = Candidates(np.array([factor]), (shift,) if shift or factor != 1 else ())
    return grids.picked(grid, candidate, np.zeros(grid.scale.shape, dtype=np.intp), problem.levels)
