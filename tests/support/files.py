"""Small files that tests write: JSON lines, and JSON documents with other fields."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def write_jsonl(path: Path, rows: Iterable[object]) -> str:
    """Write one row a line, texts as they are, and return the path as text."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def change_json(path: Path, **fields: object) -> None:
    """Set fields of the JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
