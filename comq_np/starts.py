"""Where the sweeps start: a grid for every column, and the codes of one pass over the rows on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import bitsplit, kernels
from comq_np import feedback as feedbacks
from comq_np import grid as grids
from comq_np.descent import Start, Told, refitted, sums_of_one
from comq_np.feedback import Feedback, Pass, Scratch, visit
from comq_np.grid import Candidates, Grid
from comq_np.layouts import Float32, Float64, by_column, column_dots, written
from comq_np.orders import ORDERS
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile
from comq_np.recipes import Recipe

FACTOR_FAILED = (
    "`G` could not be factored, it is not positive semidefinite: the sweeps start from COMQ's own first pass."
)
#: Grids beside a good one: factor of the scale, and shift of the zero point.
NEIGHBOURS = ((1.0, 1), (1.0, -1), (0.95, 0), (1.05, 0), (0.92, 1), (0.92, -1), (1.08, 0), (0.97, 0))
#: With more codes, what a pass leaves of a weight is lost in single precision beside the weight.
MOST_LEVELS = 256

#: Numbers of columns.
Columns = npt.NDArray[np.intp]
#: Maps a function over a list, on one thread or several.
Map = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


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


def by_team(problem: Problem, function: Callable[[list[Tile], Map, Scratch], None], pool: Workers) -> None:
    """Call ``function(tiles, run, scratch)`` for each tile, or for all together where their columns share a scale."""
    if problem.whole:
        function(problem.tiles, pool.map, lambda _, *shape: np.empty(shape, np.float32))
    else:
        pool.map(lambda tile: function([tile], lambda f, items: list(map(f, items)), pool.scratch), problem.tiles)


def search(
    problem: Problem,
    team: list[Tile],
    grid: Grid,
    values: list[Float32],
    weight: Float32,
    candidates: Candidates,
    run: Map,
) -> tuple[list[Grid], list[Float64]]:
    """Candidates around the grid with the least rounding error of the values (k c, m), weighted by `weight` (b, m).

    Beside them, the share of its error that each column loses by that, (k c,).
    """
    parts = [grid.part(tile.where) for tile in team]

    def errors(one: tuple[Tile, Grid, Float32]) -> Float64:
        tile, part, value = one
        share = np.ascontiguousarray(weight[tile.problems], dtype=np.float32)
        if grid.scale.shape[1] > 1:
            rows = problem.by_group[tile.problems]
            share = np.take_along_axis(share, rows, axis=1)
            value = np.take_along_axis(value, rows.repeat(tile.shape[1], axis=0), axis=1)
        return grids.errors(value, share, part, candidates, problem.levels, problem.group_size)

    judged = problem.pooled(team, run(errors, list(zip(team, parts, values, strict=True))))
    found = [
        grids.picked(part, candidates, error.argmin(axis=2), problem.levels)
        for part, error in zip(parts, judged, strict=True)
    ]
    return found, [grids.promised(part, error) for part, error in zip(parts, judged, strict=True)]


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


@dataclass(frozen=True)
class View:
    """Problem with its rows in one order, its feedback, and the rows (b, m) in that order; None for the main one."""

    problem: Problem
    feedback: Feedback
    order: npt.NDArray[np.intp] | None = None

    def back(self, codes: Float32, tile: Tile) -> Float32:
        """Codes (k c, m) of a tile in the main order."""
        if self.order is None:
            return codes
        made = np.empty_like(codes)
        np.put_along_axis(made, self.order[tile.problems].repeat(tile.shape[1], axis=0), codes, axis=1)
        return made


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
class Team:
    """Tiles whose columns share a scale, or a single one, with their weights (k, m, c) and grid, as a view has them."""

    view: View
    tiles: list[Tile]
    weights: list[Float32]
    grid: Grid
    paths: int
    run: Map
    scratch: Scratch

    def suit(self, candidates: Candidates) -> None:
        """Put the best candidates in the place of the grid, as far as can be told before there are targets.

        They round the weights best, by what lies between the weight of each row in `G` and in the pass.
        """
        problem, feedback = self.view.problem, self.view.feedback
        values = self.run(problem.weights_by_column, self.tiles)
        weight = np.sqrt(np.square(feedback.diagonal) * problem.diagonal)
        better, _ = search(problem, self.tiles, self.grid, values, weight, candidates, self.run)
        self._put(better, self._sure())

    def visited(self) -> list[Pass]:
        """Passes of all columns."""

        def visited(one: tuple[Tile, Float32]) -> Pass:
            tile, W = one
            return self._visit(tile, W, self.grid.part(tile.where), "best")

        return self.run(visited, list(zip(self.tiles, self.weights, strict=True)))

    def improve(self, best: list[Pass], candidates: Candidates, least: float) -> None:
        """Find the candidates that round the targets of the best passes best, and make the pass on them.

        Columns that do not stand to lose more than the `least` share of their error take no part. Where that makes a
        column better, it is put in the place of the best pass, and its grid in that of the grid.
        """
        problem, pivots = self.view.problem, np.square(self.view.feedback.diagonal)
        values = self.run(self._targets, best)
        refined, promises = search(problem, self.tiles, self.grid, values, pivots, candidates, self.run)
        chosen = [(share > least) & sure for share, sure in zip(promises, self._sure(), strict=True)]
        columns = [_taking_part(tile, some) for tile, some in zip(self.tiles, chosen, strict=True)]
        again = self.run(self._visited_again, list(zip(self.tiles, self.weights, refined, columns, strict=True)))
        prices = [np.full(len(one.price), np.inf) for one in best]
        for price, some, one in zip(prices, columns, again, strict=True):
            price[some] = one.price
        after, before = (problem.pooled(self.tiles, of) for of in (prices, [one.price for one in best]))
        better = [(new < old) & some for new, old, some in zip(after, before, chosen, strict=True)]
        self._put(refined, better)
        for old, new, some, lower in zip(best, again, columns, better, strict=True):
            old.take(new, some, lower[some])

    def _sure(self) -> list[npt.NDArray[np.bool_]]:
        """Columns (k c,) whose passes have errors that can be compared."""
        return [self.view.feedback.factored[tile.problems].repeat(tile.shape[1]) for tile in self.tiles]

    def _put(self, better: list[Grid], columns: list[npt.NDArray[np.bool_]]) -> None:
        for tile, part, chosen in zip(self.tiles, better, columns, strict=True):
            self.grid.part(tile.where).take(part, chosen)

    def _targets(self, found: Pass) -> Float32:
        problems, rows, columns = found.targets.shape
        return by_column(found.targets, self.scratch("again 0", problems * columns, rows))

    def _visited_again(self, one: tuple[Tile, Float32, Grid, Columns]) -> Pass:
        tile, W, refined, columns = one
        if len(columns) < len(refined.scale):
            W = np.take(W, columns, axis=2, out=self.scratch("some W", *W.shape[:2], len(columns)), mode="clip")
            tile, refined = tile.first(len(columns)), refined.part(columns)
        return self._visit(tile, W, refined, "again")

    def _visit(self, tile: Tile, W: Float32, grid: Grid, name: str) -> Pass:
        made = Pass.like(W, self.scratch, name)
        return visit(self.view.problem, tile, W, grid, self.view.feedback, self.paths, made)


def _taking_part(tile: Tile, chosen: npt.NDArray[np.bool_]) -> Columns:
    """Numbers of the chosen columns of a tile; of several problems at once, all of them or none."""
    if tile.shape[0] > 1:
        chosen = np.full(len(chosen), chosen.any())
    return np.flatnonzero(chosen)


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
        codes, price, told = written(*shape), np.empty(self.problem.count), self._told(grid)

        def one_team(team: list[Tile], run: Map, scratch: Scratch) -> None:
            def weights(tile: Tile) -> Float32:
                problems, columns = tile.shape
                return view.problem.weights(tile, scratch("W", problems, shape[1], columns))

            def store(one: tuple[Tile, Float32, Pass]) -> None:
                tile, W, found = one
                if view.order is None:
                    by_column(found.codes, codes[tile.where])
                else:
                    codes[tile.where] = view.back(by_column(found.codes), tile)
                price[tile.where] = found.price
                if told is not None:
                    self._tell(view, tile, W, found, grid, told, scratch)

            rows = run(weights, team)
            found = self._refined(Team(view, team, rows, grid, paths, run, scratch), rounds, suited)
            run(store, list(zip(team, rows, found, strict=True)))

        by_team(self.problem, one_team, self.pool)
        return Start(grid, codes, told), price

    def _refined(self, team: Team, rounds: int, suited: bool) -> list[Pass]:
        """Passes of some tiles, whose grid is refined for them in place."""
        refining = grids.refining(self.problem.symmetric)
        if rounds or suited:
            for candidates in (refining.rough, refining.close) if rounds else (refining.near,):
                team.suit(candidates)
        best = team.visited()
        for _ in range(rounds):
            team.improve(best, refining.fine, self.steps.promise)
        return best

    def _told(self, grid: Grid) -> Told | None:
        """Room for what a single pass over the rows tells, if its feedback is factored, of a start on a grid."""
        problem, count, steps = self.problem, self.problem.count, self.steps
        if steps.paths > 1 or len(self.views) > 1 or not self.factored.all() or problem.levels > MOST_LEVELS:
            return None
        residual = written(count, problem.W.shape[1]) if steps.sweeps or steps.leaps or steps.trial else None
        single = grid.scale.shape[1] == 1 and not problem.whole and not problem.real
        return Told(np.empty(count), np.empty(count), residual, refitted=single and steps.refit == "ends")

    def _tell(self, view: View, tile: Tile, W: Float32, found: Pass, grid: Grid, told: Told, scratch: Scratch) -> None:
        """Put in what the pass of a tile tells of residual, objective and size, after a refit of the scale."""
        problem, feedback, where = self.problem, view.feedback, tile.where
        missed, error, dead = found.targets, found.error, problem.diagonal[tile.problems] == 0
        kernels.misses(W, error, feedback.diagonal[tile.problems], missed)
        W[dead] = error[dead] = 0.0  # damped like the others, but of no account
        reached = feedback.times(tile.problems, W, scratch("again 0", *W.shape))
        damping = feedback.damping[tile.problems].repeat(tile.shape[1]).astype(np.float64)
        rr, mm = column_dots(reached, reached), found.price
        told.size[where] = rr - damping * column_dots(W, W)
        grid = grid.part(where)
        if told.refitted:
            before = grid.scale[:, 0].astype(np.float64)
            grid.scale[:, 0], _ = refitted(grid, 0, sums_of_one(grid, rr, column_dots(reached, missed), mm), real=False)
            ratio = tile.split((grid.scale[:, 0] / before).astype(np.float32))
            kernels.move_towards(missed, reached, ratio)
            kernels.move_towards(error, W, ratio)
            mm = column_dots(missed, missed)
        told.objective[where] = mm - damping * column_dots(error, error)
        if told.residual is not None:
            residual = feedback.back(tile.problems, missed, reached)
            error *= feedback.damping[tile.problems][:, None, None]
            residual -= error
            by_column(residual, told.residual[where])


def neighbours(problem: Problem, steps: Recipe) -> list[tuple[float, int]]:
    """Moves from a grid to those beside it."""
    return [move for move in NEIGHBOURS if not (problem.symmetric and move[1])][: steps.neighbours]


def beside(problem: Problem, grid: Grid, move: tuple[float, int]) -> Grid:
    """Grid with its scale times a factor and its zero point shifted."""
    factor, shift = move
    candidate = Candidates(np.array([factor]), (shift,) if shift or factor != 1 else ())
    return grids.picked(grid, candidate, np.zeros(grid.scale.shape, dtype=np.intp), problem.levels)
