"""Argument checks, and the wording of what they say.

Every message names the argument, what it must be and what it is.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

#: The builtin map, or another.
Map = Callable[..., Any]

MAX_BITS = 16
#: Most bits of a code whose bits have scales of their own.
MAX_PLANES = 8
#: Weights beyond this size would overflow the float32 sweeps.
MAX_WEIGHT = 1e30
#: Zero points beyond this size would leave int32 when codes are subtracted.
MAX_ZERO_POINT = 2**30
#: Most threads of a solve, and most layers solved at once.
MOST_THREADS = 1024
#: Rows of a block of `G` that is looked at together.
BLOCK = 256
#: Rounding in a float32 product of X.T @ X leaves up to this relative asymmetry.
ASYMMETRY = 1e-4
#: Bytes of the units that a size may be given in, in lower case.
UNITS = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for unit, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}
#: An input whose square underflows may still have products with others, up to this share of the largest square.
NEGLIGIBLE_COUPLING = 1e-10


class InputError(ValueError):
    """An argument is not what it must be; the message says which, what it must be and what it is."""


class OnlyOnCPU(InputError):  # noqa: N818
    """What the CPU can solve, but no GPU."""


class FileError(ValueError):
    """A file is not what it must be; the message says which file, where in it and why."""


def real_array(name: str, value: npt.ArrayLike, ndim: tuple[int, ...]) -> npt.NDArray[Any]:
    """`value` as an array of finite real numbers with one of the numbers of dimensions in `ndim`."""
    return sized_array(name, value, ndim)[0]


def sized_array(name: str, value: npt.ArrayLike, ndim: tuple[int, ...]) -> tuple[npt.NDArray[Any], float]:
    """The same, and its largest absolute value."""
    array = numbers_of(name, value, ndim)
    size = largest(array)
    if not math.isfinite(size):
        refuse_infinite(name, array)
    return array, size


def numbers_of(name: str, value: npt.ArrayLike, ndim: tuple[int, ...]) -> npt.NDArray[Any]:
    """`value` as an array of real numbers with one of the numbers of dimensions in `ndim`; they may be infinite."""
    array = real_dtype(name, array_of(name, value))
    if array.ndim not in ndim:
        wanted = " or ".join(", ".join(f"{n}-D" for n in ndim).rsplit(", ", 1))
        raise InputError(f"`{name}` must be {wanted}, got {array.ndim}-D of shape {array.shape}.")
    if array.size == 0:
        raise InputError(f"`{name}` must not be empty, got shape {array.shape}.")
    return array


def array_of(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    """`value` as an array of anything, all of which is there."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        hidden = int(np.ma.getmaskarray(value).sum())
        raise InputError(f"`{name}` must have no masked entries, got {hidden} of {value.size}.")
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of unequal length
        raise InputError(f"`{name}` must be an array of real numbers: {error}") from None


def refuse_infinite(name: str, array: npt.NDArray[Any]) -> NoReturn:
    """Say which entries of an array are not finite."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float64))  # as which larger types are judged
    where = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise InputError(
        f"`{name}` must be finite, got {array.size - int(finite.sum())} NaN or infinite of {array.size} entries, "
        f"the first at {where}."
    )


def real_dtype(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`array` itself, if it holds real numbers."""
    if array.dtype.kind not in "fiu":
        raise InputError(f"`{name}` must hold real numbers, got dtype {array.dtype}.")
    return array


def visible(text: str) -> str:
    """`text` with its control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def layer(name: str) -> Iterator[None]:
    """Put the name of a layer before the message of what is refused inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from None


def on_device(value: object) -> bool:
    """Whether an array is in the memory of a GPU."""
    return hasattr(value, "__cuda_array_interface__")


def weights(value: npt.ArrayLike, name: str = "W", ndim: tuple[int, ...] = (1, 2)) -> npt.NDArray[np.float32]:
    """Weights as float32."""
    array, size = sized_array(name, value, ndim)
    if size > MAX_WEIGHT:
        raise InputError(f"`{name}` must lie within ±{MAX_WEIGHT:g}, got an entry of size {size:g}.")
    return np.require(array, np.float32, ["C", "W"])  # as the kernels take them


def largest(array: npt.NDArray[Any]) -> float:
    """Largest absolute value, also where it is the least integer of its type; NaN where there is any."""
    return max(-float(array.min()), float(array.max()))


def gram_matrix(value: npt.ArrayLike, rows: int) -> npt.NDArray[np.float64]:
    """`G` as an exactly symmetric float64 array of shape (rows, rows)."""
    (G,) = gram_matrices(numbers_of("G", value, (2,)), None, rows)
    return np.array(G, np.float64)


def mirrored(G: npt.NDArray[Any], rows: slice, columns: slice) -> bool:
    """Whether matrices (b, m, m) are in some rows and columns what they are across the diagonal."""
    return np.array_equal(G[:, rows, columns], G[:, columns, rows].transpose(0, 2, 1))


def gram_matrices(
    value: npt.ArrayLike, problems: int | None, rows: int, run: Map = map, mirrored: Callable[..., bool] = mirrored
) -> npt.NDArray[Any]:
    """`G` as an exactly symmetric float array of shape (problems, rows, rows), or (1, rows, rows) for None.

    It is the given array itself where that is one. `run` maps a function over a list, maybe on several threads, and
    `mirrored` may be a faster way to tell that of blocks with numbers.
    """
    G = gram_numbers(value, problems, rows)
    _check_diagonal(G, problems)
    gap, size = _asymmetry(G, run, mirrored)
    if not math.isfinite(size):
        refuse_infinite("G", G if problems is not None else G[0])
    if gap > ASYMMETRY * size:
        _refuse_asymmetric(G, problems)
    dead = np.diagonal(G, axis1=1, axis2=2) == 0
    if gap:
        G = G * 0.5 + G.transpose(0, 2, 1) * 0.5  # halved first, so that the sum cannot overflow
    return _without_dead_rows(G, dead, problems) if dead.any() else G


def gram_numbers(value: npt.ArrayLike, problems: int | None, rows: int) -> npt.NDArray[Any]:
    """`G` as an array of float32 or float64, (problems, rows, rows) or (1, rows, rows), of whatever numbers."""
    G = numbers_of("G", value, (2,) if problems is None else (2, 3))
    gram_shape(G.shape, problems, rows)
    G = G.reshape(-1, rows, rows)
    return G if G.dtype in (np.float32, np.float64) else G.astype(np.float64)


def gram_shape(got: tuple[int, ...], problems: int | None, rows: int) -> None:
    """Refuse the shape of a `G` that does not match `W`."""
    shape = (rows, rows) if problems is None else (problems, rows, rows)
    if got != shape:
        of = f"{rows} row{'s' * (rows > 1)}" + (
            f" in {problems} matri{'ces' if problems > 1 else 'x'}" if problems is not None else ""
        )
        raise InputError(f"`G` must have shape {shape} to match `W` with {of}, got {got}.")


def _check_diagonal(G: npt.NDArray[Any], problems: int | None) -> None:
    diagonal = np.diagonal(G, axis1=1, axis2=2)
    if (diagonal < 0).any():
        p, i = (int(k) for k in np.argwhere(diagonal < 0)[0])
        where = f"{i}, {i}" if problems is None else f"{p}, {i}, {i}"
        raise InputError(f"`G` must have no negative diagonal entry, got G[{where}] = {diagonal[p, i]:g}.")


def _asymmetry(G: npt.NDArray[Any], run: Map, mirrored: Callable[..., bool]) -> tuple[float, float]:
    """Largest difference of an entry from its mirror image, and size of the largest entry, NaN where there is one."""

    def of_block(block: tuple[slice, slice]) -> tuple[float, float]:
        rows, columns = block
        here, across = G[:, rows, columns], G[:, columns, rows].transpose(0, 2, 1)
        if mirrored(G, rows, columns):
            return 0.0, largest(here)
        with np.errstate(invalid="ignore"):
            gap = 2 * float(np.abs(here * 0.5 - across * 0.5).max())  # halved, not to overflow
        return gap, float(np.max([largest(here), largest(across)]))

    starts = range(0, G.shape[1], BLOCK)  # block by block, to stay in the cache
    blocks = [slice(i, min(i + BLOCK, G.shape[1])) for i in starts]
    parts = [(rows, columns) for i, rows in enumerate(blocks) for columns in blocks[i:]]
    gaps, sizes = zip(*run(of_block, parts), strict=True)
    return float(np.max(gaps)), float(np.max(sizes))


def _refuse_asymmetric(G: npt.NDArray[Any], problems: int | None) -> NoReturn:
    gap = np.abs(G * 0.5 - G.transpose(0, 2, 1) * 0.5)
    p, i, k = (int(at) for at in np.unravel_index(gap.argmax(), gap.shape))
    first = "" if problems is None else f"{p}, "
    raise InputError(
        f"`G` must be symmetric, got G[{first}{i}, {k}] = {G[p, i, k]:g} and G[{first}{k}, {i}] = {G[p, k, i]:g}."
    )


def _without_dead_rows(G: npt.NDArray[Any], dead: npt.NDArray[np.bool_], problems: int | None) -> npt.NDArray[Any]:
    """`G` with all zeros in rows with a zero on the diagonal, where there may only be what underflow left of inputs."""
    coupling = np.abs(G[dead]).max(axis=1)  # of each dead row
    if not coupling.any():
        return G
    matrix, rows = np.nonzero(dead)
    limit = NEGLIGIBLE_COUPLING * np.diagonal(G, axis1=1, axis2=2).max(axis=1)
    beyond = np.where(coupling > limit[matrix], coupling, 0)
    if beyond.any():
        worst = int(beyond.argmax())
        row = f"row {rows[worst]}" if problems is None else f"row {rows[worst]} of matrix {matrix[worst]}"
        raise InputError(
            f"`G` must be a Gram matrix: {row} has a zero on the diagonal, so all of it must be zero, "
            f"got an entry of size {beyond[worst]:g}."
        )
    return np.where(dead[:, :, None] | dead[:, None, :], 0, G)


def cross(value: npt.ArrayLike, G: npt.NDArray[np.float64], folded: bool) -> npt.NDArray[np.float64]:
    """`cross` as float64 of the shape of `G`, or two of these where `G` is `folded`."""
    (array, size), one, two = sized_array("cross", value, (2, 3)), G.shape, (2, *G.shape)
    if array.shape == two and not folded:
        raise InputError(
            f"`cross` must have shape {one} unless `G` is a comq_np.Gram with samples in both folds, got {two}."
        )
    if array.shape not in (one, two):
        raise InputError(f"`cross` must have shape {one} to match `G`, or {two} for its folds, got {array.shape}.")
    limit = MAX_WEIGHT * float(G.diagonal().max())
    if size > limit:
        raise InputError(f"`cross` must lie within ±{limit:g}, which is far beyond `G`, got an entry of size {size:g}.")
    return array.astype(np.float64)


def overwritable(name: str, value: object) -> None:
    """Refuse `value` unless it is an array whose memory the solver may work in."""
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.float64):
        what = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else repr(type(value).__name__)
        raise InputError(f"`{name}` must be an array of float32 or float64 with `overwrite`, got {what}.")
    if not value.flags.c_contiguous or not value.flags.writeable:
        raise InputError(f"`{name}` must be C-contiguous and writeable with `overwrite`, got one that is not.")


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise InputError(f"`{name}` must be an integer from {low} to {high}, got {value!r}.")
    return int(value)


def shrinkage(value: object) -> float | str:
    """`value` as "auto", "nonlinear" or a float from 0 to 1."""
    if isinstance(value, str) and value in ("auto", "nonlinear"):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise InputError(f'`shrinkage` must be "auto", "nonlinear" or a number from 0 to 1, got {value!r}.')
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
    return integer("threads", value, 1, MOST_THREADS)


def bytes_of(name: str, value: object) -> int:
    """`value`, bytes as an integer or a text such as "4GiB" or "500 MB", as an int of at least 1."""
    size = value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)\s*", value.lower(), flags=re.ASCII)
        size = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else None
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or not 1 <= int(size) < 2**63:
        raise InputError(
            f'`{name}` must be a positive number of bytes, an integer or a text such as "4GiB" or "500 MB", '
            f"got {value!r}."
        )
    return int(size)


def per_group(
    name: str, value: npt.ArrayLike, groups: int, columns: int, problems: int | None, whole: bool
) -> npt.NDArray[np.float64]:
    """A number, or an array that broadcasts to (groups, columns), of each problem, as float64 (b n, groups).

    For one column, an array (groups,) is a column too. With `whole` it is one number for each problem.
    """
    shape = (groups, columns) if problems is None else (problems, groups, columns)
    array = real_array(name, value, tuple(range(len(shape) + 1))).astype(np.float64)
    if columns == 1 and array.ndim == 1:
        array = array[:, None]
    try:
        spread = np.broadcast_to(array, shape).reshape(-1, groups, columns)
    except ValueError:
        raise InputError(
            f"`{name}` must be a number or an array of shape {shape}, one for each group and column, "
            f"got shape {array.shape}."
        ) from None
    if whole and np.ptp(spread, axis=(1, 2)).any():
        raise InputError(
            f'`{name}` must be one number with `group_size="tensor"`, got {np.unique(spread).size} different ones.'
        )
    return spread.transpose(0, 2, 1).reshape(-1, groups)


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


def path(name: str, value: object) -> str:
    """`value` as the name of a file."""
    given = value if isinstance(value, str) else getattr(type(value), "__fspath__", lambda _: None)(value)
    if not isinstance(given, str) or "\0" in given:
        raise InputError(f"`{name}` must be text or a path-like object, without NUL, got {value!r}.")
    return given


def choice(name: str, value: object, known: tuple[str, ...]) -> str:
    """`value` as one of the names in `known`."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")
    return value
