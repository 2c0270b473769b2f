"""Arrays on the device, and the launches of kernels on them."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import config

from comq_np import cuda

#: On the device.
Array = Any

#: Held while a setting of numba-cuda's is another one.
_configuring = threading.Lock()

cupy: Any = None
if not cuda.SIMULATED and importlib.util.find_spec("cupy") is not None:
    cupy = importlib.import_module("cupy")


def missing() -> str | None:
    """What is missing to run here, if something is."""
    if not cuda.toolkit.is_available():
        return "needs a GPU and its driver, and numba-cuda finds none."
    return None


def free_bytes() -> int:
    """Memory of the device that is free, or kept by CuPy for arrays to come."""
    if cuda.SIMULATED:
        return 2**62
    kept = cupy.get_default_memory_pool().free_bytes() if cupy else 0
    return int(cuda.toolkit.current_context().get_memory_info().free) + kept


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """Array on the device, filled with anything: from CuPy's pool of memory, where CuPy is installed."""
    if cupy is None:
        return cuda.toolkit.device_array(shape, np.dtype(dtype))
    return cuda.toolkit.as_cuda_array(cupy.empty(shape, dtype), sync=False)


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """Array of zeros on the device."""
    made = empty(shape, dtype)
    flat = made.reshape(made.size)
    launch(cuda.clear, -(-made.size // cuda.ROW), cuda.ROW, flat)
    return made


def adopted(values: Any) -> Array:
    """Array of the device that some other library has made, in its memory."""
    return cuda.toolkit.as_cuda_array(values)


def upload(values: npt.NDArray[Any], dtype: npt.DTypeLike) -> Array:
    """Copy of an array on the device."""
    made = empty(values.shape, dtype)
    made.copy_to_device(np.ascontiguousarray(values, dtype=dtype))
    return made


def copied(values: Array) -> Array:
    """Copy of an array of the device."""
    made = empty(values.shape, values.dtype)
    made.copy_to_device(values)
    return made


def download(values: Array) -> npt.NDArray[Any]:
    """Copy of an array of the device on the host."""
    found: npt.NDArray[Any] = values.copy_to_host()
    return found


def launch(kernel: Any, blocks: int | tuple[int, ...], threads: int, *arguments: Any) -> None:
    """Launch a kernel; layers are as small as they are, so few blocks are no reason for a warning."""
    with _configuring:
        warns, config.CUDA_LOW_OCCUPANCY_WARNINGS = config.CUDA_LOW_OCCUPANCY_WARNINGS, 0
        try:
            configured = kernel[blocks, threads]
        finally:
            config.CUDA_LOW_OCCUPANCY_WARNINGS = warns
    configured(*arguments)


def by_rows(kernel: Any, like: Array, *arguments: Any) -> None:
    """Launch a kernel with a block for each row of all problems."""
    launch(kernel, like.shape[0] * like.shape[1], cuda.ROW, *arguments)


def by_columns(kernel: Any, like: Array, *arguments: Any, others: tuple[int, ...] = ()) -> None:
    """Launch a kernel with a thread for each column of all problems, and that many times."""
    launch(kernel, (-(-like.shape[0] * like.shape[2] // cuda.COLUMNS), *others), cuda.COLUMNS, *arguments)


def a_block_each(kernel: Any, like: Array, threads: int, *arguments: Any) -> None:
    """Launch a kernel with a block for each column of all problems."""
    launch(kernel, like.shape[0] * like.shape[2], threads, *arguments)


def dots(first: Array, second: Array) -> npt.NDArray[np.float64]:
    """Sums (b n,) of the products of the columns of two arrays, the second maybe (b, m, 1)."""
    chunks = -(-first.shape[1] // cuda.CHUNK)
    sums = empty((chunks, first.shape[0] * first.shape[2]), np.float64)
    by_columns(cuda.column_dots, first, first, second, sums, others=(chunks,))
    found: npt.NDArray[np.float64] = download(sums).sum(axis=0)
    return found


def converted(values: Array, dtype: npt.DTypeLike) -> Array:
    """Copy in another type."""
    made = empty(values.shape, dtype)
    by_rows(cuda.convert, values, values, made)
    return made


def diagonal(G: Array) -> npt.NDArray[Any]:
    """Entries on the diagonal, (b, m), on the host."""
    made = empty(G.shape[:2], G.dtype)
    by_rows(cuda.diagonals, G, G, made)
    return download(made)


def symmetric_and_finite(G: Array) -> bool:
    """Whether every entry is its mirror image to the bit, and a number."""
    chunks = -(-G.shape[1] // cuda.CHUNK)
    gaps, sizes = (empty((chunks, G.shape[0] * G.shape[1]), np.float64) for _ in range(2))
    by_columns(cuda.mirrored, G, G, gaps, sizes, others=(chunks,))
    return not download(gaps).any() and bool(np.isfinite(download(sizes)).all())


def changes(before: Array, now: Array) -> npt.NDArray[np.int64]:
    """Number of entries of each column (b n,) that are not what they were."""
    changed = empty((now.shape[0] * now.shape[2],), np.int32)
    by_columns(cuda.count_changes, now, before, now, changed)
    return download(changed).astype(np.int64)


def multiply(
    A: Array,
    B: Array,
    C: Array,
    a0: int = 0,
    k0: int = 0,
    c0: int = 0,
    rows: int | None = None,
    inner: int | None = None,
    columns: int | None = None,
    flip: bool = False,
    subtract_from: bool = False,
) -> None:
    """Put ``A @ B`` into C, or subtract it from there: rows from `a0` on into those from `c0`, sums from `k0` on.

    There are all `rows`, `inner` terms of a sum and first `columns`, or so many. With `flip`, A.T in the place of A. By
    cuBLAS where CuPy is installed, else by the kernel `product`.
    """
    rows = (A.shape[2] if flip else A.shape[1]) - a0 if rows is None else rows
    inner = B.shape[1] - k0 if inner is None else inner
    columns = C.shape[2] if columns is None else columns
    if cupy is None:
        blocks = (-(-columns // cuda.SIDE), -(-rows // cuda.SIDE), C.shape[0])
        sign = C.dtype.type(-1 if subtract_from else 1)
        parts = a0, k0, c0, rows, inner, columns
        launch(cuda.product(C.dtype, flip), blocks, cuda.THREADS, A, B, C, *parts, sign, subtract_from)
        return
    left, right, made = (_for_cupy(array) for array in (A, B, C))
    left = left[:, k0 : k0 + inner, a0 : a0 + rows] if flip else left[:, a0 : a0 + rows, k0 : k0 + inner]
    left = left.swapaxes(1, 2) if flip else left
    right, made = right[:, k0 : k0 + inner, :columns], made[:, c0 : c0 + rows, :columns]
    if len(made) == 1:  # a product of two matrices has less to it than one of two batches
        left, right, made = left[0], right[0], made[0]
    if inner and subtract_from:
        made -= cupy.matmul(left, right)
    elif inner and made.flags.c_contiguous:
        cupy.matmul(left, right, out=made)
    elif inner:
        made[...] = cupy.matmul(left, right)
    elif not subtract_from:
        made.fill(0)


def _for_cupy(values: Array) -> Any:
    """View of an array for CuPy, which would wait for the device to be idle if it made one by itself."""
    memory = cupy.cuda.UnownedMemory(values.device_ctypes_pointer.value, values.nbytes, values)
    return cupy.ndarray(values.shape, values.dtype, cupy.cuda.MemoryPointer(memory, 0))
