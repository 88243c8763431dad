"""Sources of records: the hub, a local or s3:// file or folder, the bundled demo.

Decides: the files of a split in a folder, that no file is left out silently, and the numbers of records (from 1; in
JSON lines the line numbers).
Leaves out: reading a file (`readers`), the meaning of a record (`formats`).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from spinreg_core import input_limits as limits
from spinreg_core.data.readers import READERS, Record, kind_of, read_file, split_columns, table_records
from spinreg_core.errors import BadInput
from spinreg_core.store.base import require_inside, stays_inside
from spinreg_core.store.remote_files import fetch_s3, list_s3

DEMO = Path(__file__).parent / "demo"
# Layouts of the hub that hold only rows. Tar archives (webdataset) may hold tensors, which `datasets` unpickles.
_HUB_KINDS = ("json", "csv", "parquet", "arrow", "text", "cache")
# Split names as in `datasets`: whole words in the name of a file or folder. Only the demo has `heldout`.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "heldout": ("heldout",),
}
# Formats of rows that spinreg does not read. A folder with one of them would lose rows silently.
_UNREAD_KINDS = (
    ".tsv", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".xls", ".xlsx", ".avro", ".orc", ".feather", ".pkl",
)  # fmt: skip
# File names in a note.
_NAMED = 10


@dataclass(frozen=True)
class _Query:
    """The records wanted from a source.

    columns: the columns that rows may use (None: all); others are not read where the format allows it.
    notes: gets the names of the files and splits that are read and that are not.
    """

    shown: str
    split: str
    subset: str | None
    most: int | None
    columns: frozenset[str] | None
    notes: list[str]


def read_records(
    dataset: str,
    split: str,
    subset: str | None = None,
    most: int | None = None,
    *,
    columns: frozenset[str] | None = None,
    notes: list[str] | None = None,
) -> Iterator[Record]:
    """Yield the records of a split, in the order of the source. Raises BadInput, possibly after the first records.

    Args:
        most: limits the records. Then a hub data set is streamed, and no more of a local file is read than needed.
        columns: the columns that rows may use; others are not read where the format allows it.
        notes: gets lines about the files that are read, and about files and splits that are not.
    """
    query = _Query(dataset, split, subset, most, columns, [] if notes is None else notes)
    if subset is not None and (dataset.startswith(("builtin:", "s3://")) or _path(dataset).is_file()):
        raise BadInput("data.subset", f"is {subset!r}, but {dataset} has no subsets",
                       "remove it; only data sets of the hub have subsets")  # fmt: skip
    if dataset.startswith("builtin:"):
        if dataset != "builtin:demo":
            raise BadInput("dataset", f"is {dataset!r}", "builtin:demo, the only bundled data set")
        yield from _read_local(DEMO, query)
        return
    if dataset.startswith("s3://"):
        with tempfile.TemporaryDirectory(prefix="spinreg-data-") as scratch:
            names = list(list_s3(dataset, "dataset"))
            fetch_s3(dataset, names, Path(scratch), "dataset")
            single = names == [""]
            yield from _read_local(next(Path(scratch).iterdir()) if single else Path(scratch), query)
        return
    path = _path(dataset)
    # In a clone of a hub repository, the card names the files of its subsets and splits.
    if path.is_dir() and (subset is not None or _card_names_files(path)):
        yield from _read_hub(str(path), query)
    elif path.exists():
        yield from _read_local(path, query)
    elif not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", dataset) or kind_of(path) in READERS:
        raise BadInput("dataset", f"no file or folder {dataset!r}", "an existing path, s3://..., or a hub id")
    else:
        yield from _read_hub(dataset, query)


def _card_names_files(folder: Path) -> bool:
    """Return whether the card of a data set (the YAML at the top of README.md) says which files a split has."""
    try:
        with (folder / "README.md").open(encoding="utf-8-sig", errors="replace") as file:
            card = file.read(2**20)
    except OSError:
        return False
    front = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    return front is not None and re.search(r"^\s*(- )?data_(files|dir):", front[1], re.MULTILINE) is not None


def _path(dataset: str) -> Path:
    """Return the path of a data set that may also be a hub id. Raises BadInput for a path that cannot exist."""
    try:
        path = Path(dataset).expanduser()
        limits.require_plain("dataset", path)
    # OSError: the name is too long; RuntimeError: ~NAME without such a user.
    except (OSError, RuntimeError) as error:
        raise BadInput("dataset", f"is {dataset!r}, which is no valid path ({error})",
                       "an existing path, s3://..., or a hub id") from None  # fmt: skip
    return path


def _read_local(path: Path, query: _Query) -> Iterator[Record]:
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _read_saved(path, query)
    splits = _folder_splits(path, query.shown) if path.is_dir() else {"train": [path]}
    name = _split_name(query.split, splits, query.shown)
    if path.is_dir():
        read = [file.relative_to(path).as_posix() for file in splits[name]]
        others = [f"{file.relative_to(path).as_posix()} ({other})"
                  for other, files in splits.items() if other != name for file in files]  # fmt: skip
        query.notes.append(f"split {name} of {query.shown} is {_named(read)}")
        if others:
            query.notes.append(f"not read: {_named(others)}")
    return _part(query, name, lambda: _read_files(splits[name], query))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _split_name(split: str, splits: Iterable[str], shown: str) -> str:
    name = re.split(r"[\[+(]", split, maxsplit=1)[0].strip()
    if name not in splits:
        raise BadInput("data.split", f"is {split!r}, which {shown} does not have", f"one of {', '.join(splits)}")
    return name


def _part(query: _Query, name: str, read: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    """Yield the records that the notation of the split selects. For a part of them, the records are first counted."""
    if query.split == name:
        yield from islice(read(), query.most)
        return
    for low, high in _slices(query.split, name, sum(1 for _ in read())):
        yield from islice(read(), low, high)


def _read_files(files: Sequence[Path], query: _Query) -> Iterator[Record]:
    last = 0
    for file in files:
        first = last
        for record in read_file(file, query.shown, query.columns):
            last = first + record.row
            yield replace(record, row=last)


def _slices(split: str, name: str, rows: int) -> list[tuple[int, int]]:
    """Return the ranges of a split in the notation of `datasets`, e.g. train[:80%] or train[:10]+train[20:30]."""
    from datasets import ReadInstruction

    try:
        found = ReadInstruction.from_spec(split).to_absolute({name: rows})
    except (ValueError, AssertionError) as error:
        raise BadInput("data.split", f"is {split!r} ({error})",
                       "the notation of `datasets`, e.g. train[:1000]") from None  # fmt: skip
    return [(part.from_ or 0, part.to if part.to is not None else rows) for part in found]


def _folder_splits(folder: Path, shown: str) -> dict[str, list[Path]]:
    """Return the files of a folder by split, from the words in their names; all are `train` if none has such a word."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and kind_of(path) in READERS
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and path.name not in ("dataset_info.json", "dataset_infos.json", "config.json")
    )
    require_inside(folder, files, "dataset")
    unread = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in _UNREAD_KINDS)
    if unread:
        raise BadInput(f"dataset {shown}", f"has files that spinreg does not read ({_named(unread)})",
                       f"convert them to one of {', '.join(READERS)}, or move them elsewhere")  # fmt: skip
    if not files:
        raise BadInput(f"dataset {shown}", "has no data files", f"files ending in {', '.join(READERS)}")
    splits: dict[str, list[Path]] = {}
    outside: list[str] = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        found = [split for split, words in _SPLIT_WORDS.items()
                 if re.search(rf"(^|[-._ 0-9/])({'|'.join(words)})([-._ 0-9/]|$)", name)]  # fmt: skip
        if len(found) > 1:
            raise BadInput(f"dataset {shown}", f"has a file {name} that names the splits {' and '.join(found)}",
                           "name it after one split")  # fmt: skip
        for split in found:
            splits.setdefault(split, []).append(path)
        outside += [] if found else [name]
    if splits and outside:
        raise BadInput(
            f"dataset {shown}", f"has files without a split ({_named(outside)}) next to files of {', '.join(splits)}",
            f"put a split's name into theirs, as in train-{outside[0].rpartition('/')[2]}, or name one file as dataset",
        )  # fmt: skip
    splits = {split: splits[split] for split in _SPLIT_WORDS if split in splits} or {"train": files}
    for split, members in splits.items():
        kinds = {kind_of(path) for path in members}
        # They most likely hold the same rows twice.
        if len(kinds) > 1:
            raise BadInput(f"dataset {shown}", f"has files of kinds {', '.join(sorted(kinds))} in split {split}",
                           "name one file, or keep one kind of file per split")  # fmt: skip
    return splits


def _dataset_records(dataset: Any, query: _Query, most: int | None) -> Iterator[Record]:
    # A stream without declared features shows its columns with its first record, and all of them are read.
    wanted, unread = split_columns(dataset.column_names or (), query.columns)
    if unread:
        dataset = dataset.select_columns(wanted)
    batches = dataset.with_format("arrow").iter(min(most or 1000, 1000))
    return islice(table_records(batches, unread), most)


def _read_saved(path: Path, query: _Query) -> Iterator[Record]:
    """Read a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    from datasets import Dataset, load_from_disk

    # `state.json` names the files that `datasets` opens.
    for state in path.rglob("state.json"):
        _require_own_files(state)
    require_inside(path, path.rglob("*"), "dataset")
    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"dataset {query.shown}", f"cannot be read ({error})",
                       "a folder written by `save_to_disk`, or one without state.json and dataset_dict.json"
                       ) from None  # fmt: skip
    splits = {"train": found} if isinstance(found, Dataset) else dict(found)
    name = _split_name(query.split, splits, query.shown)
    _note_splits(query, name, splits)
    return _part(query, name, lambda: _dataset_records(splits[name], query, None))


def _note_splits(query: _Query, read: str, splits: Iterable[str]) -> None:
    others = [name for name in splits if name != read]
    if others:
        query.notes.append(f"split {read} of {query.shown} is read; not read: {_named(others)}")


def _require_own_files(state: Path) -> None:
    limits.require_size("dataset", state, state.stat().st_size, limits.LARGEST_MODEL_FILE, "a file")
    try:
        names = [str(file["filename"]) for file in json.loads(state.read_text())["_data_files"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"dataset {state}", f"cannot be read ({error})", "a file written by `save_to_disk`") from None
    for name in names:
        if not stays_inside(name):
            raise BadInput(f"dataset {state}", f"names {name!r}", "names that stay inside the folder")


def _read_hub(dataset: str, query: _Query) -> Iterator[Record]:
    """Read a hub data set, from the local cache if the hub cannot be reached."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DefunctDatasetError

    split, subset, most = query.split, query.subset, query.most
    try:
        builder = load_dataset_builder(dataset, subset)
        kind = builder.info.builder_name
        if kind not in _HUB_KINDS:
            raise BadInput(f"dataset {dataset!r}", f"is of kind {kind}", f"one of {', '.join(_HUB_KINDS)}")
        named = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
        # The card of a data set can name any file of this machine.
        here = [Path(file) for file in named if not re.match("(hf|https?|s3)://", file)]
        require_inside(Path(dataset), here, "dataset")
        _note_splits(query, re.split(r"[\[+(]", split, maxsplit=1)[0].strip(), builder.config.data_files or {})
        found = load_dataset(dataset, subset, split=split, streaming=most is not None)
        yield from _dataset_records(found, query, most)
    except (DatasetNotFoundError, DefunctDatasetError, FileNotFoundError) as error:
        raise BadInput("dataset", f"no data set {dataset!r} ({error})",
                       "an existing path, s3://..., or a hub id") from None  # fmt: skip
    except ConnectionError as error:
        raise BadInput(
            f"dataset {dataset!r}", f"is not a local path, and the hub cannot be reached ({error})",
            "an existing path, or a hub id that is in the cache (HF_HOME) or can be downloaded",
        ) from None  # fmt: skip
    # The split or the subset does not exist, or a file is broken.
    except (ValueError, DatasetGenerationError, RuntimeError) as error:
        raise BadInput(f"dataset {dataset!r}", f"cannot be read (subset {subset!r}, split {split!r}): {error}",
                       "an existing data.split and data.subset, in a layout that `datasets` reads"
                       ) from None  # fmt: skip
