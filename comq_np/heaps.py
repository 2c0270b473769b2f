"""Text of variable length, read without HDF5's help.

HDF5 keeps it in heaps without checksums, and trusts the sizes in them: it never returns from an object of no size, and
writes beyond the end of what it allocated for one that is longer than its owner says. What we write has text of fixed
length only. Files of the first version, and those that others write by h5py's defaults, have headers and heaps as here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

ATTRIBUTE, CONTINUATION, SHARED = 0x0C, 0x10, 2
#: Version, messages, references and size of an old header; type, size and flags of a message in it.
HEADER, MESSAGE = struct.Struct("<BxHII4x"), struct.Struct("<HHB3x")
#: Signature, version and flags of a new header; type, size and flags of a message in it.
NEW_HEADER, NEW_MESSAGE = struct.Struct("<4sBB"), struct.Struct("<BHB")
#: Flags of a new header: its messages are numbered, numbers of attributes are given, and times are.
NUMBERED, PHASES, TIMES = 4, 16, 32
#: Signature before the messages of a continuation of a new header, and checksum after them.
EXTRA = 4
#: Version, and sizes of name, type and space of an attribute, which follow; in version 1 each filled up to 8 bytes.
PARTS = struct.Struct("<BxHHH")
#: Length of a text, address of its heap and index in that; where a continuation is, and how long.
REFERENCE, BLOCK = struct.Struct("<IQI"), struct.Struct("<QQ")
#: Signature, version and size of a heap; index and size of an object, which ends on a multiple of 8 bytes.
HEAP, OBJECT = struct.Struct("<4sB3xQ"), struct.Struct("<HHIQ")
#: Bytes that the blocks of a header, or a heap with text of ours, have at most.
LIMIT = 2**24


def of_attribute(path: str | os.PathLike[str], base: int, header: int, name: str) -> str:
    """Text of an attribute of the object with its header there; addresses in the file count from `base`.

    A ValueError says what is wrong.
    """
    with open(path, "rb") as file:
        for kind, flags, content in _messages(file, base, header):
            if kind != ATTRIBUTE or len(content) < PARTS.size:
                continue
            version, *sizes = PARTS.unpack_from(content)
            start = PARTS.size + (version == 3)  # which says here how the name is encoded
            if content[start:][: sizes[0]].rstrip(b"\0") == name.encode():
                if flags & SHARED:
                    raise ValueError("its type is elsewhere")
                return _text(
                    file, base, content[start + sum(size + -size % (8 if version == 1 else 1) for size in sizes) :]
                )
    raise ValueError("it is where text of variable length is not read from")


def of_dataset(path: str | os.PathLike[str], base: int, place: int) -> str:
    """Text of a dataset that is there, with addresses and errors as in `of_attribute`."""
    with open(path, "rb") as file:
        return _text(file, base, _read(file, place, REFERENCE.size))


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    """Bytes of the file, all of them."""
    if not 0 <= start < 2**63 or size > LIMIT:
        raise ValueError(f"{size} bytes at {start} are none of a text")
    file.seek(start)
    content = file.read(size)
    if len(content) < size:
        raise ValueError("the file ends before it")
    return content


def _messages(file: BinaryIO, base: int, header: int) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and content of each message in a header."""
    signature, _, flags = NEW_HEADER.unpack(_read(file, base + header, NEW_HEADER.size))
    new = signature == b"OHDR"
    message, extra = NEW_MESSAGE if new else MESSAGE, EXTRA * new
    between = 2 if new and flags & NUMBERED else 0
    blocks, left = [_first_block(file, base + header, flags if new else None)], LIMIT
    while blocks:
        start, size = blocks.pop()
        left -= max(size, message.size)  # blocks may lead to each other in a circle
        if left < 0:
            raise ValueError("its header is endless")
        content, place = _read(file, start, size), 0
        while place + message.size <= len(content):
            kind, length, about = message.unpack_from(content, place)
            place += message.size + between
            part = content[place : place + length]
            place += length
            if kind == CONTINUATION and len(part) >= BLOCK.size:
                offset, size = BLOCK.unpack_from(part)
                blocks.append((base + offset + extra, max(0, size - 2 * extra)))
            else:
                yield kind, about, part


def _first_block(file: BinaryIO, header: int, flags: int | None) -> tuple[int, int]:
    """Where the first messages of a header are, and their bytes; `flags` are a new header's."""
    if flags is None:
        return header + HEADER.size, HEADER.unpack(_read(file, header, HEADER.size))[3]
    start = header + NEW_HEADER.size + (16 if flags & TIMES else 0) + (4 if flags & PHASES else 0)
    width = 1 << (flags & 3)
    return start + width, int.from_bytes(_read(file, start, width), "little")


def _text(file: BinaryIO, base: int, reference: bytes) -> str:
    """Text that a reference names."""
    if len(reference) < REFERENCE.size:
        raise ValueError("its reference to a heap is cut off")
    length, address, wanted = REFERENCE.unpack_from(reference)
    if not length:
        return ""
    signature, version, size = HEAP.unpack(_read(file, base + address, HEAP.size))
    if (signature, version) != (b"GCOL", 1):
        raise ValueError("there is no heap where its text must be")
    content, place = _read(file, base + address, size), HEAP.size
    while place + OBJECT.size <= len(content):
        index, _, _, own = OBJECT.unpack_from(content, place)
        if not index:  # what is free, up to the end
            break
        if index == wanted and own == length <= len(content) - place - OBJECT.size:
            return content[place + OBJECT.size :][:own].decode()
        place += OBJECT.size + own + -own % 8
    raise ValueError("its heap is damaged, or has no such text")
