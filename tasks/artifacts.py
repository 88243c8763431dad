"""Prefect artifacts: progress, tables, markdown. Best effort: sending them never delays or ends the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast
from uuid import UUID

from spinreg_core.runtime.progress import ProgressLine
from tasks.server import post


class StageProgress:
    """Progress artifact of one stage: the first progress line creates it, later ones update it.

    Pass an instance as `on_progress` of `run_stage`. key: lower-case letters, digits, dashes.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None

    def __call__(self, line: ProgressLine) -> None:
        post(self, partial(self._send, line))

    def _send(self, line: ProgressLine) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = 100.0 * line.done / max(line.total, 1)
        if self._artifact is None:
            self._artifact = cast(UUID, create_progress_artifact(percent, key=self._key, description=line.text))
        else:
            update_progress_artifact(self._artifact, percent, line.text)


def artifact_key(*parts: object) -> str:
    """Return a key for an artifact; Prefect takes lower-case letters, digits and dashes."""
    return "-".join(str(part) for part in parts).replace(".", "-").replace("_", "-")


def show_table(key: str, rows: Sequence[Mapping[str, object]], description: str) -> None:
    """Show `rows` as a table artifact of the current run."""
    from prefect.artifacts import create_table_artifact

    post(object(), partial(create_table_artifact, [dict(row) for row in rows], key=key, description=description))


def show_markdown(key: str, markdown: str, description: str) -> None:
    """Show `markdown` as an artifact of the current run."""
    from prefect.artifacts import create_markdown_artifact

    post(object(), partial(create_markdown_artifact, markdown, key=key, description=description))
