"""A run measured with tasks of lm-eval: at its first start, with more tasks later, and with a task that fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spinreg_core.errors import EXIT_BAD_INPUT
from spinreg_core.maintenance.verify import verify
from spinreg_core.runs.head import require_head
from spinreg_core.runs.objects import require_manifest
from spinreg_core.runs.stages import complete_round
from spinreg_core.store.open import open_store
from tests.support.benchmark_data import write_tasks
from tests.support.whole_runs import SMOKE, environment, run, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
]


def test_run_asked_for_more_benchmarks_later_adds_only_those(tmp_path: Path) -> None:
    env, store = environment(tmp_path), open_store(str(tmp_path / "store"))
    include = write_tasks(tmp_path / "tasks")

    def arguments(*tasks: str) -> list[str]:
        return ["--config", SMOKE, "--store", store.url, "--until-round", "1", "-p", "benchmarks.limit=4", "-p",
                f"benchmarks.include_path={include}", "-p", f"benchmarks.tasks={json.dumps(tasks)}", "-p",
                "resources.retries=0"]  # fmt: skip

    # Missing data are reported before anything is prepared, sampled or trained.
    refused = start(arguments("gone"), env, tmp_path / "refused")
    assert refused.wait(timeout=300) == EXIT_BAD_INPUT
    assert "benchmarks.tasks: found gone, but its data cannot be loaded" in (tmp_path / "refused").read_text()
    assert store.list("objects/") == []

    text = run(arguments("colours"), env, tmp_path / "first")
    assert "colours acc ↑ (lm-eval, n 4)" in text
    first = [require_head(store, "smoke").measured(n) for n in (0, 1)]
    assert [list(found) for found in first] == [["lm-eval colours"]] * 2
    writers = [require_manifest(store, found["lm-eval colours"]).writer for found in first]

    # `letters` is new, `broken` cannot be judged: the rounds stay, and the other tasks are measured.
    failed = start(arguments("broken", "colours", "letters"), env, tmp_path / "second")
    assert failed.wait(timeout=300) == 1
    text = (tmp_path / "second").read_text()
    assert text.count("is not measured in full") == 2
    assert "this cannot be judged" in text
    head = require_head(store, "smoke")
    assert complete_round(head) == 1
    for number in (0, 1):
        found = head.measured(number)
        assert sorted(found) == ["lm-eval colours", "lm-eval letters"]
        assert found["lm-eval colours"] == first[number]["lm-eval colours"]
        assert require_manifest(store, found["lm-eval colours"]).writer == writers[number]
    names = {key.split("/")[1] for key in store.list("objects/")}
    assert len([name for name in names if re.match("lm-eval-[0-9a-f]{32}$", name)]) == 4
    report = json.loads(store.read("runs/smoke/report.json") or b"")
    for entry in report["rounds"]:
        assert [part["name"] for part in entry["benchmarks"]] == ["colours", "letters"]
    page = (store.read("runs/smoke/report.html") or b"").decode()
    assert '<table class="metrics" id="benchmarks">' in page

    # Results are objects of the run like all others.
    result = verify(store, "smoke")
    assert not result.problems
    damaged = head.measured(1)["lm-eval letters"]
    place = store.local_path(require_manifest(store, damaged).files[0].key)
    assert place is not None
    place.write_bytes(b"x" * place.stat().st_size)
    assert verify(store, "smoke").damaged == [damaged]
    assert verify(store, "smoke").objects[damaged] == (1, "benchmark")
