"""The header of a GGUF file, walked without trusting a number in it, before a library that does opens the file.

Decides: what a header may claim: counts and lengths that fit into the file, tensors that lie in it.
Leaves out: weights and tokenizer (transformers and gguf read them), where files come from (`source.py`).

Layout (little endian): magic, version, count of tensors, count of fields; fields as key, type, value; tensors as name,
count of dimensions, dimensions, type, offset. gguf's own reader would build a list as long as an array says it is.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from spinreg_core.errors import BadInput

_MOST = 100_000  # tensors, or fields; models of hundreds of layers have some thousands
_DIMENSIONS = 8
_FEWEST_BITS = 1  # of a number in the tightest format
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by type of value
_TEXT, _ARRAY = 8, 9


class _Walk:
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
        """The text of a field that is one."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            self.skip(_size(kind))
            return None
        inner, count = self.number("<I"), self.number("<Q")
        if inner != _TEXT:
            self.skip(count * _size(inner))  # arrays of arrays are in no file, and no reader takes them
            return None
        for _ in range(count):  # each takes eight bytes at least
            self.skip(self.number("<Q"))
        return None


def _size(kind: int) -> int:
    if kind not in _BYTES:
        raise ValueError(f"a value of type {kind}")
    return _BYTES[kind]


def read_header(path: Path) -> dict[str, str]:
    """The texts of a GGUF file's header, by key. Raises BadInput for a header that cannot be true."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Walk(data))
    except ValueError as error:
        raise BadInput("model", f"{path}, whose header cannot be true ({error})", "a whole GGUF file") from None


def _read(walk: _Walk) -> dict[str, str]:
    magic, version = walk.number("<I"), walk.number("<I")
    if magic != 0x46554747 or version not in (2, 3):
        raise ValueError(f"it begins with {magic:#x}, version {version}")
    tensors, fields = walk.number("<Q"), walk.number("<Q")
    if max(tensors, fields) > _MOST:
        raise ValueError(f"{tensors} tensors, {fields} fields")
    texts = {}
    for _ in range(fields):
        key = walk.text()
        value = walk.value(walk.number("<I"))
        if value is not None:
            texts[key.decode(errors="replace")] = value.decode(errors="replace")
    bits = 0
    for _ in range(tensors):
        name, dimensions = walk.text(), walk.number("<I")
        if dimensions > _DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        numbers = _FEWEST_BITS
        for _ in range(dimensions):
            numbers *= walk.number("<Q")
        walk.skip(12)  # type and offset
        bits += numbers
        if bits > 8 * len(walk.data):
            raise ValueError(f"{numbers} numbers in {name.decode(errors='replace')!r}")
    return texts
