"""A whole run with the smoke configuration on Prefect's embedded server, and what it must leave behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from runs import ROOT, SMOKE, environment, generations, outcome, run, stage_processes

from spinreg_core.head import ROUND_STAGES, complete_round, pending_advance, read_head, stage_object
from spinreg_core.objects import fetch_file, fetch_folder
from spinreg_core.store import Store, open_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str, Path]:
    tmp = tmp_path_factory.mktemp("smoke")
    shown = ["-p", 'tracking.to=["tensorboard"]', "-p", f"tracking.folder={tmp / 'tensorboard'}"]
    text = run(["--config", SMOKE, "--store", str(tmp / "store"), *shown], environment(tmp), tmp / "log")
    return open_store(str(tmp / "store")), text, tmp


def test_both_rounds_are_complete(finished: tuple[Store, str, Path]) -> None:
    store, text, _ = finished
    head = read_head(store, "smoke")
    assert head is not None
    assert complete_round(head) == 2
    assert head["lease"]["holder"] is None
    for number in (1, 2):
        for stage in ROUND_STAGES:
            assert stage_object(head, number, stage)
    assert "held-out NLL" in text
    assert str(store.local_path("runs/smoke/report.html")) in text


def test_it_shows_progress(finished: tuple[Store, str, Path]) -> None:
    _, text, _ = finished
    for stage in ("generate", "train"):
        assert f"[{stage}]" in text
    assert "left" in text


def test_every_round_was_shown_in_the_tracker_when_it_ended(finished: tuple[Store, str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store, text, tmp = finished
    data = json.loads(store.read("runs/smoke/report.json") or b"")
    folder = tmp / "tensorboard" / "smoke"
    read = EventAccumulator(str(folder)).Reload()
    expected = [(entry["round"], entry["metrics"]["heldout_nll"]["value"]) for entry in data["rounds"]]
    found = [(one.step, one.value) for one in read.Scalars("evaluation/heldout_nll")]
    assert found == [(number, pytest.approx(value, rel=1e-6)) for number, value in expected]
    steps = sum(len(entry["training"]["steps"]) for entry in data["rounds"][1:])
    assert [one.step for one in read.Scalars("training/loss")] == list(range(1, steps + 1))
    assert "is not shown in" not in text
    written = [path.stat().st_mtime for path in sorted(folder.iterdir())]
    trained = {line["round"]: line["created"] for line in data["lineage"] if line["stage"] == "train"}
    for number in (1, 2):  # a file whose numbers stay is left alone
        assert written[number - 1] < datetime.fromisoformat(trained[number]).timestamp() + 1


def test_running_it_again_changes_nothing(finished: tuple[Store, str, Path]) -> None:
    store, _, tmp = finished
    before, objects = outcome(store, "smoke"), store.list("objects/")
    text = run(["--config", SMOKE, "--store", str(tmp / "store")], environment(tmp), tmp / "again")
    assert outcome(store, "smoke") == before
    assert store.list("objects/") == objects
    assert "round 2 is complete" in text


def test_a_condition_ends_it_before_the_next_round(finished: tuple[Store, str, Path]) -> None:
    store, _, tmp = finished
    before, objects = outcome(store, "smoke"), store.list("objects/")
    more = ["--until-round", "4", "-p", "until.kl_base_above=1e-6"]
    text = run(["--config", SMOKE, "--store", str(tmp / "store"), *more], environment(tmp), tmp / "ended")
    assert "run 'smoke' ends before round 3: the KL to the base is" in text
    assert "above until.kl_base_above (1e-06)" in text
    assert outcome(store, "smoke") == before
    assert store.list("objects/") == objects
    head = read_head(store, "smoke")
    assert head is not None
    assert pending_advance(head) is None


def test_a_grid_makes_only_what_is_not_there_and_survives_a_member(finished: tuple[Store, str, Path]) -> None:
    store, _, tmp = finished
    before, objects = outcome(store, "smoke"), set(store.list("objects/"))
    different = {"as-it-was": {}, "longer": {"training": {"epochs": 2}}, "broken": {"benchmarks": {"include": "/no"}}}
    (tmp / "variations.json").write_text(json.dumps(different))
    command = [sys.executable, "-m", "flows.cli", "grid", "--name", "small", "--config", SMOKE, "--store", store.url,
               "--until-round", "1", "--variations", str(tmp / "variations.json")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp), capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"small-broken-s0 is left out: .*benchmarks.include", done.stderr), done.stderr
    assert outcome(store, "smoke") == before
    made = {key.split("/")[1].split("-")[0] for key in set(store.list("objects/")) - objects}
    assert made == {"train", "evaluate", "generate"}, "of round 1, by the member that trains longer"
    data = json.loads(store.read("comparisons/small/report.json") or b"")
    assert [one["run"] for one in data["runs"]] == ["small-as-it-was-s0", "small-longer-s0"]
    assert list(data["left_out"]) == ["small-broken-s0"]
    assert any("small-broken-s0 (" in note for note in data["notes"])
    assert data["variants"][1]["differences"] == ["training.epochs: 1 -> 2"]
    assert data["verdict"]["headline"] in done.stdout + done.stderr


def test_no_stage_process_is_left(finished: tuple[Store, str, Path]) -> None:
    _, _, tmp = finished
    assert [command for _, command in stage_processes() if str(tmp) in command] == []


def test_no_row_is_lost_or_doubled(finished: tuple[Store, str, Path]) -> None:
    store, _, _ = finished
    head = read_head(store, "smoke")
    assert head is not None
    train = pq.read_table(fetch_file(store, head["data"], "train.parquet")).to_pylist()
    known = {row["prompt_id"]: row for row in train}
    for number in (1, 2):
        rows = generations(store, "smoke", number)
        ids = [row["prompt_id"] for row in rows]
        assert len(ids) == len(set(ids))
        for row in rows:
            assert row["prompt_ids"] == known[row["prompt_id"]]["prompt_ids"]
        pairs = pq.read_table(
            fetch_file(store, str(stage_object(head, number, "mix-opponent")), "pairs.parquet")
        ).to_pylist()
        assert len({p["pair_id"] for p in pairs}) == len(pairs)
        newest = {p["prompt_id"]: p for p in pairs if p["round"] == number}
        assert set(newest) == set(ids)
        for row in rows:
            pair = newest[row["prompt_id"]]
            assert pair["prompt_ids"] == row["prompt_ids"]
            assert pair["generated_ids"] == row["answer_ids"]  # the sampled ids, never re-encoded text
    # Fictitious play by replay: round 2 trains on the pairs of both rounds.
    assert {p["round"] for p in pairs} == {1, 2}


def test_the_policy_loads_as_an_ordinary_folder(finished: tuple[Store, str, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store, _, _ = finished
    head = read_head(store, "smoke")
    assert head is not None
    folder = fetch_folder(store, str(stage_object(head, 2, "train")), "policy")
    base = fetch_folder(store, head["base"], "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    other = AutoModelForCausalLM.from_pretrained(base)
    moved = [
        not torch.equal(a.float(), b.float()) for a, b in zip(policy.parameters(), other.parameters(), strict=True)
    ]
    assert all(moved)


def test_the_report_holds_what_the_json_holds(finished: tuple[Store, str, Path]) -> None:
    store, _, _ = finished
    html = (store.read("runs/smoke/report.html") or b"").decode()
    data = json.loads(store.read("runs/smoke/report.json") or b"")
    assert "<script src" not in html
    assert "heldout_nll" in json.dumps(data)
    assert len(html) > 10_000
