"""Values as text: bytes, durations, counts, tables, JSON-safe numbers, the first line of an error."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = 110  # of a terminal
_PER_BLOCK = 3  # columns of a wide table that stand side by side


def json_safe(value: Any) -> Any:
    """Return a JSON value with None in place of NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested mapping as (`group.field`, value) pairs; values as a person would type them."""
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += flatten(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return found


def format_bytes(size: float) -> str:
    """Return bytes in binary units: `12 B`, `1.5 KiB`, `500 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def format_duration(seconds: float) -> str:
    """Return seconds as `4.2 s`, `3:07 min`, `2:05 h` or, from four days on, `8 days`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    if seconds < 4 * 86400:
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d} h"
    return f"{seconds / 86400:.0f} days"


def format_count(value: float) -> str:
    """Return a number in three digits and a decimal prefix: `1.23 G`."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # Three digits round 999.5 up to 1000, which would be written as 1e+03.
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def text_table(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Return the lines of a plain-text table with the first column flush left.

    right: put the other columns flush right, in one block. Otherwise they are flush left, three side by side, and
    every block of three repeats the first column and ends with an empty line.
    """
    lines = []
    wide = len(rows[0])
    for start in range(1, wide, wide if right else _PER_BLOCK):
        block = [[row[0], *row[start : wide if right else start + _PER_BLOCK]] for row in rows]
        widths = [max(map(len, column)) for column in zip(*block, strict=True)]
        for first, *others in block:
            cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        if not right:
            lines.append("")
    return lines


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is its head. A `|` inside a cell is escaped."""
    head, *lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *lines]


def wrap(texts: Iterable[str]) -> list[str]:
    """Return texts cut into lines of a terminal's width."""
    return [textwrap.fill(text, COLUMNS) for text in texts]


def first_line(error: Exception) -> str:
    """Return the message of a library's error, without the advice that follows it."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if more and first.endswith(":") else first
