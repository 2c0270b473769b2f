"""Grams of named groups of batches, such as images and texts, balanced so that the outputs of each count alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.gram import Gram

Float64 = npt.NDArray[np.float64]


class NamedGrams:
    """Grams of a layer's inputs from named groups of batches: one `Gram` for each name.

    Of a group with many samples, or large ones, a sum of all Grams would tell little else. So each Gram is divided by
    what its own outputs amount to, which minimises the sum of the relative errors of all groups,
    ``sum_g ||X_g @ Wq - X_g @ W||**2 / ||X_g @ W||**2``. Since that depends on the weights, the Grams are kept apart
    until these are solved.

    Parameters
    ----------
    m : int >= 1
        Width of the inputs.
    names : iterable of str
        Names of the groups, at least one.
    problems : int >= 1, optional
        Number of problems, as in `Gram`.

    Raises
    ------
    InputError
        If an argument is not as described above.

    Examples
    --------
    >>> import comq_np
    >>> grams = comq_np.NamedGrams(1, ["image", "text"])
    >>> grams.update("image", [[10.0], [10.0], [10.0]])
    >>> grams.update("text", [[1.0]])
    >>> grams.counts
    {'image': 3, 'text': 1}
    >>> q = comq_np.solve([[2.0]], grams.balanced([[2.0]]), bits=2)
    """

    def __init__(self, m: int, names: Iterable[str], problems: int | None = None) -> None:
        self._grams = {name: Gram(m, problems) for name in group_names(names)}

    @classmethod
    def from_grams(cls, grams: Mapping[str, Gram]) -> NamedGrams:
        """Take Grams that there are, which are not copied.

        Parameters
        ----------
        grams : mapping from str to Gram
            Gram of each group, all of one width and number of problems.

        Returns
        -------
        NamedGrams
            Those.

        Raises
        ------
        InputError
            If it is no such mapping.

        Examples
        --------
        >>> import comq_np
        >>> list(comq_np.NamedGrams.from_grams({"image": comq_np.Gram(2), "text": comq_np.Gram(2)}).counts)
        ['image', 'text']
        """
        if not isinstance(grams, Mapping) or not all(isinstance(gram, Gram) for gram in grams.values()):
            raise checks.InputError(f"`grams` must map names to comq_np.Gram, got {grams!r}.")
        group_names(grams)
        if len({(len(gram), gram.problems) for gram in grams.values()}) > 1:
            raise checks.InputError(f"`grams` must be of one width and number of problems, got {dict(grams)}.")
        made = cls.__new__(cls)
        made._grams = dict(grams)
        return made

    def update(self, name: str, X: npt.ArrayLike, fold: int | None = None) -> None:
        """Add samples of a group.

        Parameters
        ----------
        name : str
            Name of the group.
        X : array_like of real, shape (..., [b,] m)
            Inputs of the layer, as in `Gram.update`.
        fold : {0, 1}, optional
            Fold to add all of them to.

        Raises
        ------
        InputError
            If there is no such group, or as `Gram.update` does.

        Examples
        --------
        >>> import comq_np
        >>> grams = comq_np.NamedGrams(2, ["image", "text"])
        >>> grams.update("text", [[1.0, 2.0]])
        >>> grams.count
        1
        """
        if name not in self._grams:
            raise checks.InputError(f"`name` must be one of {', '.join(map(repr, self._grams))}, got {name!r}.")
        self._grams[name].update(X, fold)

    def merge(self, other: NamedGrams) -> None:
        """Add the samples of others, group by group; groups that are new come last.

        Parameters
        ----------
        other : NamedGrams
            Those of the same width, and as many problems.

        Raises
        ------
        InputError
            If they are not.

        Examples
        --------
        >>> import comq_np
        >>> one, two = comq_np.NamedGrams(1, ["image"]), comq_np.NamedGrams(1, ["text"])
        >>> two.update("text", [[1.0]])
        >>> one.merge(two)
        >>> one.counts
        {'image': 0, 'text': 1}
        """
        if not isinstance(other, NamedGrams):
            raise checks.InputError(f"`other` must be NamedGrams, got {type(other).__name__!r}.")
        for name, gram in other._grams.items():
            into = self._grams.get(name) or Gram(len(self), self.problems)
            into.merge(gram)
            self._grams[name] = into

    def balanced(self, W: npt.ArrayLike, centred: bool = False) -> Gram:
        """Sum of the Grams, each times a weight by which its outputs amount to as much as those of the others.

        Group g has the weight ``c / ||X_g @ W||**2``, with one `c` for all by which the samples keep their total
        weight. A group without outputs that differ from 0 has none.

        Parameters
        ----------
        W : array_like of real, shape ([b,] m, n)
            Weights of the layer.
        centred : bool
            Whether the outputs count from their mean in each group, as for `solve` with ``fit_bias``.

        Returns
        -------
        Gram
            For `solve`; files hold no samples with weights.

        Raises
        ------
        InputError
            If `W` does not have that shape.

        Examples
        --------
        >>> import comq_np
        >>> grams = comq_np.NamedGrams(1, ["image", "text"])
        >>> grams.update("image", [[3.0]])
        >>> grams.update("text", [[1.0]])
        >>> grams.balanced([[1.0]]).matrix.round(12)
        array([[3.6]])
        """
        sizes = self._sizes(self._weights(W), checks.boolean("centred", centred))
        found = {name: self._grams[name] for name, size in sizes.items() if size > 0}
        shares = {name: 1 / sizes[name] for name in found}
        if not found:
            found = self._grams
            shares = dict.fromkeys(found, 1.0)
        mass = sum(share * found[name].count for name, share in shares.items())
        scale = self.count / mass if mass else 1.0
        return Gram._weighted([(scale * shares[name], gram) for name, gram in found.items()])

    def errors(
        self,
        W: npt.ArrayLike,
        Wq: npt.ArrayLike,
        bias_shift: npt.ArrayLike | None = None,
        part: slice = slice(None),
    ) -> dict[str, float]:
        """Relative error of the outputs of each group.

        Parameters
        ----------
        W : array_like of real, shape ([b,] m, n)
            Weights of the layer.
        Wq : array_like of real, shape ([b,] m, n), or of fewer columns
            What they became.
        bias_shift : array_like of real, shape ([b,] n), optional
            What was added to the bias. With it, the outputs that the error is relative to count from their mean.
        part : slice
            Which columns `Wq` has; the errors are then those of these, relative to the outputs of all.

        Returns
        -------
        dict of float
            ``||X_g @ Wq + bias_shift - X_g @ W||**2 / ||X_g @ W||**2`` by name, of the groups that have samples;
            infinite where only the outputs are 0.

        Raises
        ------
        InputError
            If `W` does not have that shape.

        Examples
        --------
        >>> import comq_np
        >>> grams = comq_np.NamedGrams(1, ["image", "text"])
        >>> grams.update("image", [[3.0]])
        >>> grams.errors([[1.0]], [[0.5]])
        {'image': 0.25}
        """
        weights, found = self._weights(W), {}
        E = weights[..., part] - np.asarray(Wq, np.float64)
        for name, size in self._sizes(weights, bias_shift is not None).items():
            gram = self._grams[name]
            error = float(np.vdot(E, gram.matrix @ E))
            if bias_shift is not None:
                shift = np.asarray(bias_shift, np.float64)
                mean = np.einsum("...m,...mn->...n", gram.mean, E)
                error += gram.count * float(np.vdot(shift, shift) - 2 * np.vdot(shift, mean))
            error = max(error, 0.0)
            found[name] = error / size if size else float(np.inf if error else 0)
        return found

    def _weights(self, W: npt.ArrayLike) -> Float64:
        shape = (len(self),) if self.problems is None else (self.problems, len(self))
        weights = checks.real_array("W", W, (len(shape) + 1,)).astype(np.float64)
        if weights.shape[:-1] != shape:
            raise checks.InputError(f"`W` must have shape ({', '.join(map(str, shape))}, n), got {weights.shape}.")
        return weights

    def _sizes(self, W: Float64, centred: bool) -> dict[str, float]:
        """What the outputs of each group with samples amount to, from their mean if that tells anything."""
        sizes = {}
        for name, gram in self._grams.items():
            if gram.count:
                size = float(np.vdot(W, gram.centred @ W)) if centred else 0.0
                sizes[name] = size if size > 0 else max(float(np.vdot(W, gram.matrix @ W)), 0.0)
        return sizes

    @property
    def grams(self) -> dict[str, Gram]:
        """Gram of each group, not copied."""
        return dict(self._grams)

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of each group."""
        return {name: gram.count for name, gram in self._grams.items()}

    @property
    def count(self) -> int:
        """Number of samples of all groups."""
        return sum(gram.count for gram in self._grams.values())

    @property
    def problems(self) -> int | None:
        """Number of problems; None for one without an axis for it."""
        return next(iter(self._grams.values())).problems

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        return sum(gram.nbytes for gram in self._grams.values())

    def __len__(self) -> int:
        return len(next(iter(self._grams.values())))

    def __repr__(self) -> str:
        problems = "" if self.problems is None else f"problems={self.problems}, "
        return f"NamedGrams({len(self)}, {problems}counts={self.counts})"


def group_names(names: Iterable[str]) -> list[str]:
    """Names of groups, checked."""
    found = [names] if isinstance(names, str) else list(names)
    if not found or not all(isinstance(name, str) and name for name in found) or len({*found}) < len(found):
        raise checks.InputError(f"`names` must be different names of groups, at least one, got {found!r}.")
    return found
