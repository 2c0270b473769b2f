"""One Gram for layers that always get the same input, found out while the inputs go by.

Layers whose inputs may be the same start as one group. They stay together as long as each tensor that one of them
gets is got by all; where that fails, those that got it part from the rest. No input is kept for longer than that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from torch import Tensor

from comq_np import Gram


@dataclass
class Pending:
    """An input that some layers of a group have got: these, what it was, and what it adds to their Gram."""

    tensor: Tensor
    version: int
    increment: Gram
    takers: set[str]

    def fits(self, name: str, x: Tensor) -> bool:
        """Whether the layer now gets the very same input, and for the first time."""
        return name not in self.takers and x is self.tensor and _version(x) == self.version >= 0


@dataclass(eq=False)
class Group:
    """Layers that have got the same inputs so far, apart from the pending one, and the Gram of these."""

    members: set[str]
    gram: Gram
    pending: Pending | None = None


class SharedGrams:
    """The Gram of the inputs of each layer, from its name, what decides with whom it may share, and its width."""

    def __init__(self, layers: Iterable[tuple[str, Hashable, int]]) -> None:
        self._groups: dict[str, Group] = {}
        first: dict[Hashable, Group] = {}
        for name, key, width in layers:
            group = first.get(key)
            if group is None:
                group = first[key] = Group(set(), Gram(width))
            group.members.add(name)
            self._groups[name] = group

    def __getitem__(self, name: str) -> Gram:
        return self._groups[name].gram

    def add(self, name: str, x: Tensor, update: Callable[[Gram], None]) -> None:
        """Add the input `x` of a layer; `update` adds its rows to a Gram, at once, as `x` may change afterwards."""
        group = self._groups[name]
        if group.pending is not None and not group.pending.fits(name, x):
            self._split(group)
            group = self._groups[name]
        if len(group.members) == 1:
            update(group.gram)
            return
        if group.pending is None:
            group.pending = Pending(x, _version(x), Gram(len(group.gram)), set())
            update(group.pending.increment)
        group.pending.takers.add(name)
        if group.pending.takers == group.members:
            group.gram.merge(group.pending.increment)
            group.pending = None

    def end_batch(self) -> None:
        """Part those that got an input of this batch from those that did not."""
        for group in set(self._groups.values()):
            self._split(group)

    def _split(self, group: Group) -> None:
        if group.pending is None:
            return
        takers, gram = group.pending.takers, group.pending.increment
        group.pending = None
        gram.merge(group.gram)
        group.members -= takers
        self._groups.update(dict.fromkeys(takers, Group(takers, gram)))


def _version(x: Tensor) -> int:
    """Number of changes made to the tensor in place; inference tensors do not count them and get -1."""
    return -1 if x.is_inference() else x._version
