"""The wire format of protocol buffers, as far as ML programs need it.

In: bytes of one message. Out: its fields. Not here: what the fields mean (`runtime/mil_program.py`).
Format: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Field = tuple[int, int | memoryview]
"""(number, value): an int for varints, a view of the bytes otherwise (fixed32 and fixed64 are 4 and 8)."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class WireError(ValueError):
    """Bytes that are no message."""


def fields(data: memoryview) -> Iterator[Field]:
    """Every field of a message in the order of the bytes. Raises WireError where it is cut or malformed."""
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError("a field has the number 0")
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind == _BYTES:
            size, place = _varint(data, place)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise WireError(f"field {number} has the wire type {kind}")
        if size > end - place:
            raise WireError(f"field {number} needs {size} bytes, {end - place} are left")
        yield number, data[place : place + size]
        place += size


def view(value: int | memoryview) -> memoryview:
    """The bytes of a field that must have some."""
    if isinstance(value, int):
        raise WireError("a number stands where a message or text should")
    return value


def number(value: int | memoryview) -> int:
    """The number of a field that must be a varint."""
    if not isinstance(value, int):
        raise WireError("bytes stand where a number should")
    return value


def text(value: int | memoryview) -> str:
    """The UTF-8 text of a field, which must fit into one line: names and modes are all that is read."""
    try:
        found = str(view(value), "utf-8")
    except UnicodeDecodeError as error:
        raise WireError(f"a text is no UTF-8 ({error.reason})") from None
    if not found.isprintable():
        raise WireError("a text has control characters")
    return found


def signed(value: int) -> int:
    """A varint as int64 (negative int32 come as ten bytes, too)."""
    return value - (1 << 64) if value >> 63 else value


def varints(value: int | memoryview) -> Iterator[int]:
    """Elements of a repeated int field, packed or one at a time."""
    if isinstance(value, int):
        yield signed(value)
        return
    place = 0
    while place < len(value):
        found, place = _varint(value, place)
        yield signed(found)


def floats(value: int | memoryview, size: int) -> tuple[float, ...]:
    """Elements of a repeated float (`size` 4) or double (8) field, packed or one at a time."""
    data = view(value)
    if len(data) % size:
        raise WireError(f"{len(data)} bytes hold no whole number of {size}-byte floats")
    return struct.unpack(f"<{len(data) // size}{'f' if size == 4 else 'd'}", data)


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    found = shift = 0
    for used in range(_MAX_VARINT_BYTES):
        if place + used >= len(data):
            raise WireError("a number is cut off")
        byte = data[place + used]
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return found & ((1 << 64) - 1), place + used + 1
        shift += 7
    raise WireError("a number is longer than ten bytes")
