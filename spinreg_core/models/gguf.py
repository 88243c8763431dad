"""Check of the header of a GGUF file, before a library that trusts its numbers opens the file.

Decides: that counts, lengths and tensors must fit into the file.
Leaves out: weights and tokenizer, which transformers and gguf read.

Layout (little endian): magic, version, number of tensors, number of fields; fields as key, type, value; tensors as
name, number of dimensions, dimensions, type, offset. The reader of gguf would build a list of any length that an array
claims to have.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from spinreg_core.errors import BadInput

# Tensors, or fields, of a file. Models of hundreds of layers have a few thousand.
_MAX_ENTRIES = 100_000
_MAX_DIMENSIONS = 8
# Bits of one number in the most compact format.
_MIN_BITS = 1
# Bytes of a value by the number of its type.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9


class _Cursor:
    """A position in a file that never moves past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError(f"{count} bytes at {self.at - count}, beyond its end")

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self.data, start)[0])

    def text(self) -> bytes:
        length = self.number("<Q")
        self.skip(length)
        return self.data[self.at - length : self.at]

    def value(self, kind: int) -> bytes | None:
        """Skip a value, and return it if it is a text."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            self.skip(_size(kind))
            return None
        inner, count = self.number("<I"), self.number("<Q")
        if inner != _TEXT:
            # Arrays of arrays do not occur: no reader accepts them.
            self.skip(count * _size(inner))
            return None
        # Each text takes at least eight bytes, so that the end of the file ends this loop.
        for _ in range(count):
            self.skip(self.number("<Q"))
        return None


def _size(kind: int) -> int:
    if kind not in _BYTES:
        raise ValueError(f"a value of type {kind}")
    return _BYTES[kind]


def read_header(path: Path) -> dict[str, str]:
    """Return the texts of a GGUF header by key. Raises BadInput for an invalid header."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data))
    except ValueError as error:
        raise BadInput(f"model file {path}", f"has an invalid header ({error})", "a complete GGUF file") from None


def _read(cursor: _Cursor) -> dict[str, str]:
    magic, version = cursor.number("<I"), cursor.number("<I")
    if magic != 0x46554747 or version not in (2, 3):
        raise ValueError(f"it begins with {magic:#x}, version {version}")
    tensors, fields = cursor.number("<Q"), cursor.number("<Q")
    if max(tensors, fields) > _MAX_ENTRIES:
        raise ValueError(f"{tensors} tensors, {fields} fields")
    texts = {}
    for _ in range(fields):
        key = cursor.text()
        value = cursor.value(cursor.number("<I"))
        if value is not None:
            texts[key.decode(errors="replace")] = value.decode(errors="replace")
    bits = 0
    for _ in range(tensors):
        name, dimensions = cursor.text(), cursor.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        numbers = _MIN_BITS
        for _ in range(dimensions):
            numbers *= cursor.number("<Q")
        # The type (4 bytes) and the offset (8 bytes).
        cursor.skip(12)
        bits += numbers
        if bits > 8 * len(cursor.data):
            raise ValueError(f"{numbers} numbers in {name.decode(errors='replace')!r}")
    return texts
