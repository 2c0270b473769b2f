"""Grams in HDF5: as a part of a calibration file, and in a file of their own. `store` documents the format."""

from __future__ import annotations

import numpy as np

from comq_np import checks, hdf5, writing
from comq_np.gram import Fold, Gram

GRAM = "comq_np.gram"
FOLDS = ("fold0", "fold1")


def save_gram(path: hdf5.Path, gram: Gram) -> None:
    """Write a Gram to a file of its own.

    Parameters
    ----------
    path : str or path-like
        File to write.
    gram : Gram
        The Gram, with both of its folds.

    Raises
    ------
    InputError
        If `gram` is no Gram.
    FileError
        If it cannot be written.

    Examples
    --------
    >>> import comq_np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "gram.h5")
    >>> comq_np.save_gram(path, comq_np.Gram(3))
    >>> comq_np.load_gram(path)
    Gram(3, count=0)
    """
    check_gram(gram)
    with writing.at_once(path, GRAM) as file:
        write_gram(file, gram)


def load_gram(path: hdf5.Path) -> Gram:
    """Read what `save_gram` wrote.

    Parameters
    ----------
    path : str or path-like
        File to read.

    Returns
    -------
    Gram
        The Gram, equal to the bit.

    Raises
    ------
    FileError
        If it is no such file.

    Examples
    --------
    >>> import comq_np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "gram.h5")
    >>> gram = comq_np.Gram(1)
    >>> gram.update([[2.0], [3.0]])
    >>> comq_np.save_gram(path, gram)
    >>> comq_np.load_gram(path).matrix
    array([[13.]])
    """
    with hdf5.reading(path), hdf5.open_file(path, (GRAM,)) as file:
        return read_gram(file)


def check_gram(gram: object) -> None:
    """Refuse what is no Gram."""
    if not isinstance(gram, Gram):
        raise checks.InputError(f"`gram` must be a comq_np.Gram, got {type(gram).__name__!r}.")


def write_gram(group: hdf5.Group, gram: Gram) -> None:
    """Fill a group with a Gram."""
    for name, fold in zip(FOLDS, gram.folds, strict=True):
        hdf5.fill(hdf5.new_group(group, name), {"count": fold.count}, {"matrix": fold.matrix, "sum": fold.sum})


def read_gram(group: hdf5.Group) -> Gram:
    """Gram that a group holds."""

    def fold(part: hdf5.Group) -> Fold:
        total = hdf5.array(part, "sum", np.float64, (None,), batched=True)
        matrix = hdf5.array(part, "matrix", np.float64, (*total.shape, total.shape[-1]))
        return Fold(matrix, total, hdf5.attribute(part, "count", int))

    try:
        first, second = (fold(hdf5.subgroup(group, name)) for name in FOLDS)
        return Gram.from_folds((first, second))
    except checks.InputError as error:
        raise hdf5.broken(group, str(error).rstrip(".")) from error


def read_count(group: hdf5.Group) -> int:
    """Samples that the Gram in a group has seen."""
    return sum(hdf5.attribute(hdf5.subgroup(group, fold), "count", int) for fold in FOLDS)
