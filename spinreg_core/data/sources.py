"""Where records come from: the hub, a local or s3:// file or folder, the bundled demo.

Decides: how each kind of file is read so that one broken line costs one row, which files of a folder make up a
split, and how rows are numbered (from 1; lines of a JSONL file). Leaves out: what a record means (`formats.py`).
"""

from __future__ import annotations

import csv
import json
import lzma
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from spinreg_core.data.turns import RowProblem
from spinreg_core.errors import BadInput
from spinreg_core.s3_files import fetch_s3, list_s3

DEMO = Path(__file__).parent / "demo"
_COMPRESSED = (".gz", ".bz2", ".xz")
# Split names as `datasets` finds them, as whole words of a file's or folder's name; heldout is the demo's.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "heldout": ("heldout",),
}


@dataclass(frozen=True)
class Record:
    """One record as it was read: its number (from 1) and its content, or the problem that reading met."""

    row: int
    content: object
    problem: RowProblem | None = None


def read_records(dataset: str, split: str, subset: str | None = None, most: int | None = None) -> Iterator[Record]:
    """The records of a split of a data set, in the order of the source, as they are read. Raises BadInput, at any time.

    most: only so many from its beginning, read as a stream: of a hub data set no more is fetched, of a local one (lines
    of text, Parquet, Arrow) no more read.
    """
    if subset is not None and (dataset.startswith(("builtin:", "s3://")) or _path(dataset).is_file()):
        raise BadInput("data.subset", f"{subset!r} of {dataset}", "no subset: only data sets of the hub have some")
    if dataset.startswith("builtin:"):
        if dataset != "builtin:demo":
            raise BadInput("dataset", repr(dataset), "builtin:demo, the only bundled data set")
        yield from _read_local(DEMO, split, dataset, most)
        return
    if dataset.startswith("s3://"):
        with tempfile.TemporaryDirectory(prefix="spinreg-data-") as scratch:
            names = list(list_s3(dataset, "dataset"))
            fetch_s3(dataset, names, Path(scratch), "dataset")
            single = names == [""]
            yield from _read_local(next(Path(scratch).iterdir()) if single else Path(scratch), split, dataset, most)
        return
    path = _path(dataset)
    if path.is_dir() and subset is not None:  # a clone of a hub repository, which names its subsets itself
        yield from _read_hub(str(path), split, subset, most)
    elif path.exists():
        yield from _read_local(path, split, dataset, most)
    elif not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", dataset) or _kind(path) in _READERS:
        raise BadInput("dataset", f"no file or folder {dataset!r}", "a path that exists, s3://..., or a hub id")
    else:
        yield from _read_hub(dataset, split, subset, most)


def _path(dataset: str) -> Path:
    """Of something that may also be a name on the hub. Raises BadInput for what cannot be looked up."""
    try:
        path = Path(dataset).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # longer than names can be; ~NAME of nobody
        raise BadInput("dataset", f"{dataset!r} ({error})", "a path that exists, s3://..., or a hub id") from None
    return path


def _kind(path: Path) -> str:
    """Suffix that says how to read a file, compression aside: `.jsonl` for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_local(path: Path, split: str, shown: str, most: int | None) -> Iterator[Record]:
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _read_saved(path, split, shown, most)
    splits = _folder_splits(path, shown) if path.is_dir() else {"train": [path]}
    name = _split_name(split, splits, shown)
    return _part(split, name, lambda: _read_files(splits[name], shown), most)


def _split_name(split: str, splits: Iterable[str], shown: str) -> str:
    name = re.split(r"[\[+(]", split, maxsplit=1)[0].strip()
    if name not in splits:
        raise BadInput("data.split", f"{split!r} of {shown}", f"one of its splits: {', '.join(splits)}")
    return name


def _part(split: str, name: str, read: Callable[[], Iterator[Record]], most: int | None) -> Iterator[Record]:
    """What the notation of `split` takes of its records; a part of them is counted first, and read again."""
    if split == name:
        yield from islice(read(), most)
        return
    for low, high in _slices(split, name, sum(1 for _ in read())):
        yield from islice(read(), low, high)


def _read_files(files: Sequence[Path], shown: str) -> Iterator[Record]:
    last = 0
    for file in files:
        first = last
        for record in _read_file(file, shown):
            last = first + record.row
            yield Record(last, record.content, record.problem)


def _slices(split: str, name: str, rows: int) -> list[tuple[int, int]]:
    """Ranges of a split in the notation of `datasets`, e.g. train[:80%] or train[:10]+train[20:30]."""
    from datasets import ReadInstruction

    try:
        found = ReadInstruction.from_spec(split).to_absolute({name: rows})
    except (ValueError, AssertionError) as error:
        raise BadInput("data.split", f"{split!r} ({error})", "the notation of `datasets`, e.g. train[:1000]") from None
    return [(part.from_ or 0, part.to if part.to is not None else rows) for part in found]


def _folder_splits(folder: Path, shown: str) -> dict[str, list[Path]]:
    """Files of a folder by split: by the words in their names, or all of them `train` where none has any."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and _kind(path) in _READERS
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and path.name not in ("dataset_info.json", "dataset_infos.json", "config.json")
    )
    if not files:
        raise BadInput("dataset", f"{shown} without data files", f"files ending in {', '.join(_READERS)}")
    splits: dict[str, list[Path]] = {}
    for split, words in _SPLIT_WORDS.items():
        pattern = re.compile(rf"(^|[-._ 0-9/])({'|'.join(words)})([-._ 0-9/]|$)")
        found = [path for path in files if pattern.search(path.relative_to(folder).as_posix())]
        if found:
            splits[split] = found
    splits = splits or {"train": files}
    for split, members in splits.items():
        kinds = {_kind(path) for path in members}
        if len(kinds) > 1:  # most likely the same rows twice
            raise BadInput("dataset", f"{shown}, split {split}, with files of kinds {', '.join(sorted(kinds))}",
                           "one kind of file per split; name one file instead")  # fmt: skip
    return splits


def _read_file(path: Path, shown: str) -> Iterable[Record]:
    reader = _READERS.get(_kind(path))
    if reader is None:
        raise BadInput("dataset", f"{shown} with suffix {_kind(path)!r}", f"a file ending in {', '.join(_READERS)}")
    try:
        yield from reader(path)
    except EOFError:
        raise BadInput("dataset", f"{path}, which ends in the middle of its compressed data", "a whole file") from None
    except PermissionError as error:
        raise BadInput("dataset", f"{path}, which cannot be read ({error})", "a file this user may read") from None
    except (OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise BadInput(
            "dataset", f"{path}, which cannot be read ({error})", "a file of the kind its name says"
        ) from None


def _open_text(path: Path) -> Any:
    """Text of a possibly compressed file; bytes that are no UTF-8 stay visible as lone surrogates."""
    import fsspec

    return fsspec.open(
        str(path), "rt", compression="infer", encoding="utf-8-sig", errors="surrogateescape", newline=""
    ).open()


def _jsonl(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield Record(number, json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield Record(number, None, RowProblem("broken_json", f"{path.name}, line {number}: {error}"))


def _json(path: Path) -> Iterator[Record]:
    """One array of records; a file with one object per line is read as JSONL."""
    with _open_text(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        if first == "[":
            try:
                records = json.loads(first + file.read())
            except (ValueError, RecursionError) as error:
                raise BadInput("dataset", f"{path} is broken: {error}", "a JSON array of records") from None
            yield from (Record(number, content) for number, content in enumerate(records, start=1))
            return
    if first not in ("{", ""):
        raise BadInput("dataset", f"{path} beginning with {first!r}", "a JSON array, or one object per line, in UTF-8")
    records = list(_jsonl(path))
    if records and all(record.problem is not None for record in records):
        raise BadInput("dataset", f"{path}, one JSON object over several lines or broken lines throughout",
                       "a JSON array of records, or one object per line")  # fmt: skip
    yield from records


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # answers are longer than the default 128 KiB at times
    with _open_text(path) as file:
        reader = csv.DictReader(file, restkey="")
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


def _table_records(batches: Iterable[Any]) -> Iterator[Record]:
    """Records of pyarrow tables or batches. Arrow does not check text, so a broken one shows on reading."""
    number = 0
    for batch in batches:
        try:
            contents = batch.to_pylist()
        except UnicodeDecodeError:
            contents = [None] * batch.num_rows
            for i in range(batch.num_rows):
                try:
                    yield Record(number + i + 1, batch.slice(i, 1).to_pylist()[0])
                except UnicodeDecodeError as error:
                    yield Record(number + i + 1, None, RowProblem("broken_utf8", str(error)))
        else:
            yield from (Record(number + i, content) for i, content in enumerate(contents, start=1))
        number += len(contents)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _table_records(file.iter_batches(1000))
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput("dataset", f"{path} cannot be read: {error}", "a Parquet file") from None


def _validated(batch: Any) -> Any:
    """A batch whose offsets stay inside its buffers, which nothing has looked at yet. Raises ArrowInvalid."""
    import pyarrow as pa

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):  # costs a row, and shows on reading it
                raise
    return batch


def _arrow(path: Path) -> Iterator[Record]:
    """Arrow IPC, as a file or (what `datasets` writes) a stream."""
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
            yield from _table_records(_validated(batch) for batch in batches)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput("dataset", f"{path} cannot be read: {error}", "an Arrow file") from None


_READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def _dataset_records(dataset: Any, most: int | None) -> Iterator[Record]:
    return islice(_table_records(dataset.with_format("arrow").iter(min(most or 1000, 1000))), most)


def _read_saved(path: Path, split: str, shown: str, most: int | None) -> Iterator[Record]:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput("dataset", f"{shown}, which cannot be read ({error})",
                       "a folder written by `save_to_disk`, or one without state.json and dataset_dict.json"
                       ) from None  # fmt: skip
    splits = {"train": found} if isinstance(found, Dataset) else dict(found)
    name = _split_name(split, splits, shown)
    return _part(split, name, lambda: _dataset_records(splits[name], None), most)


def _read_hub(dataset: str, split: str, subset: str | None, most: int | None) -> Iterator[Record]:
    """A hub data set, or what the local cache of the hub has of it where the hub cannot be reached."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DefunctDatasetError

    try:
        yield from _dataset_records(load_dataset(dataset, subset, split=split, streaming=most is not None), most)
    except (DatasetNotFoundError, DefunctDatasetError, FileNotFoundError) as error:
        raise BadInput("dataset", f"{dataset!r} ({error})", "a path that exists, s3://..., or a hub data set") from None
    except ConnectionError as error:
        raise BadInput(
            "dataset", f"{dataset!r}, no local path, and the hub cannot be reached ({error})",
            "a path that exists, or a hub id while the hub (or HF_HOME's cache of it) can be reached",
        ) from None  # fmt: skip
    except (ValueError, DatasetGenerationError, RuntimeError) as error:  # unknown split or subset, or a broken file
        raise BadInput("dataset", f"{dataset!r}, subset {subset!r}, split {split!r}: {error}",
                       "an existing data.split and data.subset, in a layout `datasets` reads") from None  # fmt: skip
