"""Grams in HDF5: as a part of a calibration file, and in a file of their own. `store` documents the format."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import checks, hdf5, writing
from comq_np.activations import ActivationGrid
from comq_np.channels import ChannelGrid, InputGrid
from comq_np.counts import CountFold, TokenCounts
from comq_np.crossgram import CrossFold, CrossGram
from comq_np.gram import Fold, Gram
from comq_np.modalities import NamedGrams

GRAM = "comq_np.gram"
#: What may stand in the place of the Gram matrix of a layer's inputs.
AnyGram = Gram | TokenCounts | NamedGrams
FOLDS = ("fold0", "fold1")
#: Grams of named groups of batches, and the attribute that says how many there are.
GROUPS = "groups"


def save_gram(path: hdf5.Path, gram: AnyGram) -> None:
    """Write a Gram, or token counts, to a file of its own.

    Parameters
    ----------
    path : str or path-like
        File to write.
    gram : Gram or TokenCounts
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


def load_gram(path: hdf5.Path) -> AnyGram:
    """Read what `save_gram` wrote.

    Parameters
    ----------
    path : str or path-like
        File to read.

    Returns
    -------
    Gram or TokenCounts
        What was written, equal to the bit.

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
    if not isinstance(gram, AnyGram):
        raise checks.InputError(f"`gram` must be a comq_np.Gram or TokenCounts, got {type(gram).__name__!r}.")
    for one in parts_of(gram).values():
        if isinstance(one, Gram) and [*one._masses] != [fold.count for fold in one.folds]:
            raise checks.InputError("`gram` must hold samples without weights, got one that `NamedGrams` balanced.")


def parts_of(gram: AnyGram) -> dict[str, Gram | TokenCounts]:
    """Gram of each named group of batches that has samples; of one without groups, itself under an empty name."""
    if not isinstance(gram, NamedGrams):
        return {"": gram}
    return {name: part for name, part in gram.grams.items() if part.count or not gram.count}


def write_gram(group: hdf5.Group, gram: AnyGram) -> None:
    """Fill a group with a Gram."""
    if isinstance(gram, NamedGrams):
        parts = parts_of(gram)
        hdf5.fill(group, {GROUPS: len(parts)})
        for number, (name, part) in enumerate(parts.items()):
            place = hdf5.new_group(group, f"{GROUPS}/{number}")
            hdf5.fill(place, {"name": name})
            write_gram(place, part)
        return
    for fold_name, (count, arrays) in zip(FOLDS, folds_of(gram), strict=True):
        hdf5.fill(hdf5.new_group(group, fold_name), {"count": count}, arrays)
    if isinstance(gram, CrossGram) and gram.grid is not None:
        hdf5.fill(group, *grid_of(gram.grid))


def folds_of(gram: Gram | TokenCounts) -> list[tuple[int, dict[str, npt.NDArray[Any]]]]:
    """Samples and arrays of the folds, by the names that these have in the file."""
    folds: tuple[Fold | CountFold, ...] = gram.folds
    more = [fold._asdict() for fold in gram.crosses] if isinstance(gram, CrossGram) else [{}, {}]
    arrays = [{**fold._asdict(), **others} for fold, others in zip(folds, more, strict=True)]
    return [(fold.pop("count"), fold) for fold in arrays]


def grid_of(grid: InputGrid) -> tuple[dict[str, int], dict[str, npt.NDArray[Any]]]:
    """Attributes and arrays that are the grid of a layer's inputs."""
    if isinstance(grid, ChannelGrid):
        arrays: dict[str, npt.NDArray[Any]] = {"activation_scale": grid.scale}
        return {"activation_bits": grid.bits}, {**arrays, "activation_zero_point": grid.zero_point}
    attributes = {"activation_bits": grid.bits, "activation_zero_point": grid.zero_point}
    return attributes, {"activation_scale": np.array([grid.scale], np.float32)}


def read_grid(group: hdf5.Group) -> InputGrid | None:
    """Grid of the inputs that a group holds, if there is one."""
    if not hdf5.holds(group, "activation_scale"):
        return None
    bits = hdf5.attribute(group, "activation_bits", int)
    try:
        if has_channels(group):
            scales = hdf5.array(group, "activation_scale", np.float32, (None,))
            return ChannelGrid(scales, hdf5.array(group, "activation_zero_point", np.uint8, scales.shape), bits)
        zero_point = hdf5.attribute(group, "activation_zero_point", int)
        (scale,) = hdf5.array(group, "activation_scale", np.float32, (1,))
        return ActivationGrid(float(scale), zero_point, bits)
    except checks.InputError as error:
        raise hdf5.broken(group, str(error).rstrip(".")) from error


def has_channels(group: hdf5.Group) -> bool:
    """Whether the grid of the inputs that a group holds has a scale for each channel."""
    return hdf5.member(group, "activation_zero_point") is not None  # of one scale, it is an attribute


def read_gram(group: hdf5.Group) -> AnyGram:
    """Gram that a group holds."""
    if names(group):
        return _read_named(group)
    return _read_counts(group) if is_diagonal(group) else _read_matrices(group)


def is_diagonal(group: hdf5.Group) -> bool:
    """Whether a group holds token counts."""
    if names(group):
        return False
    return hdf5.holds(hdf5.subgroup(group, FOLDS[0]), "counts")


def names(group: hdf5.Group) -> list[str]:
    """Names of the groups of batches that a group holds the Grams of; none where these have no names."""
    if not hdf5.holds(group, GROUPS):
        return []
    return [hdf5.attribute(part, "name", str) for part in hdf5.numbered(group, GROUPS)]


def _read_named(group: hdf5.Group) -> NamedGrams:
    parts = hdf5.numbered(group, GROUPS)
    try:
        return NamedGrams.from_grams({hdf5.attribute(part, "name", str): _read_matrices(part) for part in parts})
    except checks.InputError as error:
        raise hdf5.broken(group, str(error).rstrip(".")) from error


def _read_counts(group: hdf5.Group) -> TokenCounts:
    first, second = (hdf5.subgroup(group, name) for name in FOLDS)
    counts = hdf5.array(first, "counts", np.int64, (None,))
    try:
        found = TokenCounts.from_folds((counts, hdf5.array(second, "counts", np.int64, counts.shape)))
    except checks.InputError as error:
        raise hdf5.broken(group, str(error).rstrip(".")) from error
    for part, fold in zip((first, second), found.folds, strict=True):
        if hdf5.attribute(part, "count", int) != fold.count:
            raise hdf5.broken(part, f"must have a `count` of {fold.count}, the sum of its counts")
    return found


def describe_grid(group: hdf5.Group) -> dict[str, int | str]:
    """Bits of the inputs that a group holds the grid of, "float" if of none, and whether each channel has its own."""
    grid = read_grid(group)
    bits = "float" if grid is None else grid.bits
    return {"activation_bits": bits, **({"activation_axis": "channel"} if isinstance(grid, ChannelGrid) else {})}


def is_crossed(group: hdf5.Group) -> bool:
    """Whether a group holds a Gram with products with the float model's inputs."""
    return not names(group) and hdf5.holds(hdf5.subgroup(group, FOLDS[0]), "apart")


def _read_matrices(group: hdf5.Group) -> Gram:
    def fold(part: hdf5.Group) -> Fold:
        total = hdf5.array(part, "sum", np.float64, (None,), batched=True)
        matrix = hdf5.array(part, "matrix", np.float64, (*total.shape, total.shape[-1]))
        return Fold(matrix, total, hdf5.attribute(part, "count", int))

    def crossed(part: hdf5.Group, shape: tuple[int, ...]) -> CrossFold:
        apart = hdf5.array(part, "apart", np.float64, shape)
        return CrossFold(apart, hdf5.array(part, "exact_sum", np.float64, shape[:-1]))

    parts = [hdf5.subgroup(group, name) for name in FOLDS]
    try:
        first, second = map(fold, parts)
        if not is_crossed(group):
            return Gram.from_folds((first, second))
        one, other = (crossed(part, first.matrix.shape) for part in parts)
        return CrossGram.from_parts((first, second), (one, other), read_grid(group))
    except checks.InputError as error:
        raise hdf5.broken(group, str(error).rstrip(".")) from error


def read_count(group: hdf5.Group) -> int:
    """Samples that the Gram in a group has seen."""
    if names(group):
        return sum(_count(part) for part in hdf5.numbered(group, GROUPS))
    return _count(group)


def _count(group: hdf5.Group) -> int:
    return sum(hdf5.attribute(hdf5.subgroup(group, fold), "count", int) for fold in FOLDS)
