"""Which accesses of two threads of a block to one place have no barrier between them."""

from __future__ import annotations

import numba
import numpy as np
from numba import types

#: Places that are remembered: of those that are a multiple of it apart, the last.
PLACES = 2**18
#: How a place is accessed: read, written, or changed by an atomic operation, which others may be at the same time.
READ, WRITE, ATOMIC = range(3)
#: For each place and kind of access, the last: its address, between which barriers (a number that grows), and by whom.
SEEN = np.full((PLACES, 3, 3), -1, np.int64)
#: A thread that stands for more than one.
MANY = -2


@numba.cfunc(types.int32(types.CPointer(types.int64), types.int64, types.int32, types.int32, types.int32))
def races(seen, address, kind, thread, now):  # type: ignore[no-untyped-def]
    """Whether an access conflicts with one of another thread since the last barrier."""
    place = numba.carray(seen, (PLACES, 3, 3))[address % PLACES]
    found = 0
    for other in range(3):
        conflict = (other != READ or kind != READ) and (other != ATOMIC or kind != ATOMIC)
        here = place[other, 0] == address and place[other, 1] == now
        if conflict and here and place[other, 2] != thread:
            found = 1
    again = place[kind, 0] == address and place[kind, 1] == now
    place[kind, 2] = MANY if again and place[kind, 2] != thread else thread
    place[kind, 0], place[kind, 1] = address, now
    return found
