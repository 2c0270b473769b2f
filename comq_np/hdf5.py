"""HDF5 with care: reading that says what is wrong and where.

The only module that imports h5py. Whatever h5py or the operating system raises comes out as a `FileError`.

Files may come from strangers, and HDF5 is a language: its links lead to other files, its datasets may be views of
others, of any size and behind filters that are loaded as plugins, and its library trusts some of what it reads. So each
object is looked at before it is used: only hard links are followed, only whole numbers and text are read of attributes,
only plain numbers that are there in full of datasets.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from comq_np import checks, chunks, digests, heaps
from comq_np.version import __version__

Path = str | os.PathLike[str]
File: TypeAlias = h5py.File
Group: TypeAlias = h5py.Group
Dataset: TypeAlias = h5py.Dataset
Entry = TypeVar("Entry")

#: Version that is written; those from 1 on are read.
VERSION = 2
#: What h5py raises when the operating system, HDF5 or the bytes in the file fail it.
FAILURES = (OSError, RuntimeError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError)
#: Bytes of the longest text of an attribute: some objects hold no longer ones, and no name of a layer needs it.
MAX_TEXT = 2**14
#: Bytes that any array may have, and how many times the size of its file it may have, if it is compressed.
SMALL, INFLATION = 2**24, 32
#: Letters of a text that a message shows.
LONG = 60
DAMAGED = "is damaged: it has another SHA-256 than when it was written"
#: Bytes that a chunk must have at least: a file may hold more of less than one can look at.
LEAST_CHUNK = 1024
#: Bytes that gzip may add to a chunk that it cannot make shorter, beside as many again.
SPARE = 1024


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
    text = checks.visible(" ".join(str(getattr(error, "strerror", None) or said).split()))
    system = re.search(r"error message = '([^']+)'", text)
    return system[1] if system else text.rstrip(".") or type(error).__name__


def create(path: pathlib.Path, form: str) -> h5py.File:
    """Create a file in which HDF5 keeps checksums of its structures, as from version 1.8 on, and no times.

    It has no buffer for small arrays: where that cannot be flushed, closing the file crashes.
    """
    access, creation = h5py.h5p.create(h5py.h5p.FILE_ACCESS), h5py.h5p.create(h5py.h5p.FILE_CREATE)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_sieve_buf_size(0)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_LATEST)
    creation.set_obj_track_times(False)
    opened = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(h5py.File(opened))
        fill(file, {"format": form, "version": VERSION, "software": f"comq_np {__version__}"})
        stack.pop_all()
    return file


def new_group(file: Group, place: str) -> Group:
    """Create a group, and what is above it, without the times that HDF5 would note."""
    creation = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    creation.set_obj_track_times(False)
    *above, name = place.split("/")
    parent = file
    for part in above:
        parent = parent[part] if part in parent else new_group(parent, part)
    return Group(h5py.h5g.create(parent.id, name.encode(), gcpl=creation))


def copy_group(source: Group, place: str, file: Group, to: str) -> None:
    """Copy a group of one file into a group of another, which is made if it is missing."""
    above, _, name = to.rpartition("/")
    source.copy(place, file[above] if above in file else new_group(file, above), name)


def fill(
    group: Group,
    attributes: Mapping[str, int | str],
    arrays: Mapping[str, npt.NDArray[Any] | str | None] | None = None,
) -> None:
    """Put attributes and datasets, but those that are None, into a group, and the digests of all of them."""
    datasets = {name: _little_endian(value) for name, value in (arrays or {}).items() if value is not None}
    for name, value in datasets.items():
        if isinstance(value, str):
            group.create_dataset(name, data=value.encode(), dtype=_text_type(value))
        else:
            group[name] = value
    known = _digests(group) | digests.of(datasets) | digests.of(attributes)
    for name, given in {**attributes, digests.DIGESTS: digests.to_text(known)}.items():
        if isinstance(given, str):  # of fixed length: it stands beside its name, and not in a heap without a checksum
            group.attrs.create(name, given.encode(), dtype=_text_type(given))
        else:
            group.attrs[name] = given


def _text_type(text: str) -> np.dtype[Any]:
    found: np.dtype[Any] = h5py.string_dtype("utf-8", max(1, len(text.encode())))
    return found


def _little_endian(value: npt.NDArray[Any] | str) -> npt.NDArray[Any] | str:
    return value if isinstance(value, str) else np.asarray(value, value.dtype.newbyteorder("<"))


def check_text(name: str, value: object) -> None:
    """Refuse what an HDF5 attribute cannot hold as text."""
    if not isinstance(value, str):
        raise checks.InputError(f"`{name}` must be a string, got {value!r}.")
    if "\0" in value or not _is_unicode(value):
        raise checks.InputError(f"`{name}` must be text that UTF-8 can hold, without NUL, got {value!r}.")
    if len(value.encode()) > MAX_TEXT:
        raise checks.InputError(f"`{name}` must have at most {MAX_TEXT} bytes in UTF-8, got {len(value.encode())}.")


def _is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_file(path: Path, formats: tuple[str, ...]) -> h5py.File:
    """File of one of the `formats`, open for reading."""
    place = pathlib.Path(checks.path("path", path))
    with reading(path), contextlib.ExitStack() as stack:
        if place.is_dir():
            raise checks.FileError(f"{os.fspath(path) or repr('')}: cannot be read: it is a folder.")
        if not place.exists():
            raise checks.FileError(f"{path}: there is no such file.")
        if not place.is_file():
            raise checks.FileError(f"{path}: cannot be read: it is a device or a pipe.")
        file = stack.enter_context(h5py.File(path, "r"))
        (found, shown), (version, number) = (_value(file, name) for name in ("format", "version"))
        if not isinstance(found, str) or found not in formats:
            wanted = formats[0] if len(formats) == 1 else "comq_np"
            raise checks.FileError(f"{path}: must be a {wanted} file, its `format` is {shown}.")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise checks.FileError(f"{path}: must have `version` 1 to {VERSION} of {found}, has {number}.")
        stack.pop_all()
    return file


def broken(place: Group | Dataset, what: str) -> checks.FileError:
    """Error that says where in which file something is not as it must be."""
    return checks.FileError(f"{place.file.filename}: {place.name}: {what}.")


@contextlib.contextmanager
def _within(place: Group | Dataset, what: str) -> Iterator[None]:
    """Turn what h5py raises inside into a `FileError` that names the place in the file."""
    try:
        yield
    except checks.FileError:
        raise
    except FAILURES as error:
        raise broken(place, f"{what}: {_reason(error)}") from error


def holds(group: Group, name: str) -> bool:
    """Whether a group has a member of that name; if it has digests, they must know it, too."""
    there, known = group.id.links.exists(name.encode()), _digests(group)
    if known and there != (name in known):
        raise broken(group, f"must {'not ' * there}have a member {name!r}, as its `{digests.DIGESTS}` says")
    return bool(there)


def member(group: Group, name: str) -> Group | Dataset | None:
    """Group or dataset that is in the group itself: no link leads elsewhere, least of all to another file."""
    link = name.encode()
    if not group.id.links.exists(link):
        return None
    if group.id.links.get_info(link).type != h5py.h5l.TYPE_HARD:
        raise broken(group, f"must hold {name!r} itself, has a link in its place that leads elsewhere")
    with _within(group, f"its member {name!r} cannot be read"):
        found = group[name]
    return found if isinstance(found, h5py.Group | h5py.Dataset) else None


def subgroup(parent: Group, name: str) -> Group:
    """Group `name` of `parent`."""
    group = member(parent, name)
    if not isinstance(group, h5py.Group):
        raise broken(parent, f"must have a group {name!r}")
    return group


def numbered(file: Group, name: str) -> list[Group]:
    """Groups 0, 1, ... in the group `name`, which an empty file lacks; as many as the file says, if it says so."""
    parent = subgroup(file, name) if file.id.links.exists(name.encode()) else None
    groups = [] if parent is None else [subgroup(parent, str(number)) for number in range(len(parent))]
    if len(set(groups)) < len(groups):
        raise broken(file, f"must hold each of its {name} under one number only")
    if name in _digests(file) and attribute(file, name, int) != len(groups):
        raise broken(file, f"must hold {attribute(file, name, int)} {name}, holds {len(groups)}")
    return groups


def attribute(group: Group, name: str, kind: type[Entry]) -> Entry:
    """Attribute of that type, str or int."""
    value, shown = _value(group, name)
    if not isinstance(value, kind):
        raise broken(group, f"must have an attribute {name!r} of type {kind.__name__}, has {shown}")
    if isinstance(value, int | str) and not _is_intact(group, name, value):
        raise broken(group, f"its attribute {name!r} {DAMAGED}")
    return value


def _value(group: Group, name: str) -> tuple[int | str | None, str]:
    """Attribute, where it is a whole number or text, else None; and how a message shows it."""
    if not h5py.h5a.exists(group.id, name.encode()):
        return None, "None"
    with _within(group, f"its attribute {name!r} cannot be read"):
        found = h5py.h5a.open(group.id, name.encode())
        if found.shape != ():
            return None, "nothing" if found.shape is None else f"an array of shape {found.shape}"
        kind = found.get_type()
        if isinstance(kind, h5py.h5t.TypeStringID):
            return _attribute_text(group, name, kind)
        if isinstance(kind, h5py.h5t.TypeIntegerID) and kind.get_size() <= 8:
            return int(group.attrs[name]), str(group.attrs[name])
    return None, "something else"


def _attribute_text(group: Group, name: str, kind: h5py.h5t.TypeStringID) -> tuple[str, str]:
    """Text of an attribute, and how a message shows it."""
    if kind.is_variable_str():
        text = heaps.of_attribute(*_addresses(group), h5py.h5o.get_info(group.id).addr, name)
    else:
        text = group.attrs[name].decode() if kind.get_size() <= MAX_TEXT else ""
    if max(kind.get_size(), len(text.encode())) > MAX_TEXT:
        raise ValueError(f"it has more than {MAX_TEXT} bytes")
    return text, repr(text if len(text) <= LONG else f"{text[: LONG - 3]}...")


def _addresses(place: Group | Dataset) -> tuple[str, int]:
    """Name of the file, and byte from which on it counts its addresses, which must have 8 bytes each."""
    properties = place.file.id.get_create_plist()
    if properties.get_sizes() != (8, 8):
        raise ValueError("it is read in files with addresses of 8 bytes only")
    return place.file.filename, properties.get_userblock()


def _digests(group: Group) -> dict[str, str]:
    """Digests that a group holds of what is in it; files of others have none, and those before there were any."""
    text, shown = _value(group, digests.DIGESTS)
    if text is None and shown == "None":
        return {}
    try:
        return digests.from_text(str(text))
    except (ValueError, RecursionError):
        raise broken(group, f"must have JSON in its attribute {digests.DIGESTS!r}, has {shown}") from None


def _is_intact(group: Group, name: str, value: digests.Value) -> bool:
    """Whether a member of a group is what it was when it was written, as far as the group tells."""
    known = _digests(group)
    return not known or known.get(name) == digests.digest(value)


def text(group: Group, name: str) -> str:
    """Text of a dataset."""
    found = member(group, name)
    kind = found.id.get_type() if isinstance(found, h5py.Dataset) and found.shape == () else None
    if found is None or not isinstance(kind, h5py.h5t.TypeStringID):
        raise broken(group, f"must have a text `{name}`")
    variable = kind.is_variable_str()
    _check_storage(found, heaps.REFERENCE.size if variable else kind.get_size())
    with _within(found, "cannot be read"):
        value = heaps.of_dataset(*_addresses(found), found.id.get_offset()) if variable else found[()].decode()
    if not _is_intact(group, name, value):
        raise broken(found, DAMAGED)
    return value


def dataset(
    group: Group, name: str, dtype: npt.DTypeLike, shape: tuple[int | None, ...], batched: bool = False
) -> Dataset:
    """Dataset of that shape, None for any length, and that type, or one that it holds without loss.

    If `batched`, there may be an axis of problems before the others.
    """
    found = member(group, name)
    if not isinstance(found, h5py.Dataset):
        raise broken(group, f"must have a dataset {name!r}")
    size = found.shape or ()
    own = size[len(size) - len(shape) :] if batched and len(size) == len(shape) + 1 else size
    fits = len(own) == len(shape) and all(n in (None, m) for n, m in zip(shape, own, strict=True))
    wanted = "[any,] " * batched + ", ".join("any" if n is None else str(n) for n in shape) + "," * (len(shape) == 1)
    if not fits or 0 in size:
        raise broken(found, f"must have shape ({wanted}), has {found.shape}")
    kind = _number_type(found)
    if kind is None or not np.can_cast(kind, dtype):
        raise broken(found, f"must hold {np.dtype(dtype)}, holds {'no plain numbers' if kind is None else kind}")
    _check_storage(found, math.prod(size) * kind.itemsize)
    return found


def _number_type(found: Dataset) -> np.dtype[Any] | None:
    """Type of a dataset, if it is one of NumPy's for real numbers, whose bytes need no conversion."""
    try:
        kind: np.dtype[Any] = found.dtype
        same = found.id.get_type().equal(h5py.h5t.py_create(kind))
    except FAILURES:
        return None
    return kind if same and kind.kind in "iuf" else None


def _check_storage(found: Dataset, size: int) -> None:
    """Refuse a dataset of so many bytes, unless they are all in this file, and are not too many for it."""
    properties = found.id.get_create_plist()
    layout, whole = properties.get_layout(), found.file.id.get_filesize()
    if layout == h5py.h5d.VIRTUAL or properties.get_external_count():
        raise broken(found, "must be in this file, is a view of others")
    filters = _filters(found)
    if not chunks.FILTERS.keys() >= set(filters):
        raise broken(found, f"must have no filter but {', '.join(chunks.FILTERS.values())}, has numbers {filters}")
    limit, chunk = max(SMALL, INFLATION * whole), _chunk_bytes(found)
    if max(size, chunk) > limit:
        most = f"{limit:,} bytes, {INFLATION} times those of the file or {SMALL:,}"
        raise broken(found, f"must have at most {most}, has {max(size, chunk):,}")
    if layout == h5py.h5d.CHUNKED and chunk < min(size, LEAST_CHUNK):
        raise broken(found, f"must have chunks of at least {LEAST_CHUNK} bytes, has some of {chunk}")
    stored = found.id.get_storage_size()
    if layout != h5py.h5d.CHUNKED and (stored != size or stored > whole):
        raise broken(found, f"must have all of its {size} bytes in the file, has {stored}")


def _filters(found: Dataset) -> list[int]:
    """Numbers of the filters of a dataset, in the order in which they were applied."""
    properties = found.id.get_create_plist()
    return [properties.get_filter(k)[0] for k in range(properties.get_nfilters())]


def _chunk_bytes(found: Dataset) -> int:
    return math.prod(found.chunks) * found.id.get_type().get_size() if found.chunks else 0


def array(
    group: Group, name: str, dtype: npt.DTypeLike, shape: tuple[int | None, ...], batched: bool = False
) -> npt.NDArray[Any]:
    """Finite numbers of such a dataset."""
    found = dataset(group, name, dtype, shape, batched)
    with _within(found, "cannot be read"):
        stored: npt.NDArray[Any] = _from_chunks(found) if found.chunks else found[()]
    if not _is_intact(group, name, stored):
        raise broken(found, DAMAGED)
    values: npt.NDArray[Any] = stored.astype(dtype, copy=False)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise broken(found, "must be finite")
    return values


def _from_chunks(found: Dataset) -> npt.NDArray[Any]:
    """Array of a chunked dataset, of which HDF5 only says where in the file the chunks are."""
    values, filters, size = np.empty(found.shape, found.dtype), _filters(found), _chunk_bytes(found)
    path, base = _addresses(found)
    if base:  # versions of HDF5 count from different places there
        raise ValueError("chunks are not read from a file that begins with a block of its user")
    with open(path, "rb") as file:
        for corner in itertools.product(*map(range, itertools.repeat(0), found.shape, found.chunks)):
            place = found.id.get_chunk_info_by_coord(corner)
            if place.byte_offset is None or place.size > 2 * size + SPARE:
                raise ValueError(f"there is no chunk of at most {2 * size + SPARE} bytes at {corner}")
            file.seek(place.byte_offset)
            chunk = chunks.decode(file.read(place.size), filters, place.filter_mask, size, values.itemsize)
            part = np.frombuffer(chunk, found.dtype).reshape(found.chunks)
            inside = tuple(slice(0, n - start) for n, start in zip(found.shape, corner, strict=True))
            to = tuple(slice(start, start + step) for start, step in zip(corner, found.chunks, strict=True))
            values[to] = part[inside]
    return values
