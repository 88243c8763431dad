"""Values as text: units, tables, JSON-safe numbers, first lines."""

from __future__ import annotations

import math

import pytest

from spinreg_core.formatting import (
    first_line,
    flatten,
    format_bytes,
    format_count,
    format_duration,
    json_safe,
    markdown_table,
    text_table,
)

ROWS = [["", "a", "b", "c", "d"], ["first", "1", "22", "333", "4"], ["second one", "", "2", "3", "4"]]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (500 * 2**20, "500 MiB"), (3 * 2**40, "3072 GiB")],
)
def test_format_bytes_chooses_the_unit(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (187, "3:07 min"), (7500, "2:05 h"), (95.5 * 3600, "95:30 h"), (8.4 * 86400, "8 days")],
)
def test_format_duration_chooses_the_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (999.4, "999"), (999.6, "1 k"), (1234, "1.23 k"), (999_600, "1 M"), (7e9, "7 G"), (2.5e19, "25 E")],
)
def test_format_count_chooses_the_prefix(value: float, text: str) -> None:
    assert format_count(value) == text


def test_text_table_of_many_columns_is_cut_into_blocks() -> None:
    assert text_table(ROWS) == [
        "            a  b   c",
        "first       1  22  333",
        "second one     2   3",
        "",
        "            d",
        "first       4",
        "second one  4",
        "",
    ]


def test_text_table_flush_right_is_one_block() -> None:
    assert text_table(ROWS, right=True) == [
        "            a   b    c  d",
        "first       1  22  333  4",
        "second one      2    3  4",
    ]


def test_text_table_without_columns_is_empty() -> None:
    assert text_table([[""], ["first"]]) == []


def test_markdown_table_escapes_bars() -> None:
    assert markdown_table([["a", "b"], ["x|y", "1"]]) == ["| a | b |", "|---|---|", r"| x\|y | 1 |"]


def test_json_safe_replaces_values_outside_json() -> None:
    assert json_safe({"a": [1, math.nan, {"b": -math.inf}], "c": "nan"}) == {"a": [1, None, {"b": None}], "c": "nan"}


def test_flatten_joins_the_names_of_groups() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": "x"}}, "e": [1]}) == [("a.b", "1"), ("a.c.d", "x"), ("e", "[1]")]


def test_first_line_after_a_colon_takes_the_next_line_too() -> None:
    assert first_line(ValueError("bad thing:\n  the file\nadvice")) == "bad thing: the file"
    assert first_line(ValueError("bad thing\nadvice")) == "bad thing"
    assert first_line(KeyError()) == "KeyError"
