"""Rows on disk behave like a list, and take next to no memory."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinreg_core.data.formats import Row
from spinreg_core.data.load import exact_duplicates
from spinreg_core.data.row_file import RowFile, take_rows, write_rows


def row(number: int, prompt: str = "?", answer: str = "!") -> Row:
    return Row(number, ({"role": "user", "content": prompt},), answer, {}, [{"name": "x"}] if number % 2 else None)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.fixed_dictionaries({"tool_calls": st.lists(st.fixed_dictionaries({"arguments": VALUES}), max_size=2)})
ROWS = st.builds(
    Row,
    st.integers(1, 2**40),
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": st.text()})).map(tuple),
    st.text(),
    st.just({}) | CALLS,
    st.none() | st.lists(st.fixed_dictionaries({"name": st.text(), "parameters": VALUES}), max_size=2),
)


@settings(deadline=None)
@given(st.lists(ROWS, max_size=5))
def test_row_file_of_any_content_gives_equal_rows(rows: list[Row]) -> None:
    written = write_rows(rows)
    assert list(written) == rows
    assert [list(row.messages[0]) for row in written if row.messages] == [
        list(r.messages[0]) for r in rows if r.messages
    ]


@settings(deadline=None)
@given(st.data())
def test_row_file_views_equal_list_operations(data: st.DataObject) -> None:
    rows = [row(i) for i in range(data.draw(st.integers(1, 20)))]
    written = write_rows(rows)
    assert list(written) == rows
    first = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1))
    second = data.draw(st.lists(st.sampled_from(range(len(first)))))
    view = take_rows(take_rows(written, first), np.array(second, np.int64))
    assert isinstance(view, RowFile)
    assert list(view) == take_rows(take_rows(rows, first), second)
    assert list(written[::3]) == rows[::3]
    assert written[-1] == rows[-1]
    with pytest.raises(IndexError):
        written[len(rows)]


def test_row_file_of_several_batches_reads_in_any_order() -> None:
    written = write_rows(row(i) for i in range(1000))
    assert [written[i].source_row for i in (999, 0, 256, 255, 511)] == [999, 0, 256, 255, 511]
    assert [r.source_row for r in written.take(range(999, -1, -3))] == list(range(999, -1, -3))


def test_row_file_leaves_nothing_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tempfile.tempdir = None  # where Python remembers the folder
    written = write_rows([row(1)])
    tempfile.tempdir = None
    assert list(tmp_path.iterdir()) == []
    assert list(written) == [row(1)]


def test_row_file_memory_does_not_hold_texts() -> None:
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    written = write_rows(row(i, "long " * 1000) for i in range(2000))
    assert len([r for r in written if len(r.messages[0]["content"]) == 5000]) == 2000
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held + pa.total_allocated_bytes() - before < 2000 * 100 < 2000 * 5000


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, max_size=30))
def test_exact_duplicates_equal_those_of_the_plain_version(texts: list[tuple[str, str]]) -> None:
    rows = [row(2 * i, *text) for i, text in enumerate(texts)]
    answers: dict[str, dict[str, int]] = {}
    kept = []
    for r, (prompt, answer) in zip(rows, texts, strict=True):
        if answer not in answers.setdefault(prompt, {}):
            answers[prompt][answer] = r.source_row
            kept.append(r)
    found, duplicates = exact_duplicates(write_rows(rows))
    assert [rows[i] for i in found] == kept
    several = {prompt: list(seen.values()) for prompt, seen in answers.items() if len(seen) > 1}
    assert (duplicates.exact, duplicates.prompts) == (len(rows) - len(kept), len(several))
    assert duplicates.examples == [f'"{p}" (rows {", ".join(map(str, n))})' for p, n in several.items()]
