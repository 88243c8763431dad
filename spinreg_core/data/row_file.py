"""Rows on disk, for data sets larger than memory.

Decides: that a row costs eight bytes of memory while it is not looked at. Leaves out: what rows are (`formats.py`).
"""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from spinreg_core.data.formats import Row


class Spool(Sequence[Row]):
    """Rows in a file without a name (in TMPDIR) that is gone with the last view of it. Only the first takes more."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._file = tempfile.TemporaryFile(prefix="spinreg-rows-")  # noqa: SIM115
        self._ends = array("q", [0])  # shared with all views
        self._chosen: NDArray[np.int64] | None = None
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        assert self._chosen is None, "rows are added to a whole spool, not to a view"
        self._ends.append(self._ends[-1] + self._file.write(pickle.dumps(row, protocol=5)))

    def take(self, indices: Iterable[int] | NDArray[np.int64]) -> Spool:
        """A view of some rows, in the order of `indices`."""
        view = object.__new__(Spool)
        own = np.fromiter(indices, np.int64)
        view._file, view._ends = self._file, self._ends
        view._chosen = own if self._chosen is None else self._chosen[own]
        return view

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Spool: ...
    def __getitem__(self, index: int | slice) -> Row | Spool:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return self._read(range(len(self))[index])

    def __iter__(self) -> Iterator[Row]:
        for index in range(len(self)):
            yield self._read(index)

    def _read(self, index: int) -> Row:
        place = index if self._chosen is None else int(self._chosen[index])
        self._file.flush()
        begin = self._ends[place]
        row: Row = pickle.loads(os.pread(self._file.fileno(), self._ends[place + 1] - begin, begin))
        return row


def take_rows(rows: Sequence[Row], indices: Iterable[int] | NDArray[np.int64]) -> Sequence[Row]:
    """Some of the rows, in the order of `indices`: of a spool a view."""
    return rows.take(indices) if isinstance(rows, Spool) else [rows[int(i)] for i in indices]
