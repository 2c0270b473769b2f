"""Argument checks, and the wording of what they say.

Every message names the argument, what it must be and what it is.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]

MAX_BITS = 16
#: Weights beyond this size would overflow the float32 sweeps.
MAX_WEIGHT = 1e30
#: Zero points beyond this size would leave int32 when codes are subtracted.
MAX_ZERO_POINT = 2**30
#: Rounding in a float32 product of X.T @ X leaves up to this relative asymmetry.
ASYMMETRY = 1e-4
#: An input whose square underflows may still have products with others, up to this share of the largest square.
NEGLIGIBLE_COUPLING = 1e-10


class InputError(ValueError):
    """An argument is not what it must be; the message says which, what it must be and what it is."""


class FileError(ValueError):
    """A file is not what it must be; the message says which file, where in it and why."""


def real_array(name: str, value: npt.ArrayLike, ndim: tuple[int, ...]) -> npt.NDArray[Any]:
    """`value` as an array of finite real numbers with one of the numbers of dimensions in `ndim`."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of unequal length
        raise InputError(f"`{name}` must be an array of real numbers: {error}") from None
    if array.dtype.kind not in "fiu":
        raise InputError(f"`{name}` must hold real numbers, got dtype {array.dtype}.")
    if array.ndim not in ndim:
        wanted = " or ".join(f"{n}-D" for n in ndim)
        raise InputError(f"`{name}` must be {wanted}, got {array.ndim}-D of shape {array.shape}.")
    if array.size == 0:
        raise InputError(f"`{name}` must not be empty, got shape {array.shape}.")
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"`{name}` must be finite, got {array.size - int(finite.sum())} NaN or infinite of {array.size} entries, "
            f"the first at {where}."
        )
    return array


@contextlib.contextmanager
def layer(name: str) -> Iterator[None]:
    """Put the name of a layer before the message of what is refused inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from None


def weights(value: npt.ArrayLike, name: str = "W", ndim: tuple[int, ...] = (1, 2)) -> npt.NDArray[np.float32]:
    """Weights as float32."""
    array = real_array(name, value, ndim)
    size = largest(array)
    if size > MAX_WEIGHT:
        raise InputError(f"`{name}` must lie within ±{MAX_WEIGHT:g}, got an entry of size {size:g}.")
    return array.astype(np.float32)


def largest(array: npt.NDArray[Any]) -> float:
    """Largest absolute value of finite numbers, also where it is the least integer of its type."""
    return max(-float(array.min()), float(array.max()))


def gram_matrix(value: npt.ArrayLike, rows: int) -> npt.NDArray[np.float64]:
    """`G` as an exactly symmetric float64 array of shape (rows, rows)."""
    G = real_array("G", value, (2,)).astype(np.float64) * 0.5  # halved, so that the sum with its mirror cannot overflow
    if G.shape != (rows, rows):
        raise InputError(
            f"`G` must have shape ({rows}, {rows}) to match `W` with {rows} row{'s' * (rows > 1)}, got {G.shape}."
        )
    diagonal = G.diagonal()
    if (diagonal < 0).any():
        i = int(np.argmax(diagonal < 0))
        raise InputError(f"`G` must have no negative diagonal entry, got G[{i}, {i}] = {2 * diagonal[i]:g}.")
    gap = np.abs(G - G.T)
    if gap.max() > ASYMMETRY * np.abs(G).max():
        i, k = divmod(int(gap.argmax()), rows)
        raise InputError(f"`G` must be symmetric, got G[{i}, {k}] = {2 * G[i, k]:g} and G[{k}, {i}] = {2 * G[k, i]:g}.")
    G += G.T
    _clear_dead_rows(G)
    return G


def _clear_dead_rows(G: npt.NDArray[np.float64]) -> None:
    """Make rows with a zero on the diagonal all zero; what is there may only be what underflow left of tiny inputs."""
    dead = G.diagonal() == 0
    if not dead.any():
        return
    coupling = np.abs(G[dead]).max(axis=1)
    if coupling.max() > NEGLIGIBLE_COUPLING * G.diagonal().max():
        i = int(np.flatnonzero(dead)[coupling.argmax()])
        raise InputError(
            f"`G` must be a Gram matrix: row {i} has a zero on the diagonal, so all of it must be zero, "
            f"got an entry of size {coupling.max():g}."
        )
    G[dead] = 0.0
    G[:, dead] = 0.0


def cross(value: npt.ArrayLike, G: npt.NDArray[np.float64], folded: bool) -> npt.NDArray[np.float64]:
    """`cross` as float64 of the shape of `G`, or two of these where `G` is `folded`."""
    array, one, two = real_array("cross", value, (2, 3)), G.shape, (2, *G.shape)
    if array.shape == two and not folded:
        raise InputError(
            f"`cross` must have shape {one} unless `G` is a comq_np.Gram with samples in both folds, got {two}."
        )
    if array.shape not in (one, two):
        raise InputError(f"`cross` must have shape {one} to match `G`, or {two} for its folds, got {array.shape}.")
    size, limit = largest(array), MAX_WEIGHT * float(G.diagonal().max())
    if size > limit:
        raise InputError(f"`cross` must lie within ±{limit:g}, which is far beyond `G`, got an entry of size {size:g}.")
    return array.astype(np.float64)


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise InputError(f"`{name}` must be an integer from {low} to {high}, got {value!r}.")
    return int(value)


def share(name: str, value: object) -> float:
    """`value` as a float from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise InputError(f'`{name}` must be "auto" or a number from 0 to 1, got {value!r}.')
    return float(value)


def number(name: str, value: object, low: float, high: float) -> float:
    """`value` as a float from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= float(value) <= high:
        raise InputError(f"`{name}` must be a number from {low:g} to {high:g}, got {value!r}.")
    return float(value)


def boolean(name: str, value: object) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def bits_and_levels(bits: object, levels: object) -> tuple[int, int]:
    """Bits that store a code, and the number of codes; `levels` decides where it is given."""
    if levels is None:
        count = integer("bits", bits, 1, MAX_BITS)
        return count, 2**count
    codes = integer("levels", levels, 2, 2**MAX_BITS)
    return math.ceil(math.log2(codes)), codes


def group_size(value: object) -> int | Literal["tensor"] | None:
    """`group_size` as None, "tensor" or an int of at least 1."""
    if value is None:
        return None
    if isinstance(value, str) and value == "tensor":
        return "tensor"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= int(value) < 2**63:
        raise InputError(f'`group_size` must be None, "tensor" or an integer of at least 1, got {value!r}.')
    return int(value)


def thread_count(value: object) -> int:
    """`threads` as an int of at least 1; None stands for every core this process may use."""
    if value is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return integer("threads", value, 1, 1024)


def per_group(name: str, value: npt.ArrayLike, groups: int, columns: int, whole: bool) -> npt.NDArray[np.float64]:
    """A number, or an array that broadcasts to (groups, columns), as float64 of that shape; one number if `whole`.

    For one column, an array (groups,) is a column too.
    """
    array = real_array(name, value, (0, 1, 2)).astype(np.float64)
    if columns == 1 and array.ndim == 1:
        array = array[:, None]
    try:
        spread = np.broadcast_to(array, (groups, columns)).copy()
    except ValueError:
        raise InputError(
            f"`{name}` must be a number or an array of shape ({groups}, {columns}), "
            f"one for each group and column, got shape {array.shape}."
        ) from None
    if whole and np.ptp(spread) > 0:
        raise InputError(
            f'`{name}` must be one number with `group_size="tensor"`, got {np.unique(spread).size} different ones.'
        )
    return spread


def scales(value: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """`scale` as float32, all of them positive."""
    with np.errstate(over="ignore", under="ignore"):
        single = value.astype(np.float32)
    bad = ~(single >= np.finfo(np.float32).tiny) | ~np.isfinite(single)
    if bad.any():
        raise InputError(f"`scale` must be positive and a normal float32 number, got {value[bad][0]:g}.")
    return single


def zero_points(value: npt.NDArray[np.float64]) -> npt.NDArray[np.number[Any]]:
    """`zero_point` as int32 if all of them are whole, else as float32."""
    bad = np.abs(value) > MAX_ZERO_POINT
    if bad.any():
        raise InputError(f"`zero_point` must lie within ±{MAX_ZERO_POINT}, got {value[bad][0]:g}.")
    return value.astype(np.int32 if (value == np.rint(value)).all() else np.float32)


def choice(name: str, value: object, known: tuple[str, ...]) -> str:
    """`value` as one of the names in `known`."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")
    return value
