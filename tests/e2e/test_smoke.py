"""A whole run of the smoke configuration on Prefect's embedded server: its output, its objects and its exports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flows.cli import main
from spinreg_core.errors import EXIT_BAD_INPUT, BadInput
from spinreg_core.evaluation.formatting import format_estimate
from spinreg_core.reports.export import export, parse_size, push, reshard
from spinreg_core.reports.status import format_status
from spinreg_core.runs.fetch import fetch_file, fetch_folder
from spinreg_core.runs.head import read_head, require_config, require_head
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.stages import complete_round, stages_of
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.benchmark_data import write_tasks
from tests.support.whole_runs import ROOT, SMOKE, environment, generations, outcome, run, stage_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str, Path]:
    tmp = tmp_path_factory.mktemp("smoke")
    measured = ["-p", f"benchmarks.include_path={write_tasks(tmp / 'tasks')}", "-p", 'benchmarks.tasks=["colours"]',
                "-p", "benchmarks.limit=4", "-p", "benchmarks.rounds=[1]"]  # fmt: skip
    shown = ["-p", 'tracking.to=["tensorboard"]', "-p", f"tracking.folder={tmp / 'tensorboard'}"]
    text = run(["--config", SMOKE, "--store", str(tmp / "store"), *measured, *shown], environment(tmp), tmp / "log")
    return open_store(str(tmp / "store")), text, tmp


def test_smoke_run_completes_both_rounds(finished: tuple[Store, str, Path]) -> None:
    store, text, _ = finished
    head = read_head(store, "smoke")
    assert head is not None
    assert complete_round(head) == 2
    assert head.lease.holder is None
    for number in (1, 2):
        for stage in stages_of(1):
            assert head.stage(number, stage)
    assert "held-out NLL" in text
    assert str(store.local_path("runs/smoke/report.html")) in text


def test_smoke_run_shows_no_errors_of_the_server(finished: tuple[Store, str, Path]) -> None:
    """The embedded server cannot reach its telemetry here."""
    assert "telemetry" not in finished[1]
    assert "ERROR" not in finished[1]


def test_second_start_of_a_held_run_ends_with_one_line_and_status_75(finished: tuple[Store, str, Path]) -> None:
    store, _, tmp = finished
    config = require_config(store, "smoke")
    with hold_lease(store, config, "the first start"):
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "run", "--config", SMOKE, "--store", str(tmp / "store"),
             "-p", "resources.lease_seconds=5"],
            env=environment(tmp), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 75, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("spinreg: ")]
    assert line.startswith("spinreg: run 'smoke' is being advanced by the first start (pid ")
    assert "Traceback" not in done.stdout + done.stderr


def test_smoke_run_prints_progress(finished: tuple[Store, str, Path]) -> None:
    _, text, _ = finished
    for stage in ("generate", "train"):
        assert f"[{stage}]" in text
    assert "left" in text


def test_tracker_at_the_end_of_a_round_shows_it(finished: tuple[Store, str, Path]) -> None:
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
    for number in (1, 2):  # a file with unchanged numbers is not written again
        assert written[number - 1] < datetime.fromisoformat(trained[number]).timestamp() + 1


def test_smoke_run_started_again_changes_nothing(finished: tuple[Store, str, Path]) -> None:
    store, _, tmp = finished
    before, objects = outcome(store, "smoke"), store.list("objects/")
    text = run(["--config", SMOKE, "--store", str(tmp / "store")], environment(tmp), tmp / "again")
    assert outcome(store, "smoke") == before
    assert store.list("objects/") == objects
    assert "round 2 is complete" in text


@pytest.mark.long
def test_run_meeting_its_condition_ends_before_the_next_round(finished: tuple[Store, str, Path]) -> None:
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
    assert head.pending_advance is None
    told = "ended before round 4: the KL to the base is"
    assert any(told in note for note in json.loads(store.read("runs/smoke/report.json") or b"")["notes"])
    assert told in format_status(store, "smoke")[0]


@pytest.mark.long
def test_grid_with_a_failing_member_makes_only_missing_objects(finished: tuple[Store, str, Path]) -> None:
    store, _, tmp = finished
    before, objects = outcome(store, "smoke"), set(store.list("objects/"))
    different = {
        "as-it-was": {},
        "longer": {"training": {"epochs": 2}},
        "broken": {"training": {"learning_rate": 3e38}},
    }
    (tmp / "variations.json").write_text(json.dumps(different))
    command = [sys.executable, "-m", "flows.cli", "grid", "--name", "small", "--config", SMOKE, "--store", store.url,
               "--until-round", "1", "--variations", str(tmp / "variations.json")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp), capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"small-broken-s0 failed: training of .*expected finite numbers", done.stderr), done.stderr
    assert outcome(store, "smoke") == before
    made = {key.split("/")[1].split("-")[0] for key in set(store.list("objects/")) - objects}
    assert made == {"train", "evaluate", "generate"}, "of round 1, by the member with more epochs"
    data = json.loads(store.read("comparisons/small/report.json") or b"")
    assert [one["run"] for one in data["runs"]] == ["small-as-it-was-s0", "small-longer-s0"]
    assert list(data["failed"]) == ["small-broken-s0"]
    assert any("small-broken-s0 (" in note for note in data["notes"])
    assert data["variants"][1]["differences"] == ["training.epochs: 1 -> 2"]
    assert data["verdict"]["headline"] in done.stdout + done.stderr


def test_finished_run_leaves_no_stage_process(finished: tuple[Store, str, Path]) -> None:
    _, _, tmp = finished
    assert [command for _, command in stage_processes() if str(tmp) in command] == []


def test_smoke_run_neither_loses_nor_doubles_rows(finished: tuple[Store, str, Path]) -> None:
    store, _, _ = finished
    head = read_head(store, "smoke")
    assert head is not None
    train = pq.read_table(fetch_file(store, head.data, "train.parquet")).to_pylist()
    known = {row["prompt_id"]: row for row in train}
    for number in (1, 2):
        rows = generations(store, "smoke", number)
        ids = [row["prompt_id"] for row in rows]
        assert len(ids) == len(set(ids))
        for row in rows:
            assert row["prompt_ids"] == known[row["prompt_id"]]["prompt_ids"]
        pairs = pq.read_table(fetch_file(store, str(head.stage(number, "mix-opponent")), "pairs.parquet")).to_pylist()
        assert len({p["pair_id"] for p in pairs}) == len(pairs)
        newest = {p["prompt_id"]: p for p in pairs if p["round"] == number}
        assert set(newest) == set(ids)
        for row in rows:
            pair = newest[row["prompt_id"]]
            assert pair["prompt_ids"] == row["prompt_ids"]
            assert pair["generated_ids"] == row["answer_ids"]  # the sampled ids, never re-encoded text
    # Fictitious play by replay: round 2 trains on the pairs of both rounds.
    assert {p["round"] for p in pairs} == {1, 2}


def test_trained_policy_loads_as_an_ordinary_folder(finished: tuple[Store, str, Path]) -> None:
    store, _, _ = finished
    head = read_head(store, "smoke")
    assert head is not None
    folder = fetch_folder(store, str(head.stage(2, "train")), "policy")
    base = fetch_folder(store, head.base, "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    other = AutoModelForCausalLM.from_pretrained(base)
    moved = [
        not torch.equal(a.float(), b.float()) for a, b in zip(policy.parameters(), other.parameters(), strict=True)
    ]
    assert all(moved)


def test_report_is_self_contained_and_its_json_has_the_metrics(finished: tuple[Store, str, Path]) -> None:
    store, _, _ = finished
    html = (store.read("runs/smoke/report.html") or b"").decode()
    data = json.loads(store.read("runs/smoke/report.json") or b"")
    assert "<script src" not in html
    assert "heldout_nll" in json.dumps(data)
    assert len(html) > 10_000


# Exports of its policies: model folders for use without spinreg


def committed(store: Store) -> Path:
    head = read_head(store, "smoke")
    assert head is not None
    object_id = head.stage(1, "train")
    assert object_id is not None
    return fetch_folder(store, object_id, "policy")


def test_export_equals_the_committed_policy_and_adds_a_card(
    finished: tuple[Store, str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _, _ = finished
    target = tmp_path / "model"
    assert (
        main(
            [
                "export",
                "smoke",
                "--round",
                "1",
                "--store",
                store.url,
                "--to",
                str(target),
                "--push",
                str(tmp_path / "hub"),
            ]
        )
        == 0
    )
    assert f"pushed to {tmp_path / 'hub'}" in capsys.readouterr().out
    for path in committed(store).iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes() == (tmp_path / "hub" / path.name).read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= {
        path.name for path in target.iterdir()
    }
    GenerationConfig.from_pretrained(target)
    assert AutoTokenizer.from_pretrained(target).chat_template
    card = ModelCard.load(target / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None, "random:tiny is no model of the hub"
    report = json.loads((store.read("runs/smoke/report.json") or b"").decode())
    text = card.text
    assert "# smoke, round 1" in text
    assert "| alpha (weight of the previous policy in the reference" in text
    for name in ("held-out NLL", "KL to base", "reward accuracy"):
        assert f"| {name}" in text
    assert [part["name"] for part in report["rounds"][1]["benchmarks"]] == ["colours"]
    assert report["rounds"][0]["benchmarks"] == []
    accuracy = report["rounds"][1]["benchmarks"][0]["metrics"]["acc"]
    assert f"| colours | acc | {format_estimate(accuracy)} | 4 |" in text
    assert list(require_head(store, "smoke").measured(1)) == ["lm-eval colours"]
    low = report["rounds"][1]["metrics"]["heldout_nll"]["low"]
    assert f"[{low:.2f}"[:4] in text
    for line in report["lineage"]:
        if line["round"] in (None, 1) and line["stage"] in ("base", "data", "generate", "mix-opponent", "train"):
            assert f"`{line['object_id']}`" in text
    for line in text.splitlines():
        if line.startswith("|") and "metric" not in line and "---" not in line:
            assert line.count("|") in (3, 4, 5, 7), line


def test_export_in_small_files_holds_the_same_weights(finished: tuple[Store, str, Path], tmp_path: Path) -> None:
    store, _, _ = finished
    folder = tmp_path / "small"
    folder.mkdir()
    source = committed(store)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    reshard(source, folder, 100_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 300_000 for path in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    models = [AutoModelForCausalLM.from_pretrained(place) for place in (source, folder)]
    found, expected = (model.state_dict() for model in models)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_export_of_the_base_below_the_shard_size_is_one_file(finished: tuple[Store, str, Path], tmp_path: Path) -> None:
    store, _, _ = finished
    export(store, "smoke", tmp_path / "base", round_number=0, shard_size="1MB")
    (weights,) = (tmp_path / "base").glob("*.safetensors*")
    assert (weights.name, weights.stat().st_mode & 0o777) == ("model.safetensors", 0o644)
    assert "# smoke, base" in (tmp_path / "base" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_export_with_bad_arguments_is_refused_and_writes_nothing(
    finished: tuple[Store, str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, _, _ = finished
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(BadInput, match=r"--to is not empty .*; name an empty folder or a new one"):
        export(store, "smoke", tmp_path / "full")
    with pytest.raises(
        BadInput, match=r"--round: found 7, which is not trained .*; expected 0 or a trained round \(1, 2\)"
    ):
        export(store, "smoke", tmp_path / "none", round_number=7)
    with pytest.raises(BadInput, match="--shard-size: found '5'; expected a size"):
        export(store, "smoke", tmp_path / "none", shard_size="5")
    with pytest.raises(BadInput, match="--push: found 'somewhere'"):
        push(tmp_path / "full", "somewhere")
    with pytest.raises(BadInput, match="--push is not empty"):
        push(tmp_path / "full", str(tmp_path / "full"))
    asked = ["export", "smoke", "--store", store.url, "--to", str(tmp_path / "none"), "--push"]
    assert main([*asked, "somewhere"]) == EXIT_BAD_INPUT, "before anything is written"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(BadInput, match=r"--push: found nobody/model, which the hub refuses .*refused"):
        push(tmp_path / "full", "nobody/model")
    capsys.readouterr()
    assert main(["export", "nobody", "--store", store.url, "--to", str(tmp_path / "none")]) == EXIT_BAD_INPUT
    assert "one of the runs of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"], "no half-written folder is left"
    assert (parse_size("5GB"), parse_size("1.5 mib")) == (5 * 10**9, 3 * 2**19)
