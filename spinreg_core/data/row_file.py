"""Rows of a data set in a temporary Arrow file.

Decides: that rows stay on disk, so that memory does not grow with the texts of a data set.
Leaves out: the meaning of a row (`formats`).
"""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spinreg_core.data.formats import Row

# Rows that are in memory at once while they are written.
_BATCH = 256
# Messages, extras and tools are JSON: a column of records would give every row the keys of all others.
_JSON = ("messages", "extras", "tools")
_SCHEMA = pa.schema([("source_row", pa.int64()), ("answer", pa.large_string()),
                     *((name, pa.large_string()) for name in _JSON)])  # fmt: skip


class RowFile(Sequence[Row]):
    """Read-only view of the rows in a memory-mapped file, or of some of them. It costs eight bytes of memory a row."""

    def __init__(self, reader: Any, places: NDArray[np.int64]) -> None:
        """`reader`: a RecordBatchFileReader of batches of `_BATCH` rows; `places`: the rows of this view, in order."""
        self._reader, self._places = reader, places
        self._batch_number, self._columns = -1, list[Any]()

    def take(self, indices: Iterable[int] | NDArray[np.int64]) -> RowFile:
        """Return a view of some rows, in the order of `indices`."""
        return RowFile(self._reader, self._places[np.fromiter(indices, np.int64)])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> RowFile: ...
    def __getitem__(self, index: int | slice) -> Row | RowFile:
        if isinstance(index, slice):
            return RowFile(self._reader, self._places[index])
        batch, offset = divmod(int(self._places[index]), _BATCH)
        # Rows are mostly read in order, so that one batch serves many of them.
        if batch != self._batch_number:
            self._batch_number, self._columns = batch, self._reader.get_batch(batch).columns
        source_row, answer, *texts = (column[offset].as_py() for column in self._columns)
        messages, extras, tools = map(json.loads, texts)
        return Row(source_row, tuple(messages), answer, extras, tools)


def write_rows(rows: Iterable[Row]) -> RowFile:
    """Write rows to a file in TMPDIR and return a view of all of them.

    The file has no name. The operating system removes it with its last view, or with the process.
    """
    remaining, count = iter(rows), 0
    with tempfile.TemporaryFile(prefix="spinreg-rows-") as file:
        with pa.ipc.new_file(file, _SCHEMA) as writer:
            while group := list(islice(remaining, _BATCH)):
                writer.write_batch(_batch_of(group))
                count += len(group)
        file.flush()
        # A mapping keeps the file alive after its descriptor is closed.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return RowFile(pa.ipc.open_file(pa.py_buffer(mapped)), np.arange(count))


def _batch_of(rows: list[Row]) -> Any:
    columns = [[row.source_row for row in rows], [row.answer for row in rows]]
    columns += [[json.dumps(getattr(row, name)) for row in rows] for name in _JSON]
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)],
                           schema=_SCHEMA)  # fmt: skip


def take_rows(rows: Sequence[Row], indices: Iterable[int] | NDArray[np.int64]) -> Sequence[Row]:
    """Return some of the rows, in the order of `indices`: a view where the rows are in a file."""
    return rows.take(indices) if isinstance(rows, RowFile) else [rows[int(i)] for i in indices]
