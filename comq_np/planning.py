"""Which Grams to gather together, where those of all layers take more memory than there is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from comq_np import checks, crossgram, gram


@dataclasses.dataclass(frozen=True)
class CalibrationPass:
    """One pass over the calibration batches.

    Parameters
    ----------
    layers : tuple of str
        Layers whose Grams it gathers, in the order of the model.
    grams : int
        Number of Grams; layers with the same inputs share one.
    gram_bytes : int
        Bytes of these Grams.
    memory : int
        Bytes at most, beyond what running the model takes: the Grams, the work on one of them or on what is written of
        one layer, and one more Gram while layers that share theirs wait for each other.
    spare : int, optional
        Bytes that are left of the memory there is; None where that was not said.

    Examples
    --------
    >>> import comq_np
    >>> (only,) = comq_np.plan_calibration({"fc": (64, 10)}).passes
    >>> only.layers, only.grams, only.gram_bytes
    (('fc',), 1, 66560)
    """

    layers: tuple[str, ...]
    grams: int
    gram_bytes: int
    memory: int
    spare: int | None = None


@dataclasses.dataclass(frozen=True)
class CalibrationPlan:
    """Which layers' Grams are gathered in which pass over the calibration batches; its text is for people.

    Parameters
    ----------
    passes : tuple of CalibrationPass
        The passes, one after another.

    Examples
    --------
    >>> import comq_np
    >>> print(comq_np.plan_calibration({"fc1": (1024, 4096), "fc2": (4096, 1024)}, "380 MB"))
    2 layers with 2 Grams of 285.3 MB in 2 passes over the batches:
      pass 1: 1 layer, 1 Gram of 16.8 MB, at most 41.5 MB
      pass 2: 1 layer, 1 Gram of 268.6 MB, at most 367.1 MB
    """

    passes: tuple[CalibrationPass, ...]

    def __str__(self) -> str:
        layers, grams = sum(len(part.layers) for part in self.passes), sum(part.grams for part in self.passes)
        size = sum(part.gram_bytes for part in self.passes)
        whole = f"{_count(layers, 'layer')} with {_count(grams, 'Gram')} of {_megabytes(size)}"
        lines = [
            f"  pass {number}: {_count(len(part.layers), 'layer')}, {_count(part.grams, 'Gram')} of "
            f"{_megabytes(part.gram_bytes)}, at most {_megabytes(part.memory)}"
            for number, part in enumerate(self.passes, start=1)
        ]
        return "\n".join([f"{whole} in {_count(len(lines), 'pass', 'passes')} over the batches:", *lines])


def plan_calibration(
    shapes: Mapping[str, tuple[int, ...]],
    memory: int | str | None = None,
    *,
    shared: Iterable[Iterable[str]] = (),
    counted: Iterable[str] = (),
    groups: int = 1,
    crossed: Iterable[str] = (),
) -> CalibrationPlan:
    """Divide layers over passes whose Grams fit in memory: in few passes, and those that share a Gram in one.

    Parameters
    ----------
    shapes : mapping from str to (m, n) or (b, m, n)
        Shape of the weights of each layer, in the order of the model.
    memory : int or str, optional
        Bytes for the Grams of a pass and the work on them, a number or a text such as "4GiB"; by default as many as
        all of them take.
    shared : iterable of iterables of str
        Layers that have the same inputs, and so one Gram.
    counted : iterable of str
        Embeddings, whose Gram is a `TokenCounts`.
    groups : int >= 1
        Named groups of batches, each of which has a Gram of its own of every other layer.
    crossed : iterable of str
        Layers whose inputs are quantized, so that their Gram is a `CrossGram`.

    Returns
    -------
    CalibrationPlan
        The passes.

    Raises
    ------
    InputError
        If an argument is not as above, or `memory` does not hold a single Gram and the work on it; the message says
        how much that takes.

    Examples
    --------
    >>> import comq_np
    >>> shapes = {"q": (64, 64), "k": (64, 64), "v": (64, 64), "out": (64, 64), "fc1": (64, 256), "fc2": (256, 64)}
    >>> plan = comq_np.plan_calibration(shapes, "6.6 MB", shared=[["q", "k", "v"]])
    >>> [part.layers for part in plan.passes]
    [('q', 'k', 'v', 'out', 'fc1'), ('fc2',)]
    """
    limit = None if memory is None else checks.bytes_of("memory", memory)
    parts: list[_Part] = []
    # The largest first, each where there is room: this needs few passes.
    groups = checks.integer("groups", groups, 1, gram.MOST)
    for one in sorted(_sets(shapes, shared, {*counted}, groups, {*crossed}), key=lambda one: -one.gram):
        alone = _Part().memory(one)
        if limit is not None and alone > limit:
            raise checks.InputError(
                f"`memory` must be at least {_megabytes(alone)} for layer {one.names[0]!r} with {one.m} rows, "
                f"got {memory!r}."
            )
        part = next((part for part in parts if limit is None or part.memory(one) <= limit), None)
        if part is None:
            parts.append(part := _Part())
        part.add(one)
    places = {name: place for place, name in enumerate(shapes)}
    passes = [part.finished(places, limit) for part in parts]
    return CalibrationPlan(tuple(sorted(passes, key=lambda one: places[one.layers[0]])))


@dataclasses.dataclass(frozen=True)
class _Set:
    """Layers that share a Gram, of width m and maybe of several problems, and the columns of the widest of them."""

    names: tuple[str, ...]
    m: int
    n: int
    problems: int | None
    counted: bool
    groups: int
    crossed: bool

    @property
    def gram(self) -> int:
        """Bytes of the Gram, or those of all groups."""
        size = crossgram.size if self.crossed else gram.size
        return 2 * self.counts if self.counted else self.groups * size(self.m, self.problems)

    @property
    def counts(self) -> int:
        """Bytes of the counts of one fold, and of one batch."""
        return 8 * self.m


def _sets(
    shapes: Mapping[str, tuple[int, ...]],
    shared: Iterable[Iterable[str]],
    counted: set[str],
    groups: int,
    crossed: set[str],
) -> list[_Set]:
    """All layers, in the order of the first of each set."""
    sizes = {}
    for name, shape in shapes.items():
        with checks.layer(name):
            if not isinstance(shape, Sequence) or len(shape) not in (2, 3):
                raise checks.InputError(f"`shapes` must have (m, n) or (b, m, n), got {shape!r}.")
            axes = zip("bmn"[-len(shape) :], shape, strict=True)
            sizes[name] = tuple(checks.integer(axis, size, 1, 2**31 - 1) for axis, size in axes)
    sets: dict[str, tuple[str, ...]] = {}
    for names in map(tuple, shared):
        for name in names:
            if name not in sizes or name in sets:
                what = "twice" if name in sets else "which it lacks"
                raise checks.InputError(f"`shared` must name layers in `shapes` once, got {name!r}, {what}.")
            if sizes[name][:-1] != sizes[names[0]][:-1]:
                first, other = (" x ".join(map(str, sizes[one][:-1])) for one in (names[0], name))
                raise checks.InputError(
                    f"`shared` must name layers with as many rows, got {names[0]!r} with {first} "
                    f"and {name!r} with {other}."
                )
            sets[name] = names
    whole = dict.fromkeys(sets.get(name, (name,)) for name in sizes)
    made = []
    for names in whole:
        *problems, m, _ = sizes[names[0]]
        n = max(sizes[name][-1] for name in names)
        kinds = names[0] in counted, groups, names[0] in crossed
        made.append(_Set(names, m, n, problems[0] if problems else None, *kinds))
    return made


class _Part:
    """A pass in the making."""

    def __init__(self) -> None:
        self._sets: list[_Set] = []
        self._bytes = self._work = self._waiting = 0

    def memory(self, one: _Set) -> int:
        """Bytes at most, with these layers among the others."""
        return self._bytes + one.gram + max(self._work, _work(one)) + max(self._waiting, _waiting(one))

    def add(self, one: _Set) -> None:
        """Take these layers in."""
        self._sets.append(one)
        self._bytes += one.gram
        self._work, self._waiting = max(self._work, _work(one)), max(self._waiting, _waiting(one))

    def finished(self, places: Mapping[str, int], limit: int | None) -> CalibrationPass:
        """The pass, its layers in the order of the model."""
        names = sorted((name for one in self._sets for name in one.names), key=places.__getitem__)
        memory = self._bytes + self._work + self._waiting
        spare = None if limit is None else limit - memory
        return CalibrationPass(tuple(names), len(self._sets), self._bytes, memory, spare)


def _work(one: _Set) -> int:
    weights = 4 * (one.problems or 1) * one.m * one.n  # on the way to the file, they are in float32
    work = crossgram.work if one.crossed else gram.work
    return max(one.counts if one.counted else work(one.m, one.problems), weights)


def _waiting(one: _Set) -> int:
    return one.gram if len(one.names) > 1 else 0


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _megabytes(size: int) -> str:
    """Rounded up, so that what it says is enough."""
    return f"{math.ceil(size / 1e5) / 10:.1f} MB"
