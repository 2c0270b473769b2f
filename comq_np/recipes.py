"""Recipes: what a solve does, as a few fields under a name."""

from __future__ import annotations

import dataclasses
from typing import Any

from comq_np import checks
from comq_np.orders import ORDERS

GRIDS = ("paper", "minmax", "shrunk")


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
    sweeps : int >= 0
        Most sweeps over all coordinates; 0 leaves plain rounding.
    refit : bool
        Whether the scale is refitted in closed form after every sweep.

    Raises
    ------
    InputError
        If a field is not one of these.

    Examples
    --------
    >>> import comq_np
    >>> comq_np.recipe("paper").replace(order="cyclic")
    Recipe(name='paper', grids=('paper',), order='cyclic', sweeps=3, refit=True)
    """

    name: str
    grids: tuple[str, ...]
    order: str = "greedy"
    sweeps: int = 3
    refit: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise checks.InputError(f"`name` must be a string, got {self.name!r}.")
        if not isinstance(self.grids, tuple) or not self.grids:
            raise checks.InputError(f"`grids` must be a tuple of at least one of {GRIDS}, got {self.grids!r}.")
        for grid in self.grids:
            checks.choice("grids", grid, GRIDS)
        checks.choice("order", self.order, tuple(ORDERS))
        checks.integer("sweeps", self.sweeps, 0, 10_000)
        checks.boolean("refit", self.refit)

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
        Recipe("rtn", ("minmax",), sweeps=0, refit=False),
        Recipe("balanced", ("paper", "shrunk")),
    )
}


def recipe(name: str | Recipe) -> Recipe:
    """Recipe of that name.

    Parameters
    ----------
    name : {"balanced", "paper", "rtn"} or Recipe
        "paper" is COMQ as published [1]_; "rtn" is plain rounding to nearest on the min-max grid; "balanced",
        the default of `solve`, is "paper" from its own grid and from a shrunk one, the better for each column.
        A `Recipe` is returned as it is.

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
