"""Codes to packed bytes and back.

Each output channel is one stream of bits, rows in order, every code with its least significant bit first, eight
bits to a byte from the least significant one up, and zeros to fill the last byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import checks

#: Bytes that the single bits may take, one byte each, of as many output channels as are worked on at once.
BLOCK = 2**22


def code_type(bits: int) -> type[np.uint8 | np.uint16]:
    """Type of codes of `bits` bits each."""
    return np.uint8 if bits <= 8 else np.uint16


def pack_codes(codes: npt.ArrayLike, bits: int) -> npt.NDArray[np.uint8]:
    """Pack integer codes at `bits` bits each.

    Parameters
    ----------
    codes : array_like of int, shape ([b,] m, n)
        Codes from 0 to ``2**bits - 1``.
    bits : int from 1 to 16
        Bits of one code.

    Returns
    -------
    ndarray of uint8, shape ([b,] n, ceil(m * bits / 8))
        A row of bytes for each output channel: its codes as a stream of bits, least significant bit first.

    Raises
    ------
    InputError
        If `codes` is not a 2-D or 3-D array of such integers.

    Examples
    --------
    >>> from comq_np import pack_codes
    >>> pack_codes([[1], [2], [3]], bits=4)
    array([[33,  3]], dtype=uint8)
    """
    width = checks.integer("bits", bits, 1, checks.MAX_BITS)
    array = checks.array_of("codes", codes)
    if array.ndim not in (2, 3) or array.dtype.kind not in "iu":
        what = f"{array.ndim}-D of dtype {array.dtype}"
        raise checks.InputError(f"`codes` must be a 2-D or 3-D array of integers, got {what}.")
    if array.size and (array.min() < 0 or array.max() >= 2**width):
        raise checks.InputError(
            f"`codes` must lie from 0 to {2**width - 1} for {width} bits, got {array.min()} to {array.max()}."
        )
    *problems, rows, channels = array.shape
    together = np.moveaxis(array, -2, 0).reshape(rows, math.prod(problems) * channels)  # problems side by side
    packed = np.empty((together.shape[1], -(-rows * width // 8)), np.uint8)
    for block in _blocks(len(packed), rows * width):
        streams = np.ascontiguousarray(together[:, block].T, dtype=_little_endian(width))[:, :, None].view(np.uint8)
        single = np.unpackbits(streams, axis=2, count=width, bitorder="little").reshape(len(streams), -1)
        packed[block] = np.packbits(single, axis=1, bitorder="little")
    return packed.reshape(*problems, channels, packed.shape[1])


def _little_endian(bits: int) -> np.dtype[Any]:
    """Type of codes as bytes: the bits of one in order, if each byte is read from its least significant one up."""
    return np.dtype(code_type(bits)).newbyteorder("<")


def _blocks(channels: int, bits: int) -> Iterator[slice]:
    """Output channels of `bits` bits each, as many at once as `BLOCK` allows."""
    size = max(1, BLOCK // max(1, bits))
    return (slice(start, start + size) for start in range(0, channels, size))


def unpack_codes(packed: npt.ArrayLike, bits: int, rows: int) -> npt.NDArray[np.uint8 | np.uint16]:
    """Undo `pack_codes`.

    Parameters
    ----------
    packed : array_like of uint8, shape ([b,] n, ceil(rows * bits / 8))
        What `pack_codes` returned.
    bits : int from 1 to 16
        Bits of one code.
    rows : int >= 0
        Codes of each output channel, m.

    Returns
    -------
    ndarray of uint8, or of uint16 above 8 bits, shape ([b,] rows, n)
        The codes.

    Raises
    ------
    InputError
        If `packed` does not have that type and shape.

    Examples
    --------
    >>> from comq_np import pack_codes, unpack_codes
    >>> unpack_codes(pack_codes([[1], [2], [3]], bits=4), bits=4, rows=3).T
    array([[1, 2, 3]], dtype=uint8)
    """
    width = checks.integer("bits", bits, 1, checks.MAX_BITS)
    count = checks.integer("rows", rows, 0, 2**40)
    array = checks.array_of("packed", packed)
    length = -(-count * width // 8)
    if array.ndim not in (2, 3) or array.dtype != np.uint8 or array.shape[-1] != length:
        raise checks.InputError(
            f"`packed` must be uint8 of shape ([b,] n, {length}) for {count} codes of {width} bits, "
            f"got {array.dtype} of shape {array.shape}."
        )
    channels = array.shape[:-1]
    apart = array.reshape(math.prod(channels), length)  # problems one after another
    codes = np.empty((count, len(apart)), code_type(width))
    for block in _blocks(len(apart), count * width):
        single = np.unpackbits(apart[block], axis=1, count=count * width, bitorder="little")
        if count:
            streams = np.packbits(single.reshape(-1, count, width), axis=2, bitorder="little")
            codes[:, block] = streams.view(_little_endian(width))[:, :, 0].T
    return np.ascontiguousarray(np.moveaxis(codes.reshape(count, *channels), 0, -2))
