"""Recipes: what a solve does, as a few fields under a name."""

from __future__ import annotations

import dataclasses
from typing import Any

from comq_np import checks
from comq_np.orders import ORDERS

GRIDS = ("paper", "minmax", "shrunk")
STARTS = ("float", "rounding", "gram", "babai", "bitsplit")
#: Orders that all columns share, as a pass needs them.
PASS_ORDERS = tuple(ORDERS)
#: Most rows of a problem that may be proven; of so many, the solver keeps the matrix in double precision, too.
MOST_EXACT = 64
#: Most that the fields that count something may be.
INTEGERS = {
    "search": 100,
    "neighbours": 8,
    "sweeps": 10_000,
    "rounds": 10_000,
    "leaps": 1000,
    "leap_rows": 2**40,
    "exact": MOST_EXACT,
}
MOST_PATHS = 64
#: Fields of the pass that is Babai's nearest plane.
NEED_BABAI = ("damping", "other_orders", "paths", "search", "neighbours")
LEAST_MOVES, MOST_MOVES = 1e-6, 1000.0


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
        times the factor from 0.4 to 1 that has the least diag(G)-weighted squared rounding error, and for
        ``start="babai"`` scale and zero point refined to suit what can be told of the pass before it is made.
    order : {"greedy", "shared", "cyclic", "pivoted"}
        Rows by descending sqrt(G_ii) |w_ij| for each column, or for all columns by descending G_ii, first to last, or
        last the one with the least G_ii, before it the one with the least once that is eliminated, and so on.
    start : {"float", "rounding", "gram", "babai", "bitsplit"}
        Codes that the sweeps start from: the real ones, which have no error, as in the paper; the nearest ones; or
        those of one pass over the rows, with the feedback of its errors that COMQ's first sweep has, or Babai's nearest
        plane [1]_, which is GPTQ. A pass needs an order that is the same for all columns. "bitsplit" finds one bit of
        all codes after the other, from the most significant one on, by coordinate descent with the lower bits in the
        middle; on the CPU, where the levels are a power of two.
    damping : float >= 0, optional
        Share of ``mean(diag(G))`` that is added to the diagonal before ``start="babai"`` factors `G`; by default 0.1 by
        the squared number of levels, see `feedback`.
    other_orders : tuple of {"shared", "cyclic", "pivoted"}
        Orders in which the pass of ``start="babai"`` is made, too; each column keeps the best of them. Sweeps are in
        `order`.
    paths : int from 1 to 64
        Ways to round the first rows that the last pass of ``start="babai"`` keeps, those with the least error (K-best,
        or M-algorithm [2]_), row by row; each column keeps the best, or that of the plain pass.
    search : int >= 0
        How often scale and zero point are refined to suit the pass of ``start="babai"`` that has been made, and the
        pass is made again.
    promise : float from 0 to 1
        Share of its error that a column must stand to lose by that, as far as the pass before can tell, for it to take
        part; columns that share a scale, all together. Where leaps are made, they take the time, and any gain will do.
    neighbours : int from 0 to 8
        Further grids to start from, beside the one found, with another scale or zero point.
    sweeps : int >= 0
        Most sweeps over all coordinates, each time; 0 leaves the start. A start by Babai's nearest plane is left to the
        first leap, if there is one and no trial, which goes down to a minimum by itself.
    refit : bool or "ends"
        Whether scale (and zero point, if real) are refitted in closed form after every sweep, or only before the first
        and after the last one, which takes less time.
    trial : float >= 0
        Moves for each row of a tabu search [3]_ after the first sweeps from every start; 0 is none. Only then each
        column goes on from the best of its starts.
    leaps : int >= 0
        How often such a search leads out of the minimum that has been reached, with sweeps after it.
    moves : float > 0
        Moves of one leap, for each row.
    leap_rows : int >= 0
        Most rows of a problem that leaps are made in. A move reads a row of `G`, which is fast while the matrix fits in
        the cache of a core.
    exact : int from 0 to 64
        Most rows of a problem whose codes are then searched for better ones until they are proven optimal at their
        scale, or a limit of the work ends that; see `certify`. Rows times levels may be 2**17 at most.
    rounds : int >= 0
        With ``codebook="planes"`` of `solve`: most turns of a refit of the scales of the planes and a sweep over their
        levels, each time, from the uniform codes that the other fields lead to and, with ``start="babai"``, from passes
        on levels made to suit them; with a trial or leaps from each of them and beyond. 0 leaves the uniform codes.

    Raises
    ------
    InputError
        If a field is not one of these.

    References
    ----------
    .. [1] J. Chen et al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm",
       arXiv:2507.18553.
    .. [2] J. B. Anderson, S. Mohan, "Sequential Coding Algorithms: A Survey and Cost Analysis", IEEE Transactions on
       Communications 32 (1984) 169-176.
    .. [3] F. Glover, "Tabu Search, Part I", ORSA Journal on Computing 1 (1989) 190-206.

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
    damping: float | None = None
    other_orders: tuple[str, ...] = ()
    paths: int = 1
    search: int = 0
    promise: float = 0.0
    neighbours: int = 0
    sweeps: int = 3
    refit: bool | str = True
    trial: float = 0.0
    leaps: int = 0
    moves: float = 1.0
    leap_rows: int = 640
    exact: int = 0
    rounds: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise checks.InputError(f"`name` must be a string, got {self.name!r}.")
        if not isinstance(self.grids, tuple) or not self.grids:
            raise checks.InputError(f"`grids` must be a tuple of at least one of {GRIDS}, got {self.grids!r}.")
        for grid in self.grids:
            checks.choice("grids", grid, GRIDS)
        checks.choice("order", self.order, ("greedy", *ORDERS))
        checks.choice("start", self.start, STARTS)
        for name, most in INTEGERS.items():
            checks.integer(name, getattr(self, name), 0, most)
        if not isinstance(self.refit, bool) and self.refit != "ends":
            raise checks.InputError(f"`refit` must be True, False or 'ends', got {self.refit!r}.")
        checks.number("trial", self.trial, 0, MOST_MOVES)
        checks.number("moves", self.moves, LEAST_MOVES, MOST_MOVES)
        if self.damping is not None:
            checks.number("damping", self.damping, 0, 1)
        checks.number("promise", self.promise, 0, 1)
        self._check_pass()

    def _check_pass(self) -> None:
        checks.integer("paths", self.paths, 1, MOST_PATHS)
        if not isinstance(self.other_orders, tuple):
            raise checks.InputError(f"`other_orders` must be a tuple of {PASS_ORDERS}, got {self.other_orders!r}.")
        for order in self.other_orders:
            checks.choice("other_orders", order, PASS_ORDERS)
        if self.start in ("gram", "babai") and self.order not in PASS_ORDERS:
            raise checks.InputError(
                f"`order` must be one of {PASS_ORDERS} with `start` {self.start!r}, got {self.order!r}."
            )
        for name in NEED_BABAI:
            if self.start != "babai" and getattr(self, name) != getattr(Recipe, name):
                raise checks.InputError(f"`{name}` needs `start` 'babai', got {self.start!r}.")

    def leaps_in(self, rows: int) -> int:
        """Return how many leaps are made in a problem.

        Parameters
        ----------
        rows : int
            Its number of rows.

        Returns
        -------
        int
            Number of leaps.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.recipe("balanced").leaps_in(640), comq_np.recipe("balanced").leaps_in(641)
        (1, 0)
        """
        return self.leaps if rows <= self.leap_rows else 0

    def least_promise(self, rows: int) -> float:
        """Return the share of its error that a column must stand to lose by a pass on a refined grid to take part.

        Parameters
        ----------
        rows : int
            Number of rows of the problem.

        Returns
        -------
        float
            `promise`, or 0 where leaps are made.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.recipe("balanced").least_promise(640), comq_np.recipe("balanced").least_promise(641)
        (0.0, 0.02)
        """
        return 0.0 if self.leaps_in(rows) else self.promise

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


BALANCED = Recipe(
    "balanced",
    ("shrunk",),
    order="shared",
    start="babai",
    search=1,
    promise=0.02,
    sweeps=2,
    refit="ends",
    leaps=1,
    exact=25,
)
RECIPES = {
    made.name: made
    for made in (
        Recipe("paper", ("paper",)),
        Recipe("rtn", ("minmax",), start="rounding", sweeps=0, refit=False, rounds=0),
        Recipe("fast", ("shrunk",), order="shared", start="babai", sweeps=0, refit="ends"),
        BALANCED,
        BALANCED.replace(
            name="best",
            other_orders=("pivoted",),
            paths=16,
            search=2,
            promise=0.0,
            neighbours=8,
            sweeps=8,
            refit=True,
            trial=1.0,
            leaps=3,
            moves=8.0,
            leap_rows=2**40,
            rounds=16,
        ),
    )
}


def recipe(name: str | Recipe) -> Recipe:
    """Recipe of that name.

    Parameters
    ----------
    name : {"balanced", "best", "fast", "paper", "rtn"} or Recipe
        "paper" is COMQ as published [1]_; "rtn" is plain rounding to nearest on the min-max grid; "fast" makes one pass
        of Babai's nearest plane on a shrunk grid, and refits the scale. "balanced", the default of `solve`, refines
        that grid for the pass, makes it again (in problems of more than 640 rows, for the columns to which that
        promises something), and goes on from there: by a short tabu search in problems of up to 640 rows, and by
        sweeps. Up to 25 rows it proves its codes optimal. "best" does so from eight more grids and from 16 paths of the
        nearest plane in each of two orders, goes on from the best for each column by long tabu searches, and is slow. A
        `Recipe` is returned as it is.

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
