"""Progress lines: what a stage prints is what the task reads."""

from __future__ import annotations

import pytest

from spinreg_core.runtime.progress import Progress, ProgressLine, parse


def test_progress_line_is_parsed_back(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("generate", 40, "answers", done=10, every=0)
    progress.update(2)
    progress.tell("shards: 3 of 10 committed")
    first, second = map(parse, capsys.readouterr().out.splitlines())
    assert first is not None
    assert second is not None
    assert (first.done, first.total) == (second.done, second.total) == (12, 40)
    assert first.text.startswith("[generate] 12/40 answers (30 %), ")
    assert second.text.endswith(" left; shards: 3 of 10 committed")
    line = "[mix-opponent] 1/2 answers (50 %), 0.25/s, 1:02:03 left"
    assert parse(f"{line}\n") == ProgressLine(line, 1, 2)
    assert parse("3 of 10 shards were committed before") is None


def test_progress_note_after_the_last_unit_is_shown_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("generate", 2, "answers", every=1000)
    progress.update()
    progress.tell("not yet due")
    progress.update()
    progress.tell("all committed")
    assert [line.split("left")[1] for line in capsys.readouterr().out.splitlines()] == [
        "", "; not yet due", "; all committed",
    ]  # fmt: skip
