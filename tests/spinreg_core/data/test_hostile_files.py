"""Data files that were made to fill memory or disk, and folders that show more than themselves."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spinreg_core import input_limits as limits
from spinreg_core.data.sources import read_records
from spinreg_core.errors import BadInput
from tests.support.hub import keep_datasets_in

ROW = {"prompt": "q", "response": "a" * 200}
PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the limits to sizes that tests reach."""
    lower(monkeypatch, EXPANSION_FREE_BYTES=100_000, LONGEST_LINE=50_000, LARGEST_ARRAY=150_000)


def lower(patch: pytest.MonkeyPatch, **sizes: int) -> None:
    for name, size in sizes.items():
        patch.setattr(limits, name, size)


def count(path: Path) -> int:
    return sum(1 for _ in read_records(str(path), "train"))


def refused(path: Path, message: str, *, after: int = 0) -> None:
    """Reading ends with one BadInput, and before `after` records were read (0: it does not matter)."""
    records, read = read_records(str(path), "train"), []
    with pytest.raises(BadInput, match=message) as caught:
        read.extend(record.row for record in records)
    assert str(path) in str(caught.value)
    assert not after or len(read) < after


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".json"])
def test_read_compressed_file_that_expands_too_much_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: str
) -> None:
    lower(monkeypatch, LARGEST_EXPANSION=20, LARGEST_ARRAY=100_000_000)
    rows = 20_000
    if kind == ".json":
        text = "[" + ",".join([json.dumps(ROW)] * rows) + "]"
    elif kind == ".csv":
        text = "prompt,response\n" + f"q,{ROW['response']}\n" * rows
    else:
        text = (json.dumps(ROW) + "\n") * rows
    path = tmp_path / f"x{kind}{suffix}"
    path.write_bytes(PACKED[suffix](text.encode()))
    refused(path, "unpacks to more than 20 times its size", after=rows)


def test_read_array_after_many_blanks_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "x.json.xz"
    path.write_bytes(lzma.compress(b" " * 1_000_000 + b"[]"))
    refused(path, "unpacks to more than")


def test_read_real_text_stays_far_below_the_expansion_limit(tmp_path: Path) -> None:
    """Ten copies of the demo's rows in one file, packed as well as xz can."""
    demo = (Path(limits.__file__).parent / "data/demo").glob("*.jsonl")
    text = b"".join(path.read_bytes() for path in sorted(demo)) * 10
    path = tmp_path / "x.jsonl.xz"
    path.write_bytes(lzma.compress(text))
    assert len(text) > limits.EXPANSION_FREE_BYTES
    assert count(path) == text.count(b"\n")


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.jsonl.gz"])
def test_read_line_without_end_raises(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = b'{"prompt": "' + b"x" * 60_000
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    refused(path, "has more than 50000 characters in line 1")


def test_read_csv_field_of_many_lines_gives_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('prompt,response\nq,"' + "x\n" * 40_000)
    problems = [record.problem for record in read_records(str(path), "train")]
    assert "field larger than field limit (50000)" in str(problems[0])


def test_read_array_too_large_for_memory_raises(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([ROW] * 1000))
    refused(path, "expected an array .or JSONL of any size. of at most 150000")
    path.write_text(json.dumps([ROW] * 100))
    assert count(path) == 100


def test_read_parquet_that_claims_too_much_opens_no_column(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["q" * 500_000], "response": ["a"]}), path, compression="zstd")
    # The data pages are no longer there, which opening a column would notice.
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    path.write_bytes(b"PAR1" + bytes(len(content) - footer - 4) + content[-footer:])
    refused(path, "unpacks to more than")


def test_read_parquet_with_a_large_footer_raises_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["q"], "response": ["a"]}), path)
    lower(monkeypatch, LARGEST_FOOTER=100)
    # A footer without content, which opening the file would notice.
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[: -footer - 8] + bytes(footer) + content[-8:])
    refused(path, "with a footer of .* bytes; expected a footer of at most 100")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("rows", ["of one value", "of nothing"])
def test_read_columns_that_repeat_one_value_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rows: str
) -> None:
    """A dictionary or run lengths hold any number of rows in a few bytes."""
    lower(monkeypatch, LARGEST_EXPANSION=30)
    values = pa.array(["x" * 100 if rows == "of one value" else None] * 50_000, pa.string())
    table = pa.table({"prompt": values, "response": values})
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, compression="zstd")
    else:
        with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
            out.write_table(table)
    refused(path, "unpacks to more than 30 times", after=50_000)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_read_dictionary_of_real_values_counts_it_once(tmp_path: Path, kind: str) -> None:
    words = pa.array([f"{i:0500}" for i in range(1000)])
    table = pa.table({"prompt": words.dictionary_encode(), "response": words}).take(pa.array(list(range(1000)) * 10))
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, compression="none")
    else:
        with pa.ipc.new_file(str(path), table.schema) as out:
            out.write_table(table)
    records = list(read_records(str(path), "train"))
    assert len(records) == 10_000
    assert records[-1].content == {"prompt": f"{999:0500}", "response": f"{999:0500}"}


def test_read_archive_raises(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.jsonl.zip", "w") as archive:
        archive.writestr("x.jsonl", json.dumps(ROW))
    with pytest.raises(BadInput, match=r"has the suffix '\.zip'"):
        count(tmp_path / "x.jsonl.zip")


def test_read_folder_with_a_link_out_of_it_raises(tmp_path: Path) -> None:
    """A link in a folder from elsewhere would put a file of this machine into the run."""
    secret = tmp_path / "credentials"
    secret.write_text("[default]\naws_secret_access_key,planted\n")
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    (data / "train.csv").write_text("prompt,response\nq,a\n")
    (data / "more" / "train-2.csv").symlink_to("../train.csv")
    assert count(data) == 2  # a link within
    (data / "train-3.csv").symlink_to(secret)
    with pytest.raises(BadInput, match=rf"train-3\.csv, a link to {secret}; expected files inside") as caught:
        count(data)
    assert "planted" not in str(caught.value)
    os.unlink(data / "train-3.csv")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train.csv").write_text("prompt,response\nq,a\n")
    (data / "train-4").symlink_to(tmp_path / "elsewhere")
    assert count(data) == 2  # folders behind links are not looked into


def test_read_snapshot_of_the_hub_cache_follows_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    blob = tmp_path / "datasets--a--b" / "blobs" / "1"
    blob.parent.mkdir()
    blob.write_text(json.dumps(ROW) + "\n")
    (snapshot / "train.jsonl").symlink_to(blob)
    assert count(snapshot) == 1


@pytest.mark.parametrize("name", ["../x.arrow", "/x.arrow"])
def test_read_saved_data_set_that_names_other_files_raises(tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    Dataset.from_list([ROW]).save_to_disk(str(tmp_path / "x"))
    assert count(tmp_path / "x") == 1
    state = json.loads((tmp_path / "x" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "x" / "state.json").write_text(json.dumps(state))
    with pytest.raises(BadInput, match=rf"state\.json names '{name}'"):
        count(tmp_path / "x")


def test_read_hub_layout_that_may_hold_pickles_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone goes through `load_dataset` as the hub itself does."""
    import tarfile

    keep_datasets_in(tmp_path / "cache", monkeypatch)
    (tmp_path / "clone").mkdir()
    (tmp_path / "a.pth").write_bytes(b"\x80\x04.")
    with tarfile.open(tmp_path / "clone" / "train.tar", "w") as archive:
        archive.add(tmp_path / "a.pth", "a.pth")
    with pytest.raises(BadInput, match="is of kind webdataset; expected one of json, csv, parquet"):
        list(read_records(str(tmp_path / "clone"), "train", "default"))
    assert not list((tmp_path / "cache").rglob("*.arrow")), "it was loaded"


@pytest.mark.parametrize("how", ["card", "link"])
def test_read_hub_clone_that_names_other_files_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The card of a data set names its files, any file of this machine too."""
    keep_datasets_in(tmp_path / "cache", monkeypatch)
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "own.csv").write_text("prompt,response\nq,a\n")
    card = "---\nconfigs:\n- config_name: {}\n  data_files: {}\n---\n"
    (clone / "README.md").write_text(card.format("one", "own.csv"))
    assert len(list(read_records(str(clone), "train", "one"))) == 1
    loaded = list((tmp_path / "cache").rglob("*.arrow"))
    assert loaded
    (tmp_path / "secret.csv").write_text("prompt,response\nplanted,planted\n")
    if how == "link":
        (clone / "linked.csv").symlink_to(tmp_path / "secret.csv")
    named = tmp_path / "secret.csv" if how == "card" else "linked.csv"
    (clone / "README.md").write_text(card.format("two", named))
    with pytest.raises(BadInput, match=r"secret\.csv.*; expected files inside") as caught:
        list(read_records(str(clone), "train", "two"))
    assert list((tmp_path / "cache").rglob("*.arrow")) == loaded
    assert "planted" not in str(caught.value)


def test_read_uncompressed_rows_has_no_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 5000)  # 1.1 MB, ten times what is free
    found: list[Any] = list(read_records(str(path), "train"))
    assert len(found) == 5000
