"""Writing HDF5 files layer by layer, so that nothing finished is lost and no file is ever half there."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from comq_np import checks, durable, hdf5
from comq_np.durable import Run
from comq_np.reader import SKIPPED
from comq_np.version import __version__

Open = TypeVar("Open", bound="Writer")
#: Where the file of one layer has it.
ONLY = "layers/0"


class Writer:
    """A file in the making: layers are finished one by one, leaving the context makes the file of them.

    Each finished layer is a small file of the same format in a folder beside the one that is made. These are copied
    together in the order of the layers, so that the file is the same however often its writing was interrupted.
    """

    _format: str

    def __init__(
        self, path: hdf5.Path, *, run: Run | None = None, order: Iterable[str] | None = None, restart: bool = False
    ) -> None:
        self._path = target(path)
        self._order = None if order is None else _order(order)
        restart = checks.boolean("restart", restart)
        self._parts: dict[str, pathlib.Path] = {}
        with hdf5.writing(self._path):
            self._folder = durable.Folder(self._path, _identity(run, self._format), restart)
            try:
                for part in self._folder.parts:
                    self._take(part)
            except BaseException:
                self._folder.leave()
                raise

    def __enter__(self: Open) -> Open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self._stop(value)
            return
        try:
            with hdf5.writing(self._path), self._new(self._path) as file:
                self._assemble(file)
        except BaseException as error:
            self._stop(error)
            raise
        self._folder.remove()

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def skip(self, name: str, reason: str) -> None:
        """Add a layer that is not to be quantized and stays as it is, float.

        Parameters
        ----------
        name : str
            Name of the layer.
        reason : str
            Why it is not.

        Raises
        ------
        InputError
            If there is a layer of that name, or either is no text that the file can hold.
        FileError
            If it cannot be written. Either way the file stays as it was before.

        Examples
        --------
        >>> import comq_np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "calibration.h5")
        >>> with comq_np.CalibrationWriter(path) as file:
        ...     file.skip("rnn", "no adapter takes recurrent layers apart.")
        >>> with comq_np.CalibrationFile(path) as file:
        ...     len(file), file.skipped
        (0, {'rnn': 'no adapter takes recurrent layers apart.'})
        """
        self._without_data(name, SKIPPED, reason)

    def _without_data(self, name: str, attribute: str, reason: str) -> None:
        """Add a layer of which there is only a reason to be told, in that attribute."""
        self._check_name(name)
        with checks.layer(name):
            hdf5.check_text("reason", reason)
        with self._layer(name) as group:
            hdf5.fill(group, {attribute: reason})

    def _stop(self, error: BaseException) -> None:
        """Give up the file, with a note on the error where there is something to go on from."""
        kept = self._folder.leave()
        if kept:  # as `add_note` of Python 3.11 would
            error.__notes__ = [*getattr(error, "__notes__", ()), kept]

    def _take(self, part: pathlib.Path) -> None:
        """Take over what an earlier run has finished, and drop the rest."""
        with hdf5.open_file(part, (self._format,)) as file:
            group = hdf5.subgroup(file, ONLY)
            name, finished = hdf5.attribute(group, "name", str), self._is_finished(group)
        if finished:
            self._parts[name] = part
        else:
            part.unlink()

    def _is_finished(self, group: hdf5.Group) -> bool:  # noqa: ARG002
        """Whether a layer in the folder needs no more work."""
        return True

    def _check_name(self, name: object) -> None:
        """Refuse a name of a layer that the file cannot hold or holds already."""
        hdf5.check_text("name", name)
        if name in self._parts:
            raise checks.InputError(f"layer {name!r}: a file can hold only one layer of that name.")
        if self._order is not None and name not in self._order:
            raise checks.InputError(f"layer {name!r}: must be one of the {len(self._order)} layers in `order`.")

    @contextlib.contextmanager
    def _layer(self, name: str) -> Iterator[hdf5.Group]:
        """Open the group of a new layer to fill."""
        with hdf5.writing(self._path):
            part = self._folder.next_part()
            with self._new(part) as file:
                group = hdf5.new_group(file, ONLY)
                hdf5.fill(group, {"name": name})
                yield group
        self._parts[name] = part

    def _new(self, path: pathlib.Path) -> contextlib.AbstractContextManager[hdf5.File]:
        return new_file(path, self._folder, self._format)

    def _assemble(self, file: hdf5.File) -> None:
        """Copy the layers together."""
        order = self._parts if self._order is None else [name for name in self._order if name in self._parts]
        for number, name in enumerate(order):
            with hdf5.open_file(self._parts[name], (self._format,)) as part:
                hdf5.copy_group(part, ONLY, file, f"layers/{number}")
                self._complete(file[f"layers/{number}"], part)
        hdf5.fill(file, {"layers": 0, **{name: len(file[name]) for name in file}})

    def _complete(self, group: hdf5.Group, part: hdf5.File) -> None:
        """Add to a layer in the file what its own file could not say."""


def _order(names: Iterable[str]) -> dict[str, None]:
    try:
        return dict.fromkeys(names)
    except TypeError:
        raise checks.InputError(f"`order` must be an iterable of names, got {names!r}.") from None


def target(path: hdf5.Path) -> pathlib.Path:
    """Path of a file to write, which is no folder."""
    place = pathlib.Path(checks.path("path", path))
    with hdf5.writing(place):
        if place.is_dir():
            raise checks.FileError(f"{os.fspath(path) or repr('')}: cannot be written: it is a folder.")
    return place


@contextlib.contextmanager
def at_once(path: hdf5.Path, form: str) -> Iterator[hdf5.File]:
    """Open a file that is written at once, not layer by layer."""
    place = target(path)
    with hdf5.writing(place):
        folder = durable.Folder(place, run=None, restart=False)
        try:
            with new_file(place, folder, form) as file:
                yield file
        finally:
            folder.remove()


@contextlib.contextmanager
def new_file(path: pathlib.Path, folder: durable.Folder, form: str) -> Iterator[hdf5.File]:
    """Open a file that is in its place, and on the disk, when it is complete; after an exception nothing is left of it.

    Until then it is in the folder.
    """
    partial = folder.place / f"{path.name}{durable.PARTIAL}"
    try:
        file = hdf5.create(partial, form)
        try:
            yield file
            file.close()
        finally:  # after a failure, another one is no news
            with contextlib.suppress(*hdf5.FAILURES):
                file.close()
        durable.put(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _identity(run: Run | None, form: str) -> Run | None:
    """What the folder of a run records of it, as JSON gives it back."""
    if run is None:
        return None
    try:
        said = json.loads(json.dumps(dict(run), allow_nan=False))
    except (TypeError, ValueError):
        said = None
    if said is None or set(said) != set(run):  # JSON makes text of any key
        raise checks.InputError(f"`run` must be a dict of text to what JSON can hold, got {run!r}.")
    return {"the format": form, "the version of comq_np": __version__, **said}
