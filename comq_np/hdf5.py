"""HDF5 with care: reading that says what is wrong and where.

The only module that imports h5py. Whatever h5py or the operating system raises comes out as a `FileError`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.version import __version__

Path = str | os.PathLike[str]
File: TypeAlias = h5py.File
Group: TypeAlias = h5py.Group
Dataset: TypeAlias = h5py.Dataset
Entry = TypeVar("Entry")
Open = TypeVar("Open", bound="Reader[Any]")

VERSION = 1
#: What h5py raises when the operating system, HDF5 or the bytes in the file fail it.
FAILURES = (OSError, RuntimeError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError)


@contextlib.contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Turn what h5py and the operating system raise inside into a `FileError` that names the file."""
    try:
        yield
    except (checks.InputError, checks.FileError):
        raise
    except FAILURES as error:
        raise checks.FileError(f"{path}: {what}: {_reason(error)}.") from error


def reading(path: Path) -> contextlib.AbstractContextManager[None]:
    """`naming` around everything that is read."""
    return naming(path, "cannot be read as HDF5")


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """`naming` around everything that is written."""
    return naming(path, "cannot be written")


def _reason(error: BaseException) -> str:
    """What happened, on one line and without the name of the file, which HDF5 knows under its partial name only."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(getattr(error, "strerror", None) or said).split())
    system = re.search(r"error message = '([^']+)'", text)
    return system[1] if system else text.rstrip(".") or type(error).__name__


def create(path: pathlib.Path, form: str) -> h5py.File:
    """Create a file, without HDF5's buffer for small arrays: where that cannot be flushed, closing the file crashes."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_sieve_buf_size(0)
    access.set_libver_bounds(h5py.h5f.LIBVER_EARLIEST, h5py.h5f.LIBVER_LATEST)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, fapl=access)))
        file.attrs.update(format=form, version=VERSION, software=f"comq_np {__version__}")
        stack.pop_all()
    return file


def check_text(name: str, value: object) -> None:
    """Refuse what an HDF5 attribute cannot hold as text."""
    if not isinstance(value, str):
        raise checks.InputError(f"`{name}` must be a string, got {value!r}.")
    if "\0" in value or not _is_unicode(value):
        raise checks.InputError(f"`{name}` must be text that UTF-8 can hold, without NUL, got {value!r}.")


def _is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Reader(Mapping[str, Entry], Generic[Entry]):
    """A file open for reading: a mapping from layer names to what it holds of each, read when asked for."""

    _format: str

    def __init__(self, path: Path) -> None:
        self._path = path
        with reading(path), contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open_file(path, (self._format,)))
            groups = numbered(self._file, "layers")
            self._groups = {attribute(group, "name", str): group for group in groups}
            if len(self._groups) < len(groups):
                raise broken(self._file["layers"], "must have a name of its own for each layer")
            stack.pop_all()

    def __enter__(self: Open) -> Open:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file.

        Examples
        --------
        >>> import comq_np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
        >>> with comq_np.QuantizedWriter(path) as file:
        ...     pass
        >>> comq_np.QuantizedFile(path).close()
        """
        with reading(self._path):
            self._file.close()

    def __getitem__(self, name: str) -> Entry:
        group = self._groups[name]
        with reading(self._path):
            return self._read(name, group)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def _read(self, name: str, group: Group) -> Entry:
        """What the file holds of one layer."""
        raise NotImplementedError


def open_file(path: Path, formats: tuple[str, ...]) -> h5py.File:
    """File of one of the `formats`, open for reading."""
    place = pathlib.Path(path)
    with reading(path), contextlib.ExitStack() as stack:
        if place.is_dir():
            raise checks.FileError(f"{os.fspath(path) or repr('')}: cannot be read: it is a folder.")
        if not place.is_file():
            raise checks.FileError(f"{path}: there is no such file.")
        file = stack.enter_context(h5py.File(path, "r"))
        found, version = (_plain(file.attrs.get(name)) for name in ("format", "version"))
        if not isinstance(found, str) or found not in formats:
            wanted = formats[0] if len(formats) == 1 else "comq_np"
            raise checks.FileError(f"{path}: must be a {wanted} file, its `format` is {_shown(found)}.")
        if not isinstance(version, int) or version != VERSION:
            raise checks.FileError(f"{path}: must have `version` {VERSION} of {found}, has {_shown(version)}.")
        stack.pop_all()
    return file


def broken(place: Group | Dataset, what: str) -> checks.FileError:
    """Error that says where in which file something is not as it must be."""
    return checks.FileError(f"{place.file.filename}: {place.name}: {what}.")


def subgroup(parent: Group, name: str) -> Group:
    """Group `name` of `parent`."""
    group = parent.get(name)
    if not isinstance(group, h5py.Group):
        raise broken(parent, f"must have a group {name!r}")
    return group


def numbered(file: Group, name: str) -> list[Group]:
    """Groups 0, 1, ... in the group `name`, which an empty file lacks."""
    if name not in file:
        return []
    parent = subgroup(file, name)
    return [subgroup(parent, str(number)) for number in range(len(parent))]


def attribute(group: Group, name: str, kind: type[Entry]) -> Entry:
    """Attribute of that type, str or int."""
    value = _plain(group.attrs.get(name))
    if not isinstance(value, kind):
        raise broken(group, f"must have an attribute {name!r} of type {kind.__name__}, has {_shown(value)}")
    if isinstance(value, str) and not _is_unicode(value):
        raise broken(group, f"must have UTF-8 in its attribute {name!r}, has {value!r}")
    return value


def _plain(value: object) -> object:
    return int(value) if isinstance(value, np.integer) else value


def _shown(value: object) -> str:
    """`value` in a message, on one line."""
    return f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else repr(value)


def text(group: Group, name: str) -> str:
    """Text of a dataset."""
    found = group.get(name)
    if not isinstance(found, h5py.Dataset) or found.shape != () or h5py.check_string_dtype(found.dtype) is None:
        raise broken(group, f"must have a text `{name}`")
    return str(found.asstr()[()])


def dataset(group: Group, name: str, dtype: npt.DTypeLike, shape: tuple[int | None, ...]) -> Dataset:
    """Dataset of that shape, None for any length, and that type, or one that it holds without loss."""
    found = group.get(name)
    if not isinstance(found, h5py.Dataset):
        raise broken(group, f"must have a dataset {name!r}")
    fits = found.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    wanted = ", ".join("any" if n is None else str(n) for n in shape) + "," * (len(shape) == 1)
    if not fits or found.size == 0:
        raise broken(found, f"must have shape ({wanted}), has {found.shape}")
    if not np.can_cast(found.dtype, dtype):
        raise broken(found, f"must hold {np.dtype(dtype)}, holds {found.dtype}")
    return found


def array(group: Group, name: str, dtype: npt.DTypeLike, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """Finite numbers of such a dataset."""
    found = dataset(group, name, dtype, shape)
    values: npt.NDArray[Any] = found[()].astype(dtype)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise broken(found, "must be finite")
    return values
