"""Protocol buffers by field number, without protobuf.

Protocol buffers never renumber fields, so a decoder of the wire format that takes the needed fields by number does not
age. A message is decoded one level deep, when it is asked for: depth costs nothing until somebody goes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Damaged(ValueError):
    """These bytes are not the message that was expected."""


class Message:
    """One message of the wire format, its fields by number.

    Raises:
      Damaged: for bytes that are no message; every method, for a field of another kind than it reads.
    """

    def __init__(self, data: bytes):
        self._fields: dict[int, list[Any]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def number(self, field: int) -> int:
        """The last integer of a field; 0 if there is none."""
        value = self._fields.get(field, [0])[-1]
        if not isinstance(value, int):
            raise Damaged(f"field {field} is no integer")
        return value

    def signed(self, field: int) -> int:
        """The same of an int64."""
        value = self.number(field)
        return value - (1 << 64) if value >> 63 else value

    def raw(self, field: int) -> bytes:
        return _bytes(self._fields.get(field, [b""])[-1], field)

    def text(self, field: int) -> str:
        return self.raw(field).decode(errors="replace")

    def texts(self, field: int) -> list[str]:
        """A repeated string."""
        return [_bytes(value, field).decode(errors="replace") for value in self._fields.get(field, [])]

    def raws(self, field: int) -> list[bytes]:
        """Repeated bytes."""
        return [_bytes(value, field) for value in self._fields.get(field, [])]

    def message(self, field: int) -> Message:
        return Message(self.raw(field))

    def messages(self, field: int) -> Iterator[Message]:
        return (Message(value) for value in self.raws(field))

    def numbers(self, field: int) -> tuple[int, ...]:
        """A repeated integer, packed or not."""
        found: list[int] = []
        for value in self._fields.get(field, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                number, at = _varint(value, at)
                found.append(number)
        return tuple(found)


def _bytes(value: Any, field: int) -> bytes:
    if not isinstance(value, bytes):
        raise Damaged(f"field {field} is an integer")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        size = 8
        if kind == 2:
            size, at = _varint(data, at)
        elif kind == 5:
            size = 4
        elif kind != 1:
            raise Damaged(f"wire type {kind} at byte {at}: not a protocol buffer")
        if at + size > end:
            raise Damaged(f"{size} bytes at {at} end after {end}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:  # ten bytes hold 64 bits
        if at >= len(data):
            raise Damaged(f"a number at the end, {at}, is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise Damaged(f"a number of more than ten bytes at {at}")
