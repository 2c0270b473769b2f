"""How many bits each layer of a file gets."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from comq_np import checks


def layer_bits(bits: int | Mapping[str, int], names: Iterable[str], *, skipped: Iterable[str] = ()) -> dict[str, int]:
    """Bits of each layer, where some may have other ones than most.

    Parameters
    ----------
    bits : int from 1 to 16, or mapping from str to such an int
        Bits of all layers; or of those with a name, or whose names match a pattern with ``*``, ``?`` and ``[...]`` as
        in `fnmatch`, with regard to case. Of several that match a layer, the last one counts.
    names : iterable of str
        Names of the layers.
    skipped : iterable of str
        Names of layers that need no bits, but may be what a pattern matches.

    Returns
    -------
    dict of int
        Bits by name, in the order of `names`.

    Raises
    ------
    InputError
        If `bits` is not as above, none of it matches one of the layers, or a pattern in it matches none of them, unless
        there are no layers at all.

    Examples
    --------
    >>> import comq_np
    >>> comq_np.layer_bits({"*": 4, "head*": 8}, ["body", "head.0"])
    {'body': 4, 'head.0': 8}
    """
    chosen, names = patterns(bits), list(names)
    found: dict[str, int] = {}
    for name in names:
        matching = [width for pattern, width in chosen.items() if matches(name, pattern)]
        if not matching:
            raise checks.InputError(f"layer {name!r}: `bits` must hold its name or a pattern that it matches.")
        found[name] = matching[-1]
    known = [*names, *skipped]
    idle = [pattern for pattern in chosen if not any(matches(name, pattern) for name in known)]
    if idle and known:
        raise checks.InputError(f"`bits` must hold names of layers or patterns that match some, got {idle[0]!r}.")
    return found


def patterns(bits: object, name: str = "bits", least: int = 1, most: int = checks.MAX_BITS) -> dict[str, int]:
    """Bits by pattern, checked."""
    if not isinstance(bits, Mapping):
        return {"*": checks.integer(name, bits, least, most)}
    if not bits or not all(isinstance(pattern, str) for pattern in bits):
        raise checks.InputError(f"`{name}` must map names or patterns of layers to integers, got {bits!r}.")
    return {pattern: checks.integer(f"{name}[{pattern!r}]", bits[pattern], least, most) for pattern in bits}


def matches(name: str, pattern: str) -> bool:
    """Whether a name is the one given or matches it as a pattern."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
