"""Recipes: what a solve does, as a few fields under a name."""

from __future__ import annotations

import dataclasses
from typing import Any

from comq_np import checks
from comq_np.orders import ORDERS

GRIDS = ("paper", "minmax", "shrunk")
STARTS = ("float", "rounding", "gram", "babai")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Steps of a solve.

    Parameters
    ----------
    name : str
        Name, for the report.
    grids : tuple of {"paper", "minmax", "shrunk"}
        Grids to start from. With several, each is solved and every column (for ``group_size="tensor"``: the matrix)
        keeps the one with the least objective. "minmax" spans the weights; "paper" is the same, except for
        ``group_size="tensor"``, where it is the paper's signed grid; "shrunk" is "minmax" with the scale
        times the factor from 0.4 to 1 that has the least diag(G)-weighted squared rounding error.
    order : {"greedy", "shared", "cyclic"}
        Rows by descending sqrt(G_ii) |w_ij| for each column, by descending G_ii for all columns, or first to last.
    start : {"float", "rounding", "gram", "babai"}
        Codes that the sweeps start from: the real ones, which have no error, as in the paper; the nearest ones; or
        those of one pass over the rows, with the feedback of its errors that COMQ's first sweep has, or Babai's nearest
        plane [1]_, which is GPTQ. A pass needs an order that is the same for all columns.
    search : int >= 0
        How often scale and zero point are refined to suit the pass of ``start="babai"``.
    neighbours : int from 0 to 8
        Further grids to start from, beside the one found, with another scale or zero point.
    sweeps : int >= 0
        Most sweeps over all coordinates, each time; 0 leaves the start.
    refit : bool
        Whether the scale is refitted in closed form after every sweep.
    leaps : int >= 0
        How often a tabu search [2]_ leads out of the minimum that the sweeps have reached, with sweeps after it.
    moves : float > 0
        Moves of one such search, for each row.

    Raises
    ------
    InputError
        If a field is not one of these.

    References
    ----------
    .. [1] J. Chen et al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm",
       arXiv:2507.18553.
    .. [2] F. Glover, "Tabu Search, Part I", ORSA Journal on Computing 1 (1989) 190-206.

    Examples
    --------
    >>> import comq_np
    >>> comq_np.recipe("paper").replace(order="cyclic").order
    'cyclic'
    """

    name: str
    grids: tuple[str, ...]
    order: str = "greedy"
    start: str = "float"
    search: int = 0
    neighbours: int = 0
    sweeps: int = 3
    refit: bool = True
    leaps: int = 0
    moves: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise checks.InputError(f"`name` must be a string, got {self.name!r}.")
        if not isinstance(self.grids, tuple) or not self.grids:
            raise checks.InputError(f"`grids` must be a tuple of at least one of {GRIDS}, got {self.grids!r}.")
        for grid in self.grids:
            checks.choice("grids", grid, GRIDS)
        checks.choice("order", self.order, tuple(ORDERS))
        checks.choice("start", self.start, STARTS)
        for name, least, most in (("search", 0, 100), ("neighbours", 0, 8), ("sweeps", 0, 10_000), ("leaps", 0, 1000)):
            checks.integer(name, getattr(self, name), least, most)
        checks.boolean("refit", self.refit)
        if isinstance(self.moves, bool) or not isinstance(self.moves, int | float) or not 0 < self.moves <= 1000:
            raise checks.InputError(f"`moves` must be a number above 0, at most 1000, got {self.moves!r}.")
        if self.start in ("gram", "babai") and self.order == "greedy":
            raise checks.InputError(f"`order` must be 'shared' or 'cyclic' with `start` {self.start!r}, got 'greedy'.")
        if self.start != "babai" and (self.search or self.neighbours):
            raise checks.InputError(f"`search` and `neighbours` need `start` 'babai', got {self.start!r}.")

    def replace(self, **changes: Any) -> Recipe:
        """Return the same recipe with some fields changed.

        Parameters
        ----------
        **changes : object
            Fields and their new values.

        Returns
        -------
        Recipe
            The changed recipe.

        Raises
        ------
        InputError
            If there is no such field, or it cannot have that value.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.recipe("paper").replace(sweeps=10).sweeps
        10
        """
        known = tuple(field.name for field in dataclasses.fields(self))
        for name in changes:
            checks.choice("field", name, known)
        return dataclasses.replace(self, **changes)


RECIPES = {
    made.name: made
    for made in (
        Recipe("paper", ("paper",)),
        Recipe("rtn", ("minmax",), start="rounding", sweeps=0, refit=False),
        Recipe("fast", ("shrunk",), order="shared", start="gram", sweeps=6),
        Recipe("balanced", ("paper", "shrunk")),
        Recipe(
            "best", ("shrunk",), order="shared", start="babai", search=2, neighbours=4, sweeps=8, leaps=3, moves=4.0
        ),
    )
}


def recipe(name: str | Recipe) -> Recipe:
    """Recipe of that name.

    Parameters
    ----------
    name : {"balanced", "best", "fast", "paper", "rtn"} or Recipe
        "paper" is COMQ as published [1]_; "rtn" is plain rounding to nearest on the min-max grid; "balanced", the
        default of `solve`, is "paper" from its own grid and from a shrunk one, the better for each column. "fast"
        sweeps from a shrunk grid in an order that all columns share; "best" refines the grid for Babai's nearest plane,
        starts the sweeps there and on grids beside it, goes on by tabu searches, and keeps the best for each column;
        it is slow. A `Recipe` is returned as it is.

    Returns
    -------
    Recipe
        The recipe.

    Raises
    ------
    InputError
        If there is none of that name.

    References
    ----------
    .. [1] A. Zhang et al., "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization",
       arXiv:2403.07134, algorithms 1 and 2.

    Examples
    --------
    >>> import comq_np
    >>> comq_np.recipe("rtn").sweeps
    0
    """
    if isinstance(name, Recipe):
        return name
    return RECIPES[checks.choice("recipe", name, tuple(RECIPES))]
