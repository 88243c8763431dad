"""What a run shows in Prefect: log lines, progress, tables, markdown. Best effort, never in the way of the work.

Decides: that everything shown is sent by one background thread, the newest state of a thing only, and again
when the server could not be reached; what becomes of a nested flow while the server is away (measured with
Prefect 3.7.7: a task called directly needs no server, not even for retries, unless it has tags; a flow's start and
end do, are tried for about a minute, and then end the run).
Leaves out: what is shown (the tasks and flows).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast
from uuid import UUID

from spinreg_core.runtime.progress import ProgressLine
from tasks.server import post


class StageProgress:
    """The progress artifact of one stage, made by the first line and updated by the later ones.

    Pass an instance as `on_progress` of `run_stage`. `key`: lower case letters, digits, dashes.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None

    def __call__(self, line: ProgressLine) -> None:
        post(self, partial(self._send, line))

    def _send(self, line: ProgressLine) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = 100.0 * line.done / max(line.total, 1)
        minutes, seconds = divmod(line.eta_seconds, 60)
        text = f"{line.stage}: {line.done}/{line.total} {line.unit}, {line.rate:.2f}/s, {minutes}:{seconds:02d} left"
        text += f"; {line.note}" if line.note else ""
        if self._artifact is None:
            self._artifact = cast(UUID, create_progress_artifact(percent, key=self._key, description=text))
        else:
            update_progress_artifact(self._artifact, percent, text)


def artifact_key(*parts: object) -> str:
    """A key for an artifact; Prefect takes lower case letters, digits and dashes."""
    return "-".join(str(part) for part in parts).replace(".", "-").replace("_", "-")


def show_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    """Show `rows` as a table artifact of the current run."""
    from prefect.artifacts import create_table_artifact

    post(object(), partial(create_table_artifact, rows, key=key, description=description))


def show_markdown(key: str, markdown: str, description: str) -> None:
    """Show `markdown` as an artifact of the current run."""
    from prefect.artifacts import create_markdown_artifact

    post(object(), partial(create_markdown_artifact, markdown, key=key, description=description))
