"""Calibration files of one model, made on several machines, as one."""

from __future__ import annotations

import contextlib
import graphlib
import itertools
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from comq_np import checks
from comq_np.calibration import Parameters
from comq_np.counts import TokenCounts
from comq_np.crossgram import CrossGram
from comq_np.gram import Gram
from comq_np.gramfile import AnyGram
from comq_np.modalities import NamedGrams
from comq_np.store import CalibrationFile, CalibrationWriter, Layer, Path


def merge_files(paths: Iterable[Path], merged: Path, *, progress: bool = False) -> None:
    """Merge calibration files of one model: their Grams, of the inputs of other batches each, are added up.

    A layer that only some of the files hold, because no batch of the others reached it, is taken from these. The order
    of `paths` makes no difference but for the rounding of sums in float64. One layer is in memory at a time.

    Parameters
    ----------
    paths : iterable of str or path-like
        Calibration files to read, at least two.
    merged : str or path-like
        Calibration file to write, another one; it is put in its place when complete.
    progress : bool
        Whether to show a progress bar on standard error.

    Raises
    ------
    InputError
        If `paths` are fewer than two files, one of them comes twice, or `merged` is one of them.
    FileError
        If a file cannot be read or written, or a layer has another weight, bias, kind or grid of its inputs in another
        file, another place in the order of the layers, or is skipped in one of them alone.

    Examples
    --------
    >>> import comq_np, numpy as np, os, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> a, b, c = (os.path.join(folder, name) for name in ("a.h5", "b.h5", "c.h5"))
    >>> for path, inputs in ((a, [[1.0, 2.0]]), (b, [[3.0, 0.0], [0.0, 1.0]])):
    ...     gram = comq_np.Gram(2)
    ...     gram.update(inputs)
    ...     with comq_np.CalibrationWriter(path) as file:
    ...         file.add(comq_np.Layer("fc", np.ones((2, 3), np.float32), gram))
    >>> comq_np.merge_files([a, b], c)
    >>> with comq_np.CalibrationFile(c) as file:
    ...     file["fc"].gram.count
    3
    """
    names = _checked(paths, merged)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(CalibrationFile(name)) for name in names}
        order, skipped = _order(files), _skipped(files)
        writer = stack.enter_context(CalibrationWriter(merged, order=order))
        for layer, reason in skipped.items():
            writer.skip(layer, reason)
        order = [layer for layer in order if layer not in skipped]
        grams = [{row["layer"]: row["gram"] for row in file.describe()} for file in files.values()]
        sharing: dict[object, list[str]] = {}  # by the Grams that they share in all files
        for layer in order:
            sharing.setdefault(tuple(of.get(layer) for of in grams), []).append(layer)
        with tqdm(desc="merge", unit="layer", total=len(order), disable=not progress) as bar:
            for layers in sharing.values():
                gram = None
                for layer in layers:
                    found = _common(layer, files)
                    gram = gram or _sum(layer, files, found.weight.shape[:-1])
                    writer.add(Layer(layer, found.weight, gram, found.bias, found.kind))
                    bar.update()


def _checked(paths: Iterable[Path], merged: Path) -> list[str]:
    """Names of the files to merge."""
    if isinstance(paths, str | bytes | os.PathLike):
        raise checks.InputError(f"`paths` must be at least two files, got one path, {os.fspath(paths)!r}.")
    try:
        names = [checks.path("paths", path) for path in paths]
    except TypeError:
        raise checks.InputError(f"`paths` must be at least two files, got {paths!r}.") from None
    if len(names) < 2:
        raise checks.InputError(f"`paths` must be at least two files, got {names}.")
    places = [os.path.realpath(name) for name in names]
    twice = [name for name, place in zip(names, places, strict=True) if places.count(place) > 1]
    if twice:
        raise checks.InputError(f"`paths` must be different files, got {twice[0]!r} more than once.")
    if os.path.realpath(checks.path("merged", merged)) in places:
        raise checks.InputError(f"`merged` must be another file than those in `paths`, got {os.fspath(merged)!r}.")
    return names


def _order(files: dict[str, CalibrationFile]) -> list[str]:
    """Names of all layers, in an order that is the one of every file; where the files leave it open, by name."""
    before: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for file in files.values():
        for name in file._names:
            before.add(name)
        for first, second in itertools.pairwise(file._names):
            before.add(second, first)
    try:
        before.prepare()
    except graphlib.CycleError as error:
        first, second = error.args[1][:2]
        raise checks.FileError(
            f"{', '.join(files)}: must hold their layers in one order, but {first!r} and {second!r} come in either."
        ) from None
    order, ready = [], list(before.get_ready())
    while ready:
        ready.sort(reverse=True)
        order.append(ready.pop())
        before.done(order[-1])
        ready += before.get_ready()
    return order


def _skipped(files: dict[str, CalibrationFile]) -> dict[str, str]:
    """Layers that are not to be quantized, in none of the files, and why."""
    skipped = {layer: reason for file in files.values() for layer, reason in file.skipped.items()}
    for layer in skipped:
        for name, file in files.items():
            if layer in file:
                raise checks.FileError(f"{name}: layer {layer!r} must be skipped, as it is in another file.")
    return skipped


def _sum(layer: str, files: dict[str, CalibrationFile], shape: tuple[int, ...]) -> AnyGram:
    """Sum of the Grams of a layer with so many rows, (m,) or (b, m)."""
    first, *others = (name for name, file in files.items() if layer in file)
    total: Any = None
    for name in (first, *others):
        found: Any = files[name]._gram_of(layer, shape)
        total = _empty(found) if total is None else total
        if type(found) is not type(total):
            raise checks.FileError(f"{name}: layer {layer!r} must have a Gram of the kind that it has in {first}.")
        if isinstance(found, CrossGram) and found.grid != total.grid:
            raise checks.FileError(
                f"{name}: layer {layer!r} must have its inputs on the grid that they have in {first}, {total.grid}, "
                f"has {found.grid}."
            )
        total.merge(found)
        del found  # before the next one is read
    whole: AnyGram = total
    return whole


def _empty(gram: AnyGram) -> AnyGram:
    """Gram of the same kind that has seen nothing."""
    if isinstance(gram, TokenCounts):
        return TokenCounts(len(gram))
    if isinstance(gram, NamedGrams):
        return NamedGrams(len(gram), list(gram.grams), gram.problems)
    if isinstance(gram, CrossGram):
        return CrossGram(len(gram), gram.problems, gram.grid)
    return Gram(len(gram), gram.problems)


def _common(layer: str, files: dict[str, CalibrationFile]) -> Parameters:
    """Parameters of a layer, which are the same in all of the files that hold it."""
    first, *others = (name for name, file in files.items() if layer in file)
    made = files[first]._parameters_of(layer)
    for name in others:
        for field, one, other in zip(Parameters._fields, made, files[name]._parameters_of(layer), strict=True):
            if not _equal(one, other):
                raise checks.FileError(f"{name}: layer {layer!r} must have the {field} that it has in {first}.")
    return made


def _equal(one: str | npt.NDArray[np.float32] | None, other: str | npt.NDArray[np.float32] | None) -> bool:
    """Whether two parameters are the same, arrays to the bit."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one.view(np.uint32), other.view(np.uint32))
    return one is other is None or (isinstance(one, str) and one == other)
