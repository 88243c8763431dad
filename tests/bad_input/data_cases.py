"""Data sets that are not there, cannot be read, or have no rows to train on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.config import DataConfig
from spinreg_core.data.filters import load_training
from spinreg_core.data.load import load_heldout, load_rows, require_usable
from tests.bad_input.cases import ROWS, Case, Place, table
from tests.support.hub import disconnect

CASES: list[Case] = []
case = table(CASES, "prepare")

GOOD = "".join(json.dumps(row) + "\n" for row in ROWS)


def load(dataset: str, **data: Any) -> object:
    """As `prepare` does before it looks at the model."""
    config = DataConfig.model_validate({"heldout_rows": 2} | data)
    loaded = load_training(dataset, config).loaded
    require_usable(loaded, loaded.rejected, config.max_bad_share)
    return load_heldout(dataset, config)


def parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


PARQUET = parquet(ROWS)
NO_TEXT = PARQUET.replace(b"answer", b"ans\xffer")
assert NO_TEXT != PARQUET
HALF_A_PAGE = PARQUET[:100] + bytes(40) + PARQUET[140:]

# What is in a file, under its name.
FILES: dict[str, tuple[str, str | bytes]] = {
    "an empty file": ("rows.jsonl", ""),
    "a file of a kind there is no reader for": ("rows.txt", "What is 1? It is 1."),
    "one JSON object over several lines": ("rows.json", json.dumps({"prompt": "a", "answer": "b"}, indent=2)),
    "a JSON array that ends in its middle": ("rows.json", json.dumps(ROWS)[:-5]),
    "JSON that begins with a word": ("rows.json", "rows = []"),
    "an array of numbers": ("rows.json", "[1, 2, 3]"),
    "a JSON file in UTF-16": ("rows.json", json.dumps(ROWS).encode("utf-16")),
    "lines that are no records": ("rows.jsonl", '"a"\n"b"\n'),
    "lines that are cut": ("rows.jsonl", "".join(line[:-3] + "\n" for line in GOOD.splitlines())),
    "a CSV file with a header alone": ("rows.csv", "prompt,answer\n"),
    "a CSV file with other columns": ("rows.csv", "input_text,label\na,b\n"),
    "a CSV file with more fields than columns": ("rows.csv", "prompt,answer\n" + "a,b,c\n" * 12),
    "a Parquet file that ends in its middle": ("rows.parquet", PARQUET[: len(PARQUET) // 2]),
    "a Parquet file with a column whose name is no text": ("rows.parquet", NO_TEXT),
    "a Parquet file that is text": ("rows.parquet", GOOD),
    "a Parquet file with zeroes in its middle": ("rows.parquet", HALF_A_PAGE),
    "an Arrow file that is text": ("rows.arrow", GOOD),
    "a compressed file that ends in its middle": ("rows.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-20]),
    "a file that is not compressed as its name says": ("rows.jsonl.gz", GOOD),
    "records without a layout we know": ("rows.jsonl", '{"text": "What is 1? It is 1."}\n' * 12),
    "conversations without an answer": (
        "rows.jsonl", '{"messages": [{"role": "user", "content": "What is 1?"}]}\n' * 12
    ),
    "a role that nobody has": (
        "rows.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]}\n' * 12
    ),
    "conversations that begin with the answer": (
        "rows.jsonl", '{"messages": [{"role": "assistant", "content": "It is 1."}]}\n' * 12
    ),
    "an answer that is a number": ("rows.jsonl", '{"prompt": "What is 1?", "answer": 1}\n' * 12),
    "empty answers": ("rows.jsonl", '{"prompt": "What is 1?", "answer": " "}\n' * 12),
    "text that is no UTF-8": ("rows.jsonl", b'{"prompt": "What is \xff?", "answer": "It is 1."}\n' * 12),
    "half of the rows without an answer": ("rows.jsonl", GOOD + '{"prompt": "What is 1?"}\n' * 12),
}  # fmt: skip
for what, (name, content) in FILES.items():
    case(what)(lambda place, name=name, content=content: load(place.write(name, content)))

# Good rows, read in a way that does not fit them.
WAYS: dict[str, dict[str, Any]] = {
    "a format that the rows do not have": {"format": "messages"},
    "a column that is not there": {"prompt_column": "q", "response_column": "answer"},
    "a split that is not there": {"split": "validation"},
    "a part of a split that is no part": {"split": "train[:half]"},
    "a part beyond the end": {"split": "train[50:60]"},
    "a subset of a file, which has none": {"subset": "main"},
    "filters that leave nothing": {"min_answer_characters": 1000},
}
for what, ways in WAYS.items():
    case(what)(lambda place, ways=ways: load(place.rows(ROWS), **ways))


@case("no file")
def _(place: Place) -> object:
    place.patch.chdir(place.folder)
    return load("./nowhere.jsonl")


@case("a name with a NUL in it")
def _(place: Place) -> object:
    return load("rows\0.jsonl")


@case("a name longer than names can be")
def _(place: Place) -> object:
    return load("/" + "x" * 300)


@case("a file in the folder of a user who does not exist")
def _(place: Place) -> object:
    return load("~no-such-user/rows.jsonl")


@case("a folder without data files")
def _(place: Place) -> object:
    place.write("data/README.md", "nothing here")
    return load(str(place.folder / "data"))


@case("a folder with the same rows twice, in two kinds of files")
def _(place: Place) -> object:
    place.write("data/train.jsonl", GOOD)
    place.write("data/train.parquet", PARQUET)
    return load(str(place.folder / "data"))


@case("a folder that says it was saved by `datasets`, and was not")
def _(place: Place) -> object:
    place.write("data/state.json", "{}")
    return load(str(place.folder / "data"))


@case("a bundled data set there is none of")
def _(place: Place) -> object:
    return load("builtin:alpaca")


@case("a data set of the hub, which is out of reach")
def _(place: Place) -> object:
    disconnect(place.folder, place.patch)
    return load("nobody/nothing")


@case("more held-out rows than there are rows")
def _(place: Place) -> object:
    return place.prepare(data={"heldout_rows": 100})


@case("held-out rows that are the training rows")
def _(place: Place) -> object:
    rows = place.rows(ROWS)
    return place.prepare(rows, data={"heldout_dataset": rows, "heldout_rows": 100})


@case("held-out rows that are not there")
def _(place: Place) -> object:
    return place.prepare(data={"heldout_dataset": str(place.folder / "nowhere.jsonl")})


@case("prompts that are all too long")
def _(place: Place) -> object:
    return place.prepare(data={"max_prompt_tokens": 8})


@case("rows that are to end in a final answer, and do not")
def _(place: Place) -> object:
    return place.prepare(evaluation={"final_answer": "gsm8k"})


@case("a data set mixed with itself")
def _(place: Place) -> object:
    rows = place.rows(ROWS)
    return load(rows, mixed_datasets={rows: 0.5})


@case("a second data set that has nothing new")
def _(place: Place) -> object:
    return load(place.rows(ROWS), mixed_datasets={place.rows(ROWS[:3], "others.jsonl"): 0.5})


@case("an evaluation set without prompts")
def _(place: Place) -> object:
    return load(place.rows(ROWS), evaluation_sets=[place.rows([{"prompt": ""}], "evaluation.jsonl")])


@case("an evaluation set of prompts too short to look for")
def _(place: Place) -> object:
    return load(place.rows(ROWS), evaluation_sets=[place.rows([{"prompt": "What is it?"}], "evaluation.jsonl")])


@case("a data set that may not be read")
def _(place: Place) -> object:
    path = Path(place.rows(ROWS))
    real = open

    def refused(file: Any, *more: Any, **named: Any) -> Any:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *more, **named)

    place.patch.setattr("builtins.open", refused)
    return load_rows(str(path), DataConfig())
