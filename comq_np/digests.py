"""SHA-256 of what a group of a file holds, so that a damaged bit in it does not pass for data.

HDF5 keeps checksums of its own structures in our files, and none of what they hold. `store` documents the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

#: An attribute, a text or an array of a group.
Value: TypeAlias = "int | str | npt.NDArray[Any]"

#: Attribute of a group that holds the digests of all the others and of its datasets.
DIGESTS = "sha256"


def digest(value: Value) -> str:
    r"""SHA-256, in hexadecimal, of the digits of an integer, of text in UTF-8, or of an array.

    An array's is that of a line with its type and shape, as in ``<f4 3,2``, followed by its bytes in C order.

    Examples
    --------
    >>> import hashlib, numpy as np
    >>> digest(12) == digest("12") == hashlib.sha256(b"12").hexdigest()
    True
    >>> digest(np.array([1, 2], np.uint8)) == hashlib.sha256(b"|u1 2\n\x01\x02").hexdigest()
    True
    """
    if not isinstance(value, np.ndarray):
        return hashlib.sha256(str(value).encode()).hexdigest()
    found = hashlib.sha256(f"{value.dtype.str} {','.join(map(str, value.shape))}\n".encode())
    found.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def of(values: Mapping[str, Value]) -> dict[str, str]:
    """Digests of all values, by name."""
    return {name: digest(value) for name, value in values.items()}


def to_text(found: Mapping[str, str]) -> str:
    """Digests as JSON.

    Examples
    --------
    >>> to_text({"rows": "4e07"})
    '{"rows": "4e07"}'
    """
    return json.dumps(found)


def from_text(text: str) -> dict[str, str]:
    """Undo `to_text`; a ValueError where it is something else.

    Examples
    --------
    >>> from_text('{"rows": "4e07"}')
    {'rows': '4e07'}
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it must be a JSON object")
    return found
