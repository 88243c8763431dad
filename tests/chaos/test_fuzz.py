"""Random documents, configurations and data sets raise errors of spinreg or none.

There are few examples by default, and many with SPINREG_CHAOS=long.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spinreg_core.config import DataConfig, RunConfig
from spinreg_core.config.resolve import assignments, resolve, show
from spinreg_core.data.load import load_rows, require_usable
from spinreg_core.errors import SpinregError
from spinreg_core.maintenance.gc import find_removable
from spinreg_core.maintenance.retention import store_needs
from spinreg_core.maintenance.verify import verify
from spinreg_core.reports.run_report import report_data
from spinreg_core.reports.status import format_status
from spinreg_core.runs.fetch import fetch_folder, fetch_part
from spinreg_core.runs.head import Configuration, Head, read_config, read_head
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.manifest import Manifest, Part
from spinreg_core.runs.objects import commit_part, part_names, publish, read_part, read_record
from spinreg_core.runs.stages import stages_of
from spinreg_core.store import documents
from spinreg_core.store.folder import FolderStore
from tests.support.builders import make_job
from tests.support.reported_runs import rows

MANY = 30 if os.environ.get("SPINREG_CHAOS") == "long" else 1
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(count: int) -> Callable[[Any], Any]:
    return settings(max_examples=count * MANY, deadline=None, suppress_health_check=QUIET, derandomize=MANY == 1)


ODD_TEXTS = st.sampled_from(["", "..", "a/../b", "/etc/passwd", "\0", "x" * 300, "\ud800", "nan", "all", "auto"])
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([10**12, -(10**30), 10**400]) | st.floats()
    | st.text(max_size=6) | ODD_TEXTS
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a document."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def edited(document: Any, path: tuple[Any, ...], value: Any, *, gone: bool) -> Any:
    """Return the document with another value at a path, or without one."""
    document = json.loads(json.dumps(document))
    place = document
    for key in path[:-1]:
        place = place[key]
    if gone:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


def broken(raw: bytes, draw: st.DataObject) -> bytes:
    """Return the bytes cut, changed in places, or with others inserted."""
    seed = random.Random(draw.draw(st.integers(0, 2**32)))
    for _ in range(seed.randint(1, 3)):
        at = seed.randrange(len(raw) + 1)
        kind = seed.randrange(4)
        if kind == 0:
            raw = raw[:at]
        elif kind == 1:
            raw = raw[:at] + bytes([seed.randrange(256)]) + raw[at + 1 :]
        elif kind == 2:
            raw = (
                raw[:at] + seed.choice([b"\0", b'"', b"[" * 2000, b"\xff\xfe", b"\n", b"1e999", b"{}", b","]) + raw[at:]
            )
        else:
            other = seed.randrange(len(raw) + 1)
            raw = raw[: min(at, other)] + raw[max(at, other) :]
    return raw


READ_BY_REPORT = {
    "samples.json": '{"samples": []}', "metrics.jsonl": "", "summary.json": "{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    """Return a store with a run of one round: small files, made by the real writers."""
    folder = tmp_path_factory.mktemp("fuzz")
    found = FolderStore(folder / "store")
    config = RunConfig(store=str(found.root))
    (folder / "made/policy").mkdir(parents=True)
    (folder / "made/policy/weights").write_bytes(b"w")
    for name, content in READ_BY_REPORT.items():
        (folder / "made" / name).write_text(content)

    def make(stage: str, number: int) -> str:
        job = make_job(stage, folder, config=config, object_id=f"{stage}-{number}", store=found.url, writer="e1-test",
                       round=number, inputs={"data": "data-0"})  # fmt: skip
        pq.write_table(rows(number, [1.2, 1.1]), folder / "made/rows.parquet")
        publish(found, job, folder / "made", metrics={}, seconds=1.0)
        if stage == "generate":
            record = read_record(found, job.object_id)
            assert record is not None
            commit_part(found, job, "shard-00000", record.files, {"drawn": "x"})
        return job.object_id

    with hold_lease(found, config, "test") as session:
        session.begin_advance("test", 1, None)
        session.commit_inputs(make("base", 0), make("data", 0))
        session.commit(0, "evaluate", make("evaluate", 0))
        for stage in stages_of(1):
            session.commit(1, stage, make(stage, 1))
        session.finish_advance()
    return found


def readers(store: FolderStore) -> list[Callable[[], object]]:
    """Return all functions that read the documents of a run."""
    return [
        lambda: read_head(store, "demo"),
        lambda: read_config(store, "demo"),
        lambda: format_status(store, "demo"),
        lambda: report_data(store, "demo"),
        lambda: verify(store, "demo"),
        lambda: find_removable(store, store_needs(store)),
        lambda: fetch_folder(store, "base-0", "policy"),
        lambda: [
            fetch_part(store, part)
            for name in part_names(store, "generate-1")
            if (part := read_part(store, "generate-1", name))
        ],
    ]


def test_readers_of_sound_documents_raise_nothing(store: FolderStore) -> None:
    """Otherwise the tests below would see only refusals."""
    for reader in readers(store):
        reader()


def read_all(store: FolderStore) -> None:
    for reader in readers(store):
        with contextlib.suppress(SpinregError):
            reader()


DOCUMENTS: dict[str, type[documents.Document]] = {
    "runs/demo/head.json": Head,
    "runs/demo/run.json": Configuration,
    "objects/base-0/manifest.json": Manifest,
    "objects/generate-1/parts/shard-00000.json": Part,
}


@pytest.mark.parametrize("key", DOCUMENTS)
@examples(20)
@given(draw=st.data())
def test_readers_of_edited_documents_raise_only_own_errors(store: FolderStore, key: str, draw: st.DataObject) -> None:
    path = store.root / key
    sound = path.read_bytes()
    try:
        if draw.draw(st.integers(0, 3)) == 0:
            path.write_bytes(broken(sound, draw))
        else:
            document = json.loads(sound)
            where = draw.draw(st.sampled_from(places(document)))
            changed = edited(document, where, draw.draw(VALUES), gone=draw.draw(st.integers(0, 4)) == 0)
            path.write_bytes(json.dumps(changed).encode())
        read_all(store)
    finally:
        path.write_bytes(sound)


@examples(40)
@given(value=VALUES)
def test_parse_of_any_value_raises_only_own_errors(store: FolderStore, value: Any) -> None:
    for key in DOCUMENTS:
        for found in (value, {"schema": value}, {"schema": documents.SCHEMA, "files": value, "lease": value}):
            with contextlib.suppress(SpinregError):
                documents.parse(store, key, json.dumps(found).encode(), DOCUMENTS[key])


@examples(50)
@given(draw=st.data())
def test_resolve_of_edited_values_raises_only_own_errors(draw: st.DataObject) -> None:
    sound = RunConfig().model_dump(mode="json")
    values: Any = sound
    for _ in range(draw.draw(st.integers(1, 2))):
        where = draw.draw(st.sampled_from(places(values)))
        values = edited(values, where, draw.draw(VALUES), gone=False)
    with contextlib.suppress(SpinregError):
        config = resolve(values)
        show(config)
        assert resolve(config.model_dump(mode="json")) == config, "what is written down is read back"


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@examples(8)
@given(draw=st.data())
def test_resolve_of_broken_files_raises_only_own_errors(tmp_path: Path, suffix: str, draw: st.DataObject) -> None:
    sound = RunConfig().model_dump(mode="json")
    text = json.dumps(sound) if suffix == "json" else yaml.safe_dump(sound)
    (tmp_path / f"run.{suffix}").write_bytes(broken(text.encode(), draw))
    with contextlib.suppress(SpinregError):
        show(resolve({}, str(tmp_path / f"run.{suffix}")))


@examples(50)
@given(items=st.lists(st.text('abc.=1[]{}"', max_size=12) | ODD_TEXTS, max_size=4))
def test_assignments_of_odd_texts_raise_only_own_errors(items: list[str]) -> None:
    with contextlib.suppress(SpinregError):
        resolve(assignments(items))


ROWS: list[Any] = [{"prompt": f"What is {i}?", "answer": f"It is {i}."} for i in range(8)]
TURNS: list[Any] = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": i}}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": f"It is {i}.", "reasoning_content": "One."},
        ],
        "tools": [{"name": "f", "parameters": {}}],
    }
    for i in range(8)
]


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    whole = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue()


FILES: dict[str, bytes] = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS + TURNS).encode(),
    "rows.json": json.dumps(TURNS).encode(),
    "rows.csv": b"prompt,answer\n" + b"".join(b'"What, is %d?",It is.\n' % i for i in range(8)),
    "rows.parquet": parquet(),
    "rows.arrow": arrow(),
}


def load(path: Path) -> None:
    with contextlib.suppress(SpinregError):
        config = DataConfig(turns="all", max_bad_share=0.5)
        loaded = load_rows(str(path), config)
        require_usable(loaded, loaded.rejected, config.max_bad_share)


@pytest.mark.parametrize("name", FILES)
@examples(25)
@given(draw=st.data())
def test_load_rows_of_broken_files_raises_only_own_errors(tmp_path: Path, name: str, draw: st.DataObject) -> None:
    (tmp_path / name).write_bytes(broken(FILES[name], draw))
    load(tmp_path / name)


@examples(50)
@given(draw=st.data())
def test_load_rows_of_edited_records_raises_only_own_errors(tmp_path: Path, draw: st.DataObject) -> None:
    records = []
    for record in (ROWS[0], TURNS[0], TURNS[1]):
        where = draw.draw(st.sampled_from(places(record)))
        records.append(edited(record, where, draw.draw(VALUES), gone=draw.draw(st.booleans())))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    load(tmp_path / "rows.jsonl")
