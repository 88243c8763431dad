"""Files of every kind, broken ones included; folders, splits, S3, the hub that is not there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from spinreg_core.config import DataConfig
from spinreg_core.data.load import load_rows
from spinreg_core.data.readers import Record
from spinreg_core.data.sources import read_records
from spinreg_core.errors import BadInput
from tests.support.hub import disconnect, keep_datasets_in
from tests.support.servers import S3Server


def read(dataset: str, split: str, subset: str | None = None, most: int | None = None) -> list[Record]:
    return list(read_records(dataset, split, subset, most))


ROWS = [{"prompt": f"q{i} é", "response": f"a{i}"} for i in range(5)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def contents(records: list[Record]) -> list[Any]:
    return [r.content for r in records]


def write(path: Path) -> Path:
    """ROWS in the kind of file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.name.endswith("stream.arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(ROWS).schema) as out:
            out.write_table(pa.Table.from_pylist(ROWS))
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.Table.from_pylist(ROWS).schema) as out:
            out.write_table(pa.Table.from_pylist(ROWS))
    elif path.suffix == ".csv":
        path.write_text("prompt,response\n" + "".join(f'"{r["prompt"]}",{r["response"]}\n' for r in ROWS))
    elif path.name == "array.json":
        path.write_text("\n " + json.dumps(ROWS, indent=2))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(jsonl(ROWS).encode()))
    else:
        path.write_text(jsonl(ROWS))
    return path


KINDS = [
    "x.jsonl",
    "x.ndjson",
    "lines.json",
    "array.json",
    "x.csv",
    "x.parquet",
    "x.arrow",
    "stream.arrow",
    "x.jsonl.gz",
]


@pytest.mark.parametrize("name", KINDS)
def test_read_records_reads_every_kind_of_file(tmp_path: Path, name: str) -> None:
    records = read(str(write(tmp_path / name)), "train")
    assert contents(records) == ROWS
    assert [r.row for r in records] == [1, 2, 3, 4, 5]


def test_read_records_reads_saved_data_sets_and_their_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert contents(read(str(tmp_path / "one"), "train[1:3]")) == ROWS[1:3]
    DatasetDict({"a": Dataset.from_list(ROWS[:2])}).save_to_disk(str(tmp_path / "dict"))
    assert contents(read(str(tmp_path / "dict"), "a")) == ROWS[:2]
    with pytest.raises(BadInput, match=r"data.split is 'train', which .* does not have; expected one of a"):
        read(str(tmp_path / "dict"), "train")


def test_read_records_of_a_broken_line_loses_one_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = jsonl(ROWS[:1]).encode()
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b'{"prompt": "q"\n' + b"\n" + b'{"prompt": "\xff", "response": "a"}\n' + good
    )
    records = read(str(path), "train")
    assert [(r.row, r.problem.reason if r.problem else None) for r in records] == [
        (1, None), (2, "broken_json"), (4, None), (5, None),
    ]  # fmt: skip
    assert "line 2" in str(records[1].problem)
    assert records[2].content == {"prompt": "\udcff", "response": "a"}  # refused when its text is looked at
    assert records[3].content == ROWS[0]


def test_read_records_of_a_broken_array_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ROWS)[:-5])
    with pytest.raises(BadInput, match=r"is not valid JSON: .*line 1 column"):
        read(str(path), "train")
    path.write_text(json.dumps({"data": ROWS}, indent=1))
    with pytest.raises(BadInput, match="a JSON array of records, or one object per line"):
        read(str(path), "train")
    path.write_text("hello")
    with pytest.raises(BadInput, match="found 'h' at its beginning"):
        read(str(path), "train")


def test_read_records_of_csv_keeps_good_records(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'prompt,response\n"two\nlines",a\nq,a,too,many\nq\n\xff,a\n' + b"q," + b"x" * 200_000 + b"\n")
    records = read(str(path), "train")
    assert records[0].content == {"prompt": "two\nlines", "response": "a"}
    assert records[1].problem is not None
    assert records[1].problem.reason == "wrong_type"
    assert records[2].content == {"prompt": "q", "response": None}
    assert records[3].content == {"prompt": "\udcff", "response": "a"}
    assert len(records) == 5


def test_read_records_of_broken_arrow_text_loses_one_row(tmp_path: Path) -> None:
    broken = pa.array([b"fine", b"\xff\xfe", b"also fine"], pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": broken, "response": ["a", "b", "c"]}), tmp_path / "x.parquet")
    records = read(str(tmp_path / "x.parquet"), "train")
    assert [r.problem.reason if r.problem else None for r in records] == [None, "broken_utf8", None]
    assert [r.row for r in records] == [1, 2, 3]


def test_read_records_of_a_truncated_file_raises(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.arrow", "x.jsonl.gz"):
        path = write(tmp_path / name)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(BadInput, match=f"^dataset {path} (cannot be read|is cut off)"):
            read(str(path), "train")


def test_read_records_of_a_folder_finds_its_splits(tmp_path: Path) -> None:
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl", ".hidden.jsonl"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("no data")
    records = read(str(tmp_path), "train")
    assert contents(records) == ROWS * 2
    assert [r.row for r in records] == list(range(1, 11))
    assert contents(read(str(tmp_path), "test")) == ROWS
    with pytest.raises(BadInput, match="expected one of train, test"):
        read(str(tmp_path), "validation")
    write(tmp_path / "train.parquet")
    with pytest.raises(BadInput, match=r"files of kinds \.jsonl, \.parquet"):
        read(str(tmp_path), "train")


def test_read_records_of_a_folder_without_split_names_is_train(tmp_path: Path) -> None:
    write(tmp_path / "training_set" / "rows.jsonl")  # "training" is a word of the folder's name
    assert contents(read(str(tmp_path), "train")) == ROWS
    write(tmp_path / "plain" / "rows.jsonl")
    write(tmp_path / "plain" / "contest.jsonl")  # "test" is none of this one's words
    assert contents(read(str(tmp_path / "plain"), "train")) == ROWS * 2
    (tmp_path / "plain" / "contest.jsonl").unlink()
    assert contents(read(str(tmp_path / "plain"), "train")) == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="has no data files"):
        read(str(tmp_path / "empty"), "train")


def test_read_records_accepts_slices_of_datasets(tmp_path: Path) -> None:
    path = str(write(tmp_path / "x.jsonl"))
    assert contents(read(path, "train[:40%]")) == ROWS[:2]
    assert contents(read(path, "train[:1]+train[3:]")) == [ROWS[0], *ROWS[3:]]
    assert [r.row for r in read(path, "train[3:]")] == [4, 5]  # numbers stay those of the file
    with pytest.raises(BadInput, match=r"data\.split"):
        read(path, "train[:x]")
    with pytest.raises(BadInput, match="expected one of train"):
        read(path, "test")


def test_read_records_of_a_missing_source_raises(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "no.jsonl"), "no.jsonl", "./no", "builtin:other"):
        with pytest.raises(BadInput, match=r"^dataset.*; expected (an existing path|builtin:demo)"):
            read(missing, "train")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(BadInput, match=r"suffix '\.txt'"):
        read(str(tmp_path / "x.txt"), "train")


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet", "x.jsonl.gz"])
def test_read_records_with_most_returns_the_beginning(tmp_path: Path, name: str) -> None:
    path = str(write(tmp_path / name))
    for most in (1, 3, len(ROWS), 100):
        found = read(path, "train", most=most)
        assert found == read(path, "train")[:most]


def test_read_records_with_most_reads_no_further_file(tmp_path: Path) -> None:
    write(tmp_path / "train-1.jsonl")
    (tmp_path / "train-2.jsonl.gz").write_bytes(b"broken")  # the second file of the split
    records = read(str(tmp_path), "train", most=len(ROWS))
    assert contents(records) == ROWS
    with pytest.raises(BadInput, match=r"train-2\.jsonl\.gz cannot be read"):
        read(str(tmp_path), "train", most=len(ROWS) + 1)


def test_read_records_with_most_streams_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of one goes through `load_dataset` as the hub itself does; nothing is prepared in its cache."""
    folder, cache = tmp_path / "clone", tmp_path / "cache"
    folder.mkdir()
    write(folder / "part.jsonl")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: part.jsonl\n---\n"
    )
    keep_datasets_in(cache, monkeypatch)
    found = read(str(folder), "train", "small", most=3)
    assert contents(found) == ROWS[:3]
    assert [record.row for record in found] == [1, 2, 3]
    assert not list(cache.rglob("*.arrow"))
    assert contents(read(str(folder), "train", "small")) == ROWS
    assert list(cache.rglob("*.arrow")), "this test would see it"
    with pytest.raises(BadInput, match=r"an existing data\.split"):
        read(str(folder), "test", "small", most=3)


def test_read_records_without_the_hub_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disconnect(tmp_path, monkeypatch)
    with pytest.raises(BadInput, match="nobody/nothing"):
        read("nobody/nothing", "train")


def test_read_records_of_the_demo_has_two_splits() -> None:
    train, heldout = read("builtin:demo", "train"), read("builtin:demo", "heldout")
    assert len(train) >= 300
    assert len(heldout) >= 60


@pytest.mark.slow
def test_read_records_of_s3_reads_files_and_folders(tmp_path: Path, s3_server: S3Server) -> None:
    import s3fs

    fs = s3fs.S3FileSystem()
    for name in ("set/train.jsonl", "set/test.jsonl", "alone.parquet"):
        fs.put_file(str(write(tmp_path / name)), f"{s3_server.bucket}/data/{name}")
    assert contents(read(f"s3://{s3_server.bucket}/data/set", "test")) == ROWS
    assert contents(read(f"s3://{s3_server.bucket}/data/alone.parquet", "train[:2]")) == ROWS[:2]
    for url, said in (
        (f"s3://{s3_server.bucket}/data/none", "which holds no objects"),
        ("s3://no-such-bucket/data", "data, which cannot be read: The specified bucket does not exist"),
    ):
        with pytest.raises(BadInput, match=f"dataset names s3://.*{said}"):
            read(url, "train")


def notes_of(folder: Path, split: str = "train") -> list[str]:
    notes: list[str] = []
    list(read_records(str(folder), split, notes=notes))
    return notes


def test_read_records_of_a_folder_notes_files_read_and_not_read(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-2.jsonl", "dev-ops.jsonl"):
        write(tmp_path / name)
    assert notes_of(tmp_path) == [
        f"split train of {tmp_path} is train-1.jsonl, train-2.jsonl", "not read: dev-ops.jsonl (validation)"
    ]  # fmt: skip
    for number in range(3, 15):
        write(tmp_path / f"train-{number:02}.jsonl")
    assert notes_of(tmp_path, "train[:1]")[0].endswith(" and 4 more")


def test_read_records_of_a_folder_with_files_of_no_split_raises(tmp_path: Path) -> None:
    for name in ("train-timetables.jsonl", "dev-ops.jsonl", "chats-2024.jsonl"):
        write(tmp_path / name)
    with pytest.raises(BadInput, match=r"files without a split \(chats-2024\.jsonl\).* as in train-chats-2024\.jsonl"):
        read(str(tmp_path), "train")


def test_read_records_of_a_file_with_two_splits_raises(tmp_path: Path) -> None:
    write(tmp_path / "train" / "eval-1.jsonl")
    with pytest.raises(BadInput, match="that names the splits train and test"):
        read(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["more.jsonl.zst", "more.tsv", "MORE.ZIP"])
def test_read_records_of_a_folder_with_rows_of_another_kind_raises(tmp_path: Path, name: str) -> None:
    write(tmp_path / "rows.jsonl")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match=f"files that spinreg does not read .{name}.; expected convert them"):
        read(str(tmp_path), "train")


@pytest.mark.parametrize("line", ["data_files: chosen/*.jsonl", "data_dir: chosen"])
def test_read_records_of_a_clone_follows_its_card(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_datasets_in(tmp_path / "cache", monkeypatch)
    folder = tmp_path / "clone"
    write(folder / "chosen" / "a.jsonl")
    write(folder / "drafts" / "b.jsonl")
    assert len(read(str(folder), "train")) == 2 * len(ROWS)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {line}\n---\n# Rows\n")
    assert contents(read(str(folder), "train")) == ROWS


def test_read_records_of_saved_splits_notes_those_not_read(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train": rows, "extra": rows}).save_to_disk(str(tmp_path / "saved"))
    assert notes_of(tmp_path / "saved") == [f"split train of {tmp_path / 'saved'} is read; not read: extra"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_read_records_leaves_other_columns_unread(tmp_path: Path, kind: str) -> None:
    """Python's dates end with the year 9999."""
    far = pa.array([2**55, -(2**55)], pa.timestamp("us"))
    table = pa.table({"prompt": ["a", "b"], "response": ["c", "d"], "at": far, "tag": pa.nulls(2)})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    found = list(read_records(str(path), "train", columns=frozenset({"prompt", "response", "answer"})))
    assert [record.content for record in found] == [{"prompt": "a", "response": "c"}, {"prompt": "b", "response": "d"}]
    assert {record.unread for record in found} == {("at", "tag")}
    loaded = load_rows(str(path), DataConfig())
    assert (len(loaded.rows), loaded.unused) == (2, ["at", "tag"])
