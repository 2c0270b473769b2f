"""How far a result is from the best codes that its grid allows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from comq_np import checks, exact
from comq_np.exact import Certificate
from comq_np.gram import Gram
from comq_np.problem import tiles
from comq_np.result import QuantizedArray

#: Most entries of the table of what each code of each row of a column stands for: 256 MiB.
MAX_TABLE = 2**25


def certify(W: npt.ArrayLike, G: npt.ArrayLike | Gram, q: QuantizedArray, *, node_limit: int = 200_000) -> Certificate:
    """Prove the codes of a result optimal at its scales, find better ones, or bound what any codes could reach.

    A box-constrained sphere decoder [1]_, column by column. Its work grows exponentially with the rows: on long columns
    the node limit ends the search and leaves a bound.

    Parameters
    ----------
    W : array_like of real, shape (m, n) or (m,)
        Weights that `q` was solved for.
    G : array_like of real, shape (m, m), or Gram
        Gram matrix of the inputs; of a `Gram`, that of the centred inputs where `q` has a bias shift.
    q : QuantizedArray
        The result; its scales and zero points are kept, and its codes start the search.
    node_limit : int >= 0
        Most nodes of the search of a column, and again as many for the bound where that cuts the search off.

    Returns
    -------
    Certificate
        The best codes, shaped as `W`, with objective and lower bound of each column. Where none are better by more than
        1e-9 of the objective, they are those of `q`.

    Raises
    ------
    InputError
        If `W`, `G` and `q` do not fit together, `q` has codes beyond its levels, or it has more than 2**25 codes to
        choose from in a column, rows times levels: 512 rows of 16 bits.

    References
    ----------
    .. [1] X.-W. Chang, Q. Han, "Solving box-constrained integer least squares problems", IEEE Transactions on Wireless
       Communications 7 (2008).

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(6, 3))
    >>> q = comq_np.solve(W, X.T @ X, bits=3)
    >>> proof = comq_np.certify(W, X.T @ X, q)
    >>> bool(proof.optimal.all()), bool((proof.bound <= proof.objective).all())
    (True, True)
    """
    weights = checks.weights(W)
    limit = checks.integer("node_limit", node_limit, 0, 2**62)
    if not isinstance(q, QuantizedArray) or q.codes.shape != weights.shape:
        what = f"of shape {q.codes.shape}" if isinstance(q, QuantizedArray) else repr(type(q).__name__)
        raise checks.InputError(f"`q` must be a QuantizedArray of shape {weights.shape}, as `W` has, got {what}.")
    if isinstance(G, Gram):
        G = G.matrix if q.bias_shift is None else G.centred
    G = checks.gram_matrix(G, len(weights))
    rows = len(weights)
    if rows * q.levels > MAX_TABLE:
        raise checks.InputError(
            f"`q` must have at most {MAX_TABLE // q.levels} rows with {q.levels} levels to be searched, got {rows}."
        )
    if q.codes.min() < 0 or q.codes.max() >= q.levels:
        raise checks.InputError(
            f"`q` must have codes from 0 to {q.levels - 1}, got some from {q.codes.min()} to {q.codes.max()}."
        )
    size = q.group_size if isinstance(q.group_size, int) else rows
    group = np.arange(rows) // size
    by_row = weights, q.codes, q.scale[group], q.zero_point[group]
    columns, codes, scale, zero_point = (np.ascontiguousarray(values.reshape(rows, -1).T) for values in by_row)
    parts = []
    for tile in tiles(1, rows, len(columns)):  # one after another, since nothing can interrupt a kernel
        start, steps, offsets = (values[None, tile.where] for values in (codes, scale, zero_point))
        parts.append(exact.search(columns[None, tile.where], G[None], start, steps, offsets, q.levels, limit))
    joined = {name: np.concatenate([vars(part)[name][0] for part in parts]) for name in vars(parts[0])}
    return Certificate(**{**joined, "codes": np.ascontiguousarray(joined["codes"].T).reshape(weights.shape)})
