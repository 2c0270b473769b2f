"""The filters of chunks, undone without HDF5, which trusts the sizes that it finds and crashes where they are wrong."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

#: Numbers of the filters that HDF5 has built in and that lose nothing. Others would be code that it loads.
GZIP, SHUFFLE, FLETCHER32 = 1, 2, 3
FILTERS = {GZIP: "gzip", SHUFFLE: "shuffle", FLETCHER32: "fletcher32"}
#: Bytes of the checksum that FLETCHER32 puts at the end.
CHECKSUM = 4


def decode(data: bytes, filters: Sequence[int], skipped: int, size: int, itemsize: int) -> bytes:
    """Bytes of a chunk, `size` of them, from what its filters made of them; a ValueError where they did not.

    Bit k of `skipped` says that filter k was left out.

    Examples
    --------
    >>> import zlib
    >>> decode(zlib.compress(b"acegbdfh"), [SHUFFLE, GZIP], 0, 8, itemsize=2)
    b'abcdefgh'
    """
    for number, kind in reversed(list(enumerate(filters))):
        if skipped >> number & 1:
            continue
        if kind == GZIP:
            try:
                data = zlib.decompressobj().decompress(data, size + CHECKSUM + 1)
            except zlib.error as error:
                raise ValueError(f"gzip cannot undo a chunk: {error}") from None
        elif kind == FLETCHER32:
            data = data[:-CHECKSUM]
        elif len(data) == size:
            data = np.frombuffer(data, np.uint8).reshape(itemsize, -1).T.tobytes()
    if len(data) != size:
        raise ValueError(f"a chunk must have {size} bytes, has {len(data)}")
    return data
