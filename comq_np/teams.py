"""Tiles whose columns share a scale, or a single one: their grids are refined for a pass over the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import grid as grids
from comq_np import kernels
from comq_np.feedback import Feedback, Pass, Scratch, visit
from comq_np.grid import Candidates, Grid
from comq_np.layouts import Float32, Float64, by_column
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile

#: Numbers of columns.
Columns = npt.NDArray[np.intp]
#: Maps a function over a list, on one thread or several.
Map = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


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

    Beside them, the errors of all candidates, (k c, groups, candidates).
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
    return found, judged


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


@dataclass(frozen=True)
class Team:
    """Tiles whose columns share a scale, or a single one, with their weights (k, m, c) and grid, as a view has them.

    Until their `codes` (b n, m) are known, the memory of these serves for other things.
    """

    view: View
    tiles: list[Tile]
    weights: list[Float32]
    grid: Grid
    paths: int
    run: Map
    scratch: Scratch
    codes: Float32

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
        values = self.run(self._targets, list(zip(self.tiles, best, strict=True)))
        refined, errors = search(problem, self.tiles, self.grid, values, pivots, candidates, self.run)
        parts = [self.grid.part(tile.where) for tile in self.tiles]
        promises = [grids.promised(part, error) for part, error in zip(parts, errors, strict=True)]
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

    def _targets(self, one: tuple[Tile, Pass]) -> Float32:
        tile, found = one
        return by_column(found.targets, self.codes[tile.where])

    def _visited_again(self, one: tuple[Tile, Float32, Grid, Columns]) -> Pass:
        tile, W, refined, columns = one
        if len(columns) < len(refined.scale):
            some = self.scratch("some W", *W.shape[:2], len(columns))
            kernels.some_columns(W, columns, some)
            tile, W, refined = tile.first(len(columns)), some, refined.part(columns)
        return self._visit(tile, W, refined, "again")

    def _visit(self, tile: Tile, W: Float32, grid: Grid, name: str) -> Pass:
        made = Pass.like(W, self.scratch, name)
        return visit(self.view.problem, tile, W, grid, self.view.feedback, self.paths, made)


def _taking_part(tile: Tile, chosen: npt.NDArray[np.bool_]) -> Columns:
    """Numbers of the chosen columns of a tile; of several problems at once, all of them or none."""
    if tile.shape[0] > 1:
        chosen = np.full(len(chosen), chosen.any())
    return np.flatnonzero(chosen)
