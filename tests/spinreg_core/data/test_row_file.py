"""Rows on disk are a sequence like any other, and take next to no memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinreg_core.data.formats import Row
from spinreg_core.data.load import exact_duplicates
from spinreg_core.data.row_file import Spool, take_rows


def row(number: int, prompt: str = "?", answer: str = "!") -> Row:
    return Row(number, ({"role": "user", "content": prompt},), answer, {}, [{"name": "x"}] if number % 2 else None)


@given(st.data())
def test_views_are_what_lists_are(data: st.DataObject) -> None:
    rows = [row(i) for i in range(data.draw(st.integers(1, 20)))]
    spool = Spool(rows)
    assert list(spool) == rows
    first = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1))
    second = data.draw(st.lists(st.sampled_from(range(len(first)))))
    view = take_rows(take_rows(spool, first), np.array(second, np.int64))
    assert isinstance(view, Spool)
    assert list(view) == take_rows(take_rows(rows, first), second)
    assert list(spool[::3]) == rows[::3]
    assert spool[-1] == rows[-1]
    with pytest.raises(IndexError):
        spool[len(rows)]


def test_rows_are_added_while_others_are_read() -> None:
    spool = Spool()
    for i in range(5):
        spool.append(row(i))
        assert [r.source_row for r in spool] == list(range(i + 1))
    with pytest.raises(AssertionError):
        spool.take([0]).append(row(9))


def test_memory_does_not_hold_texts() -> None:
    tracemalloc.start()
    spool = Spool(row(i, "long " * 1000) for i in range(2000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(spool) == 2000
    assert held < 2000 * 100 < 2000 * 5000


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, max_size=30))
def test_duplicates_as_the_obvious_version_finds_them(texts: list[tuple[str, str]]) -> None:
    rows = [row(2 * i, *text) for i, text in enumerate(texts)]
    answers: dict[str, dict[str, int]] = {}
    kept = []
    for r, (prompt, answer) in zip(rows, texts, strict=True):
        if answer not in answers.setdefault(prompt, {}):
            answers[prompt][answer] = r.source_row
            kept.append(r)
    found, duplicates = exact_duplicates(Spool(rows))
    assert [rows[i] for i in found] == kept
    several = {prompt: list(seen.values()) for prompt, seen in answers.items() if len(seen) > 1}
    assert (duplicates.exact, duplicates.prompts) == (len(rows) - len(kept), len(several))
    assert duplicates.examples == tuple(f'"{p}" (rows {", ".join(map(str, n))})' for p, n in several.items())
