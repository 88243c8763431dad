"""Where records come from: the hub, a local or s3:// file or folder, the bundled demo.

Decides: which files of a folder make up a split, and how rows are numbered (from 1; lines of a JSONL file).
Leaves out: how a file is read (`readers.py`), what a record means (`formats.py`).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from spinreg_core import input_limits as limits
from spinreg_core.data.readers import READERS, Record, kind_of, read_file, table_records
from spinreg_core.errors import BadInput
from spinreg_core.store.base import require_inside, stays_inside
from spinreg_core.store.remote_files import fetch_s3, list_s3

DEMO = Path(__file__).parent / "demo"
# Layouts of the hub that hold rows and nothing else; tar archives (webdataset) may hold tensors that are unpickled.
_HUB_KINDS = ("json", "csv", "parquet", "arrow", "text", "cache")
# Split names as `datasets` finds them, as whole words of a file's or folder's name; heldout is the demo's.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "heldout": ("heldout",),
}


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
    elif not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", dataset) or kind_of(path) in READERS:
        raise BadInput("dataset", f"no file or folder {dataset!r}", "a path that exists, s3://..., or a hub id")
    else:
        yield from _read_hub(dataset, split, subset, most)


def _path(dataset: str) -> Path:
    """Of something that may also be a name on the hub. Raises BadInput for what cannot be looked up."""
    try:
        path = Path(dataset).expanduser()
        limits.require_plain("dataset", path)
    except (OSError, RuntimeError) as error:  # longer than names can be; ~NAME of nobody
        raise BadInput("dataset", f"{dataset!r} ({error})", "a path that exists, s3://..., or a hub id") from None
    return path


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
        for record in read_file(file, shown):
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
        and kind_of(path) in READERS
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and path.name not in ("dataset_info.json", "dataset_infos.json", "config.json")
    )
    require_inside(folder, files, "dataset")
    if not files:
        raise BadInput("dataset", f"{shown} without data files", f"files ending in {', '.join(READERS)}")
    splits: dict[str, list[Path]] = {}
    for split, words in _SPLIT_WORDS.items():
        pattern = re.compile(rf"(^|[-._ 0-9/])({'|'.join(words)})([-._ 0-9/]|$)")
        found = [path for path in files if pattern.search(path.relative_to(folder).as_posix())]
        if found:
            splits[split] = found
    splits = splits or {"train": files}
    for split, members in splits.items():
        kinds = {kind_of(path) for path in members}
        if len(kinds) > 1:  # most likely the same rows twice
            raise BadInput("dataset", f"{shown}, split {split}, with files of kinds {', '.join(sorted(kinds))}",
                           "one kind of file per split; name one file instead")  # fmt: skip
    return splits


def _dataset_records(dataset: Any, most: int | None) -> Iterator[Record]:
    return islice(table_records(dataset.with_format("arrow").iter(min(most or 1000, 1000))), most)


def _read_saved(path: Path, split: str, shown: str, most: int | None) -> Iterator[Record]:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    from datasets import Dataset, load_from_disk

    for state in path.rglob("state.json"):  # it names the files that are read
        _require_own_files(state)
    require_inside(path, path.rglob("*"), "dataset")
    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput("dataset", f"{shown}, which cannot be read ({error})",
                       "a folder written by `save_to_disk`, or one without state.json and dataset_dict.json"
                       ) from None  # fmt: skip
    splits = {"train": found} if isinstance(found, Dataset) else dict(found)
    name = _split_name(split, splits, shown)
    return _part(split, name, lambda: _dataset_records(splits[name], None), most)


def _require_own_files(state: Path) -> None:
    limits.require_size("dataset", state, state.stat().st_size, limits.LARGEST_MODEL_FILE, "one")
    try:
        names = [str(file["filename"]) for file in json.loads(state.read_text())["_data_files"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput("dataset", f"{state}, which cannot be read ({error})", "what save_to_disk writes") from None
    for name in names:
        if not stays_inside(name):
            raise BadInput("dataset", f"{state}, which names {name!r}", "names that stay inside the folder")


def _read_hub(dataset: str, split: str, subset: str | None, most: int | None) -> Iterator[Record]:
    """A hub data set, or what the local cache of the hub has of it where the hub cannot be reached."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DefunctDatasetError

    try:
        builder = load_dataset_builder(dataset, subset)
        kind = builder.info.builder_name
        if kind not in _HUB_KINDS:
            raise BadInput("dataset", f"{dataset!r}, of kind {kind}", f"one of {', '.join(_HUB_KINDS)}")
        named = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
        here = [Path(file) for file in named if not re.match("(hf|https?|s3)://", file)]  # its card may name any file
        require_inside(Path(dataset), here, "dataset")
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
