"""Readers of data files: JSON lines, JSON arrays, CSV, Parquet and Arrow, compressed or not.

Decides: that one broken line costs one row, and that files are read as a stream within the limits of `input_limits`.
Leaves out: the source of files (`sources`), the meaning of a record (`formats`).
"""

from __future__ import annotations

import csv
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinreg_core import input_limits as limits
from spinreg_core.data.messages import RowProblem
from spinreg_core.errors import BadInput

_COMPRESSED = (".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class Record:
    """A record as read from a file: its number (from 1) and its content, or the problem of reading it.

    `unread` names columns that were not read, because no row may use them.
    """

    row: int
    content: object
    problem: RowProblem | None = None
    unread: tuple[str, ...] = ()


def kind_of(path: Path) -> str:
    """Return the suffix of a file without that of its compression: `.jsonl` for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(path: Path, shown: str, columns: frozenset[str] | None = None) -> Iterable[Record]:
    """Yield the records of a file; `shown` is its name in messages. Raises BadInput.

    columns: those that rows may use (None: all). Parquet and Arrow files are read without the others.
    """
    reader = READERS.get(kind_of(path))
    if reader is None:
        raise BadInput(
            f"dataset {shown}", f"has the suffix {kind_of(path)!r}", f"a file ending in {', '.join(READERS)}"
        )
    try:
        yield from reader(path, columns) if reader in (_parquet, _arrow) else reader(path)
    except EOFError:
        raise BadInput(f"dataset {path}", "is cut off in its compressed data", "a complete file") from None
    except PermissionError as error:
        raise BadInput(f"dataset {path}", f"cannot be read ({error})", "a file that this user may read") from None
    except (OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise BadInput(f"dataset {path}", f"cannot be read ({error})", "content that matches its suffix") from None


def _open_text(path: Path) -> Any:
    """Open a possibly compressed file as text. Bytes that are not UTF-8 become lone surrogates."""
    import fsspec

    return fsspec.open(
        str(path), "rt", compression="infer", encoding="utf-8-sig", errors="surrogateescape", newline=""
    ).open()


def _lines(path: Path) -> Iterator[str]:
    """Yield lines with their ends. Raises BadInput for a line that is too long or a file that expands too much."""
    unpacked = number = 0
    with _open_text(path) as file:
        while line := file.readline(limits.LONGEST_LINE + 1):
            number, unpacked = number + 1, unpacked + len(line)
            limits.require_expansion(path, unpacked)
            if len(line) > limits.LONGEST_LINE:
                raise BadInput(f"dataset {path}", f"has more than {limits.LONGEST_LINE} characters in line {number}",
                               "one record a line")  # fmt: skip
            yield line


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield Record(number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Record(number, None, RowProblem("broken_json", f"{path.name}, line {number}: {error}"))


def _json(path: Path) -> Iterator[Record]:
    """Read an array of records, or JSON lines under this suffix."""
    with _open_text(path) as file:
        first, unpacked = file.read(1), 0
        while first.isspace():
            first, unpacked = file.read(1), unpacked + 1
            limits.require_expansion(path, unpacked)
        if first == "[":
            text = _array_text(path, file)
            try:
                records = json.loads(first + text)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"dataset {path}", f"is not valid JSON: {error}", "a JSON array of records") from None
            yield from (Record(number, content) for number, content in enumerate(records, start=1))
            return
    if first not in ("{", ""):
        raise BadInput(f"dataset {path}", f"{first!r} at its beginning",
                       "a JSON array, or one object per line, in UTF-8")  # fmt: skip
    records = list(_jsonl(path))
    if records and all(record.problem is not None for record in records):
        raise BadInput(f"dataset {path}", "has no valid line, as if one JSON object went over several lines",
                       "a JSON array of records, or one object per line")  # fmt: skip
    yield from records


def _array_text(path: Path, file: Any) -> str:
    """Return the text after the opening bracket of an array.

    It is read in pieces, because a compressed file does not show its size in advance.
    """
    pieces, size = [], 0
    while piece := file.read(2**20):
        size += len(piece)
        limits.require_expansion(path, size)
        limits.require_size("dataset", path, size, limits.LARGEST_ARRAY, "an array (or JSONL of any size)")
        pieces.append(piece)
    return "".join(pieces)


def _csv(path: Path) -> Iterator[Record]:
    # Answers can be longer than the default of 128 KiB.
    csv.field_size_limit(limits.LONGEST_LINE)
    reader = csv.DictReader(_lines(path), restkey="")
    number = 0
    while True:
        number += 1
        try:
            content = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(number, None, RowProblem("wrong_type", f"{path.name}, record {number}: {error}"))
            continue
        if "" in content and isinstance(content[""], list):
            problem = f"{path.name}, record {number}: more fields than the header names"
            yield Record(number, None, RowProblem("wrong_type", problem))
        else:
            yield Record(number, content)


def _pieces(batches: Iterable[Any], path: Path) -> Iterator[Any]:
    """Yield batches of at most 1000 rows. Raises BadInput for a file that expands too much.

    Columns are compressed: repeated or absent values take almost no space in a file.
    """
    import pyarrow as pa

    unpacked = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 1000):
            piece = batch.slice(start, 1000)
            for i, column in enumerate(piece.schema):
                # A slice of a dictionary column would count the whole dictionary as its size.
                if pa.types.is_dictionary(column.type):
                    piece = piece.set_column(i, column.name, piece.column(i).dictionary_decode())
            # Eight bytes a row, so that rows without any value count too.
            unpacked += piece.nbytes + 8 * piece.num_rows
            limits.require_expansion(path, unpacked)
            yield piece


def split_columns(names: Iterable[str], columns: frozenset[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """Return the names to read, and the others. All are read where none would be left."""
    every = list(dict.fromkeys(names))
    wanted = [name for name in every if columns is None or name in columns]
    return (wanted, tuple(name for name in every if name not in wanted)) if wanted else (every, ())


def table_records(batches: Iterable[Any], unread: tuple[str, ...] = ()) -> Iterator[Record]:
    """Yield the records of pyarrow tables or batches. Arrow does not validate text, so invalid text shows here."""
    number = 0
    for batch in batches:
        try:
            contents = batch.to_pylist()
        except UnicodeDecodeError:
            contents = [None] * batch.num_rows
            for i in range(batch.num_rows):
                try:
                    yield Record(number + i + 1, batch.slice(i, 1).to_pylist()[0], unread=unread)
                except UnicodeDecodeError as error:
                    yield Record(number + i + 1, None, RowProblem("broken_utf8", str(error)))
        else:
            yield from (Record(number + i, content, unread=unread) for i, content in enumerate(contents, start=1))
        number += len(contents)


def _parquet(path: Path, columns: frozenset[str] | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The last eight bytes are the length of the footer and the magic number. pyarrow would trust that length.
    with open(path, "rb") as raw:
        raw.seek(max(path.stat().st_size - 8, 0))
        footer, mark = (end := raw.read(8))[:4], end[4:]
    if mark == b"PAR1":
        size = int.from_bytes(footer, "little")
        limits.require_size("dataset", f"{path} with a footer", size, limits.LARGEST_FOOTER, "a footer")
    try:
        with pq.ParquetFile(path) as file:
            about = file.metadata
            limits.require_expansion(path, sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups)))
            wanted, unread = split_columns(file.schema_arrow.names, columns)
            batches = file.iter_batches(1000, columns=wanted if unread else None)
            yield from table_records(_pieces(batches, path), unread)
    # UnicodeDecodeError: the name of a column is not UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"dataset {path}", f"cannot be read: {error}", "a Parquet file") from None


def _validated(batch: Any) -> Any:
    """Return a batch after a check that its offsets stay inside its buffers. Raises ArrowInvalid."""
    import pyarrow as pa

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            # Invalid text costs one row, in `table_records`.
            if "UTF8" not in str(error):
                raise
    return batch


def _arrow(path: Path, columns: frozenset[str] | None) -> Iterator[Record]:
    """Read Arrow IPC, as a file or as the stream that `datasets` writes."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader: Any = pa.ipc.open_stream(source)
                batches: Iterable[Any] = reader
            except pa.ArrowInvalid:
                source.seek(0)
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            wanted, unread = split_columns(reader.schema.names, columns)
            batches = (batch.select(wanted) if unread else batch for batch in batches)
            yield from table_records(_pieces((_validated(batch) for batch in batches), path), unread)
    # UnicodeDecodeError: the name of a column is not UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"dataset {path}", f"cannot be read: {error}", "an Arrow file") from None


READERS: dict[str, Callable[..., Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
