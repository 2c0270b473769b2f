"""The batches, pass after pass, and what tells whether they are the same ones."""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from comq_np.checks import InputError
from comq_np.modalities import group_names

NONE = "`batches` must hold at least one batch, got none."
#: Bytes of one thing in a batch.
Leaf = Callable[[Any], Iterable[Any]]


class Named(NamedTuple):
    """A batch of a group that has a name."""

    group: str
    batch: Any


class Groups:
    """The batches of all named groups, one group after another."""

    def __init__(self, batches: Mapping[str, Iterable[Any]]) -> None:
        self.names = group_names(batches)
        for name, some in batches.items():
            if not _is_iterable(some) or hasattr(some, "shape"):
                raise InputError(f"`batches[{name!r}]` must be an iterable of batches, got {type(some).__name__!r}.")
        self._batches = dict(batches)

    @property
    def once(self) -> bool:
        """Whether they can be gone through only once."""
        return any(isinstance(some, Iterator) for some in self._batches.values())

    def __iter__(self) -> Iterator[Named]:
        for name, some in self._batches.items():
            empty = True
            for batch in some:
                empty = False
                yield Named(name, batch)
            if empty:
                raise InputError(f"`batches[{name!r}]` must hold at least one batch, got none.")

    def __length_hint__(self) -> int:
        known = [operator.length_hint(some) for some in self._batches.values()]
        return sum(known) if all(known) else 0


def _is_iterable(batches: object) -> bool:
    return not isinstance(batches, Mapping) and (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__"))


class Batches:
    """Batches that are gone through several times, if they can be; those of named groups are `Named`."""

    def __init__(self, batches: Iterable[Any] | Mapping[str, Iterable[Any]], leaf: Leaf) -> None:
        self.groups: list[str] | None = None
        if isinstance(batches, Mapping):
            batches = Groups(batches)
            self.groups = batches.names
        elif not _is_iterable(batches):
            raise InputError(f"`batches` must be an iterable of batches, got {type(batches).__name__!r}.")
        self._batches, self._leaf = batches, leaf
        self._begun: Iterator[Any] | None = None
        self._digests: list[str] | None = None

    @property
    def once(self) -> bool:
        """Whether they can be gone through only once."""
        return self._batches.once if isinstance(self._batches, Groups) else isinstance(self._batches, Iterator)

    @property
    def kind(self) -> str:
        """Name of their type."""
        return type(self._batches).__name__

    @property
    def count(self) -> int | None:
        """Number of batches, where it is known."""
        if self._digests is not None:
            return len(self._digests)
        return operator.length_hint(self._batches) or None

    @functools.cached_property
    def first(self) -> Any:
        """The first batch, which the first pass will have all the same."""
        batches = iter(self._batches)
        for batch in batches:
            self._begun = itertools.chain([batch], batches)
            return batch
        raise InputError(NONE)

    def digest_of_first(self) -> str:
        """Digest of the first batch."""
        return digest_of(self.first, self._leaf)

    def one_pass(self, number: int, compare: bool) -> Iterator[Any]:
        """All batches; to `compare`, every pass must have those of the first."""
        batches, self._begun = self._begun or iter(self._batches), None
        before, digests = self._digests, []
        for batch in batches:
            digests.append(digest_of(batch, self._leaf) if compare else "")
            if before is not None and digests[-1:] != before[len(digests) - 1 : len(digests)]:
                raise InputError(
                    f"`batches` must be the same in every pass, as those of a list are: batch {len(digests) - 1} of "
                    f"pass {number} is not that of the first pass."
                )
            yield batch
        if before is not None and len(digests) < len(before):
            raise InputError(
                f"`batches` must be the same in every pass, as those of a list are: the first pass had {len(before)}, "
                f"pass {number} has {len(digests)}."
            )
        if not digests:
            raise InputError(NONE)
        self._digests = digests


def digest_of(batch: object, leaf: Leaf) -> str:
    """SHA-256 of the arrays, numbers and texts in a batch, and of what `leaf` knows; other things are passed over."""
    digest = hashlib.sha256()
    for value in _leaves(batch):
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape} ".encode())
            digest.update(value.tobytes())
        elif isinstance(value, str | bytes | int | float | complex | None):
            digest.update(repr(value).encode("utf-8", "surrogatepass"))
        else:
            for part in leaf(value):
                digest.update(part)
    return digest.hexdigest()


def _leaves(thing: object) -> Iterator[object]:
    if isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from _leaves(key)
            yield from _leaves(value)
    elif isinstance(thing, tuple | list):
        for value in thing:
            yield from _leaves(value)
    else:
        yield thing
