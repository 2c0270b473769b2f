"""One Gram for layers that always get the same input, found out while the inputs go by.

Layers whose inputs may be the same start as one group. They stay together as long as each object that one of them
gets is got by all; where that fails, those that got it part from the rest. No input is kept for that.

Who gets what is followed for all layers, whichever of them are wanted: so a Gram is the same to the bit, whatever other
Grams are gathered with it. Where equal geometry means equal inputs, it is for those that share a wanted one.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from comq_np.adapter.interface import WeightLayer
from comq_np.counts import TokenCounts
from comq_np.modalities import NamedGrams

#: `Gram`, `TokenCounts` or `NamedGrams`; those of a group are the same.
AnyGram = Any
#: Makes one that has seen nothing.
New = Callable[[], AnyGram]


@dataclass
class Pending:
    """An input that some layers of a group have got: what it was, these, and what it adds to a Gram that is wanted."""

    x: weakref.ref[Any]
    version: int
    takers: set[str] = field(default_factory=set)
    increment: AnyGram | None = None

    def fits(self, name: str, x: object, version: int) -> bool:
        """Whether the layer now gets the very same input, and for the first time."""
        return name not in self.takers and x is self.x() and version == self.version >= 0


@dataclass(eq=False)
class Group:
    """Layers that have got the same inputs so far, apart from the pending one, and the Gram of these, if wanted."""

    members: set[str]
    new: New
    reached: bool = False
    gram: AnyGram | None = None
    pending: Pending | None = None


def _new_gram(layer: WeightLayer, groups: list[str] | None) -> AnyGram:
    """Empty Gram of a layer, or Grams of named groups; the tokens of a table are counted together."""
    gram = layer.gram()
    return gram if groups is None or isinstance(gram, TokenCounts) else NamedGrams(len(gram), groups, gram.problems)


class SharedGrams:
    """The Grams of the inputs of layers, where those of equal geometry may share one.

    Only those of the `wanted` layers are gathered, and no more than `room` bytes of them: layers that part from others
    where there is no room for a Gram of their own are wanted no more. Those `shared_by_geometry` never part. Of named
    `groups` of batches each has a Gram of its own. Which layers may share one, and what it is, `kind` may say in place
    of that.
    """

    def __init__(
        self,
        layers: Iterable[WeightLayer],
        wanted: Iterable[str] = (),
        room: int | None = None,
        shared_by_geometry: bool = False,
        groups: list[str] | None = None,
        kind: Callable[[WeightLayer], tuple[Hashable, New]] | None = None,
    ) -> None:
        self.wanted = set(wanted)
        self._room = math.inf if room is None else room
        self._by_geometry = shared_by_geometry
        self._groups: dict[str, Group] = {}
        first: dict[Hashable, Group] = {}
        for layer in layers:
            key, new = (layer.geometry, functools.partial(_new_gram, layer, groups)) if kind is None else kind(layer)
            group = self._groups[layer.name] = first.setdefault(key, Group(set(), new))
            group.members.add(layer.name)

    def __getitem__(self, name: str) -> AnyGram | None:
        """Gram of a layer; None where it got no input, or is not wanted."""
        return self._groups[name].gram

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def observed(self) -> set[str]:
        """Layers whose inputs must be seen, at the least: those that are wanted, and all that share with them."""
        return {name for name, group in self._groups.items() if not group.members.isdisjoint(self.wanted)}

    def missed(self, name: str) -> bool:
        """Whether the layer got no input, as far as that was to be seen."""
        group = self._groups[name]
        if name in self.wanted:
            return not (group.gram and group.gram.count)
        return not (group.reached or self._by_geometry)

    def add(self, name: str, x: object, version: int, update: Callable[[AnyGram], None]) -> None:
        """Add an input of a layer; `update` adds its rows to a Gram, at once, as it may change afterwards."""
        group = self._groups[name]
        if group.pending is not None and not group.pending.fits(name, x, version):
            self._split(group)
            group = self._groups[name]
        if len(group.members) == 1:
            group.reached = True
            if name in self.wanted and group.gram is None:
                self._keep(group, group.new())
            if group.gram is not None:
                update(group.gram)
            return
        pending = group.pending = group.pending or Pending(weakref.ref(x), version)
        if name in self.wanted and pending.increment is None:
            pending.increment = group.new()
            update(pending.increment)
        pending.takers.add(name)
        if pending.takers == group.members:
            group.pending, group.reached = None, True
            if group.gram is not None and pending.increment is not None:
                group.gram.merge(pending.increment)
            elif pending.increment is not None:
                self._keep(group, pending.increment)

    def end_batch(self) -> None:
        """Part those that got an input of this batch from those that did not."""
        for group in set(self._groups.values()):
            self._split(group)

    def sets(self) -> list[set[str]]:
        """Layers that share a Gram; of those without any input, the ones that look as if they will.

        These are the ones of one module, as the projections of an expert are.
        """
        found: dict[Hashable, set[str]] = {}
        for name, group in self._groups.items():
            known = group.reached or self._by_geometry
            found.setdefault((group, None if known else name.rpartition(".")[0]), set()).add(name)
        return list(found.values())

    def _split(self, group: Group) -> None:
        """Part those that have got the pending input from the rest."""
        if group.pending is None:
            return
        takers, increment = group.pending.takers, group.pending.increment
        parted = Group(takers, group.new, reached=True)
        group.members, group.pending = group.members - takers, None
        self._groups.update(dict.fromkeys(takers, parted))
        if increment is not None and group.gram is not None:
            increment.merge(group.gram)
        if group.gram is not None and not group.members & self.wanted:
            self._room += group.gram.nbytes
            group.gram = None
        if increment is not None:
            self._keep(parted, increment)

    def _keep(self, group: Group, gram: AnyGram) -> None:
        """Give a group its Gram if there is room for it; else its layers are wanted no more."""
        if gram.nbytes <= self._room:
            self._room -= gram.nbytes
            group.gram = gram
        else:
            self.wanted -= group.members
