"""A file of layers, open for reading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from comq_np import hdf5

#: The attribute of a layer that is not to be quantized: why.
SKIPPED = "skipped"
Entry = TypeVar("Entry")
Open = TypeVar("Open", bound="Reader[Any]")


class Reader(Mapping[str, Entry], Generic[Entry]):
    """A file open for reading: a mapping from layer names to what it holds of each, read when asked for.

    Layers that are not to be quantized are not in it: `skipped` is a dict with the reason why each one is not.
    """

    _format: str

    def __init__(self, path: hdf5.Path) -> None:
        self._path = path
        with hdf5.reading(path), contextlib.ExitStack() as stack:
            self._file = stack.enter_context(hdf5.open_file(path, (self._format,)))
            groups = hdf5.numbered(self._file, "layers")
            self._groups = {hdf5.attribute(group, "name", str): group for group in groups}
            if len(self._groups) < len(groups):
                raise hdf5.broken(groups[0].parent, "must have a name of its own for each layer")
            self._names = list(self._groups)  # of all layers, also those that are not in the mapping
            self.skipped = self._set_aside(SKIPPED)
            stack.pop_all()

    def _set_aside(self, attribute: str) -> dict[str, str]:
        """Take the layers without data out of the mapping: their names, and the reason in that attribute."""
        reasons = {
            name: hdf5.attribute(group, attribute, str)
            for name, group in self._groups.items()
            if attribute in group.attrs
        }
        self._groups = {name: group for name, group in self._groups.items() if name not in reasons}
        return reasons

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
        with hdf5.reading(self._path):
            self._file.close()

    def __getitem__(self, name: str) -> Entry:
        group = self._groups[name]
        with hdf5.reading(self._path):
            return self._read(name, group)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def _read(self, name: str, group: hdf5.Group) -> Entry:
        """What the file holds of one layer."""
        raise NotImplementedError
