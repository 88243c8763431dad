"""The train stage: what it publishes, and that a stopped or killed round goes on to the same bits."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spinreg_core.errors import BadInput
from spinreg_core.logprobs.scoring import score
from spinreg_core.models.loading import load_policy
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runtime import supervision
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.runtime.progress import parse
from spinreg_core.runtime.supervision import Preempted
from spinreg_core.stages import train
from spinreg_core.store.folder import FolderStore
from spinreg_core.training.step_checkpoints import StepCheckpoints
from spinreg_core.training.trainer import RoundTrainer
from tests.support.training_fixtures import PAIRS, Setting, lines, sha_of_weights, without_time

STEPS = 12  # two epochs of five full batches and one of two pairs


@pytest.fixture(scope="module", name="setting")
def _setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module", name="whole")
def _whole(setting: Setting) -> dict[str, Any]:
    """The manifest of a round that nothing interrupted."""
    return train.run(setting.job("whole"))


def test_train_leaves_metrics_and_summary(setting: Setting, whole: Manifest) -> None:
    metrics = lines(setting.store, whole)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["epoch"] for m in metrics] == [1] * 6 + [2] * 6
    assert [m["pairs"] for m in metrics] == [4, 4, 4, 4, 4, 2] * 2
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics[-1]["margin"] > metrics[0]["margin"] + 1
    wanted = {"loss", "margin", "accuracy", "real_logp", "generated_logp", "real_logp_per_token", "grad_norm"}
    wanted |= {
        "log_ratio_previous_generated",
        "log_ratio_base_generated",
        "kl_from_previous",
        "learning_rate",
        "tokens_per_second",
    }
    assert wanted <= metrics[0].keys()
    summary = json.loads(fetch.fetch_file(setting.store, whole.object_id, "summary.json").read_text())
    assert summary == whole.metrics
    assert (summary["steps"], summary["pairs"]) == (STEPS, PAIRS)
    assert summary["last_loss"] == metrics[-1]["loss"]
    assert {"real_logprob_change", "seconds", "tokens_per_second", "accuracy", "alarms"} <= summary.keys()
    assert objects.usable_parts(setting.store, whole.object_id) == {}, "checkpoints of a finished round"


def test_the_published_policy_is_an_ordinary_folder(setting: Setting, whole: Manifest) -> None:
    folder = fetch.fetch_folder(setting.store, whole.object_id, "policy")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {p.relative_to(setting.folder).as_posix() for p in setting.folder.rglob("*") if p.is_file()}
    for name in names - {"model.safetensors", "config.json"}:
        assert (folder / name).read_bytes() == (setting.folder / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert str(model.dtype) == "torch.float32"
    before = load_file(setting.folder / "model.safetensors")
    assert weights.keys() == before.keys()
    assert all((weights[name] != before[name]).any() for name in weights)  # every tensor was trained
    # The cached change is that of the policy as it was published.
    rows = pq.read_table(fetch.fetch_file(setting.store, setting.pairs, "pairs.parquet")).to_pylist()
    trained = load_policy(folder, "fp32", "cpu")
    after = score(
        trained, [r["prompt_ids"] for r in rows], [r["real_ids"] for r in rows], precision="fp32", tokens_per_pass=200
    )
    change = sum(b - r["previous_real"] for b, r in zip(after, rows, strict=True)) / PAIRS
    assert whole.metrics["real_logprob_change"] == pytest.approx(change, abs=1e-3)


def test_train_prints_progress_steps_and_alarms(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = train.run(setting.job("shown", learning_rate=0.05))  # far too high: human answers become less likely
    output = capsys.readouterr().out.splitlines()
    progress = [line for line in map(parse, output) if line]
    assert progress[-1].text.startswith("[train] 12/12 steps (100 %), ")
    assert any(line.startswith("step 12/12: loss ") for line in output)
    (alarm,) = [line for line in output if line.startswith("ALARM: ")]
    assert manifest.metrics["alarms"] == [alarm.removeprefix("ALARM: ")]
    assert manifest.metrics["real_logprob_change"] < 0


class Watched(RoundTrainer):
    """A trainer that lists the steps it takes, and calls `before` ahead of each gradient."""

    def __init__(self, *arguments: Any, before: Callable[[RoundTrainer], None], taken: list[int], **given: Any) -> None:
        super().__init__(*arguments, **given)
        self.before, self.taken = before, taken

    def gradient(self, *arguments: Any) -> Any:
        self.taken.append(self.state.done + 1)
        self.before(self)
        return super().gradient(*arguments)


def watched(before: Callable[[RoundTrainer], None] = lambda trainer: None, taken: list[int] | None = None) -> Any:
    return partial(Watched, before=before, taken=[] if taken is None else taken)


def failing_at(step: int) -> Any:
    """A trainer that fails after so many steps."""

    def fail(trainer: RoundTrainer) -> None:
        if trainer.state.done == step:
            raise RuntimeError("the machine broke")

    return watched(fail)


class InTurn(StepCheckpoints):
    """Commits each checkpoint before the next step: how far a thread comes is chance otherwise."""

    def after_step(self, stopped_at: float | None) -> bool:
        stop = super().after_step(stopped_at)
        self.wait()
        return stop


def broken_off(setting: Setting, name: str, step: int, **training: Any) -> Job:
    """A round that failed after `step` steps, its checkpoints committed, and the job that resumes it."""
    with pytest.raises(RuntimeError, match="broke"):
        train.run(setting.job(name, **training), trainer=failing_at(step), checkpointer=InTurn)
    return setting.job(name, writer="e0002-bb", **training)


def test_train_resumed_after_a_failure_repeats_all_bits(
    setting: Setting, whole: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    job = broken_off(setting, "failed", 8)
    assert objects.read_manifest(setting.store, job.object_id) is None
    taken: list[int] = []
    manifest = train.run(job, trainer=watched(taken=taken))
    assert taken == [6, 7, 8, 9, 10, 11, 12]  # from the checkpoint of step 5
    assert "resuming from the checkpoint of step 5 of 12" in capsys.readouterr().out
    assert sha_of_weights(manifest) == sha_of_weights(whole)
    assert without_time(lines(setting.store, manifest)) == without_time(lines(setting.store, whole))
    assert manifest.metrics["real_logprob_change"] == whole.metrics["real_logprob_change"]
    assert objects.usable_parts(setting.store, job.object_id) == {}


def test_newest_checkpoints_are_kept_with_their_cost(setting: Setting) -> None:
    job = broken_off(setting, "kept", 9, checkpoint_every_steps=2, checkpoints_kept=3)
    parts = objects.usable_parts(setting.store, job.object_id)
    assert list(parts) == ["step-000004", "step-000006", "step-000008"]
    stored = setting.store.list(f"objects/{job.object_id}/data/")
    assert len([key for key in stored if "/step-" in key]) == 3 * 2, "files of older ones are gone too"
    meta = parts["step-000008"].meta
    assert meta["bytes"] == sum(f.size for f in parts["step-000008"].files)
    assert meta.keys() == {"step", "ranks", "pause_seconds", "bytes", "upload_seconds"}


@pytest.mark.parametrize("step", [9, 11], ids=["met by the next checkpoint", "met when the policy is published"])
def test_unreadable_older_checkpoint_is_removed(setting: Setting, whole: Manifest, step: int, capsys: Any) -> None:
    job = broken_off(setting, f"torn-{step}", step, checkpoint_every_steps=2, checkpoints_kept=3)
    oldest = objects.part_names(setting.store, job.object_id)[0]
    path = setting.store.local_path(objects.part_key(job.object_id, oldest))
    assert path is not None
    path.write_bytes(b"torn")
    manifest = train.run(job, checkpointer=InTurn)
    output = capsys.readouterr().out
    assert f"checkpoint {oldest} cannot be read and is removed" in output
    assert "could not be stored" not in output
    assert objects.part_names(setting.store, job.object_id) == []
    assert sha_of_weights(manifest) == sha_of_weights(whole)


def test_a_checkpoint_is_due_by_time_too(setting: Setting) -> None:
    job = broken_off(setting, "timed", 3, checkpoint_every_steps=None, checkpoint_every_minutes=1e-9)
    assert list(objects.usable_parts(setting.store, job.object_id)) == ["step-000002", "step-000003"]
    job = broken_off(setting, "never", 3, checkpoint_every_steps=None, checkpoint_every_minutes=None)
    assert objects.usable_parts(setting.store, job.object_id) == {}


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(setting: Setting, whole: Manifest, capsys: Any) -> None:
    job = broken_off(setting, "damaged", 11)
    for file in objects.usable_parts(setting.store, job.object_id)["step-000010"].files:
        path = setting.store.local_path(file.key)
        assert path is not None
        path.write_bytes(path.read_bytes()[:-1])
    manifest = train.run(job)
    output = capsys.readouterr().out
    assert "step-000010 cannot be read and is removed" in output
    assert "checkpoint of step 5 of 12" in output
    assert sha_of_weights(manifest) == sha_of_weights(whole)


@pytest.mark.parametrize("damage", ["file", "manifest", "missing"])
def test_a_sound_checkpoint_takes_the_place_of_a_damaged_one(
    setting: Setting, whole: Manifest, damage: str, capsys: Any
) -> None:
    job = broken_off(setting, f"replaced-{damage}", 11)
    part = objects.usable_parts(setting.store, job.object_id)["step-000010"]
    paths = [setting.store.local_path(file.key) for file in part.files]
    if damage == "manifest":
        paths = [setting.store.local_path(f"objects/{job.object_id}/parts/step-000010.json")]
    for path in paths:
        assert path is not None
        path.unlink() if damage == "missing" else path.write_bytes(b"torn")
    with pytest.raises(RuntimeError, match="broke"):
        train.run(job, trainer=failing_at(11), checkpointer=InTurn)
    assert "checkpoint step-000010 committed" in capsys.readouterr().out
    assert list(objects.usable_parts(setting.store, job.object_id)) == ["step-000005", "step-000010"]
    manifest = train.run(setting.job(f"replaced-{damage}", writer="e0003-cc"))
    assert "checkpoint of step 10 of 12" in capsys.readouterr().out
    assert sha_of_weights(manifest) == sha_of_weights(whole)


class FullStore(FolderStore):
    def upload(self, path: Path, key: str) -> None:
        raise OSError("no space left")


class IntoAFullStore(InTurn):
    def __init__(self, store: FolderStore, *rest: Any) -> None:
        super().__init__(FullStore(store.root), *rest)


def test_failing_store_costs_only_the_checkpoint(setting: Setting, whole: Manifest, capsys: Any) -> None:
    manifest = train.run(setting.job("away"), checkpointer=IntoAFullStore)
    output = capsys.readouterr().out
    for step in (5, 10):
        assert f"checkpoint step-{step:06d} could not be stored, training goes on: OSError: no space left" in output
    assert sha_of_weights(manifest) == sha_of_weights(whole)


def stopping_in(step: int) -> Any:
    """A trainer that gets SIGTERM in the middle of a step."""

    def stop(trainer: RoundTrainer) -> None:
        if trainer.state.done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, supervision.on_sigterm)
    return watched(stop)


@pytest.fixture(autouse=True)
def _sigterm_is_ours_for_a_test() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_finishes_the_step_and_leaves_a_checkpoint_of_it(setting: Setting, whole: Manifest) -> None:
    with pytest.raises(Preempted):
        train.run(setting.job("stopped"), trainer=stopping_in(4))
    job = setting.job("stopped", writer="e0002-bb")
    assert list(objects.usable_parts(setting.store, job.object_id)) == ["step-000004"]
    assert sha_of_weights(train.run(job)) == sha_of_weights(whole)


def test_sigterm_in_the_last_step_lets_the_round_end(setting: Setting, whole: Manifest) -> None:
    """The last step is done, so the next start only publishes."""
    with pytest.raises(Preempted):
        train.run(setting.job("stopped-last"), trainer=stopping_in(STEPS))
    taken: list[int] = []
    manifest = train.run(setting.job("stopped-last", writer="e0002-bb"), trainer=watched(taken=taken))
    assert taken == []
    assert sha_of_weights(manifest) == sha_of_weights(whole)


class Slow(StepCheckpoints):
    """Checkpoints that took 1e9 s each until now."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds = 1e9


def test_sigterm_without_time_begins_no_checkpoint(setting: Setting, capsys: Any) -> None:
    job = setting.job("slow")
    with pytest.raises(Preempted):
        train.run(job, trainer=stopping_in(4), checkpointer=Slow)
    assert objects.usable_parts(setting.store, job.object_id) == {}
    assert "stopped after step 4; no time for a checkpoint, the last is of step 0" in capsys.readouterr().out


def first_checkpoint(output: Iterable[str]) -> int:
    """Reads until a checkpoint is committed; its step. Which one that is depends on how fast the store was."""
    for line in output:
        if found := re.match(r"checkpoint step-(\d+) committed", line):
            return int(found[1])
    raise AssertionError("the round was over before a checkpoint was committed")


@pytest.mark.long
@pytest.mark.slow
def test_kill_9_in_the_middle_changes_no_bit(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    job = setting.job("killed", epochs=20, learning_rate=1e-4)
    job.workdir.mkdir(parents=True)
    job.save(tmp_path / "job.json")
    command = [sys.executable, "-m", "spinreg_core.stages.train", str(tmp_path / "job.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    with start() as first:
        assert first.stdout is not None
        committed = first_checkpoint(first.stdout)
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    assert objects.read_manifest(setting.store, job.object_id) is None
    with start() as second:
        assert second.stdout is not None
        output = second.stdout.read()
    assert second.returncode == 0, output
    resumed = re.search(r"resuming from the checkpoint of step (\d+) of 120", output)
    assert resumed is not None, output
    assert committed <= int(resumed[1]) < 120
    killed = objects.require_manifest(setting.store, job.object_id)

    other = setting.job("unbroken", epochs=20, learning_rate=1e-4, checkpoint_every_steps=None)
    other.save(tmp_path / "job.json")
    with start() as third:
        assert third.stdout is not None
        output = third.stdout.read()
    assert third.returncode == 0, output
    unbroken = objects.require_manifest(setting.store, other.object_id)
    assert sha_of_weights(killed) == sha_of_weights(unbroken)
    assert objects.usable_parts(setting.store, other.object_id) == {}


@pytest.mark.slow
def test_sigterm_ends_the_process_and_keeps_its_work(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    job = setting.job("stopped", epochs=500, checkpoint_every_steps=100_000)
    job.workdir.mkdir(parents=True)
    job.save(tmp_path / "job.json")
    command = [sys.executable, "-m", "spinreg_core.stages.train", str(tmp_path / "job.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        rest = process.stdout.read()
    assert time.monotonic() - begin < 10
    assert process.returncode == 143
    (part,) = objects.usable_parts(setting.store, job.object_id)
    assert f"checkpoint {part} committed" in rest


def test_save_dtype_bfloat16_publishes_bfloat16(setting: Setting, tmp_path: Path) -> None:
    manifest = train.run(setting.job("half", save_dtype="bfloat16", precision="mixed"))
    folder = fetch.fetch_folder(setting.store, manifest.object_id, "policy")
    assert {str(t.dtype) for t in load_file(folder / "model.safetensors").values()} == {"torch.bfloat16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert str(AutoModelForCausalLM.from_pretrained(folder).dtype) == "torch.bfloat16"


def test_all_threads_of_the_process_flush_denormal_numbers() -> None:
    """They slow the backward passes of confident pairs down a dozen times."""
    code = """
import runpy, torch
import spinreg_core.runtime.main as entry
def check(run, ranked):
    torch.set_num_threads(2)
    small = torch.full((4_000_000,), 1e-39)
    assert int((small * 1.0).ne(0).sum()) == 0
    print("checked")
entry.main = check
runpy.run_module("spinreg_core.stages.train", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "checked\n", done.stderr


def test_adapter_resumes_to_the_same_bits_and_continues(setting: Setting, capsys: Any) -> None:
    lora = {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]}
    whole = train.run(setting.job("lora-whole", **lora))
    assert "LoRA of rank 4 on q_proj, v_proj: 896 of " in capsys.readouterr().out
    job = broken_off(setting, "lora", 8, **lora)
    (part,) = objects.usable_parts(setting.store, job.object_id).values()
    assert part.meta["bytes"] < 30_000, "a checkpoint holds the adapter, not the model"
    manifest = train.run(job)
    assert "resuming from the checkpoint of step 5 of 12" in capsys.readouterr().out
    files = [{f.name: f.sha256 for f in m.files} for m in (whole, manifest)]
    for name in ("policy/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert files[0][name] == files[1][name], name

    later = setting.job("lora-next", learning_rate=1e-9, **lora)
    later = replace(later, inputs=later.inputs | {"previous": whole.object_id})
    after = train.run(later)
    policies = [load_file(fetch.fetch_file(setting.store, m.object_id, "policy/model.safetensors"))
                for m in (whole, after)]  # fmt: skip
    base = load_file(setting.folder / "model.safetensors")
    for name, value in policies[1].items():
        torch.testing.assert_close(value, policies[0][name], rtol=0, atol=1e-6)
        assert torch.equal(value, base[name]) != ("q_proj" in name or "v_proj" in name)


def test_adapter_in_mixed_precision_measures_its_start(setting: Setting) -> None:
    """The cached scores are those of the merged policy, which bfloat16 rounds otherwise than base and adapter."""
    settings = {"lora_rank": 4, "precision": "mixed"}
    first = train.run(setting.job("lora-mixed", learning_rate=1e-2, **settings))
    assert first is not None
    later = setting.job("lora-mixed-next", learning_rate=1e-12, **settings)
    # Cached scores far from those of the start: a change would be counted from them.
    second = train.run(replace(later, round=2, inputs=later.inputs | {"previous": first.object_id}))
    assert second is not None
    assert abs(first.metrics["real_logprob_change"]) > 0.5
    assert abs(second.metrics["real_logprob_change"]) < 1e-3


def test_selective_checkpointing_is_not_compiled(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps what a compiled layer writes over: the backward pass would fail."""
    seen: list[bool] = []
    load, alone = train.load_for, Ranks(torch.device("cpu"))
    monkeypatch.setattr(train, "load_for", lambda ranks, *rest: (seen.append(ranks.compile), load(alone, *rest))[1])
    for checkpointing in ("none", "full", "selective"):
        train.run(setting.job(f"compiled-{checkpointing}", resources={"compile": "on"}, epochs=1,
                              activation_checkpointing=checkpointing))  # fmt: skip
    assert seen == [True, True, False]


def test_infinite_weights_leave_the_last_finite_checkpoint(setting: Setting, whole: Manifest, capsys: Any) -> None:
    """Weights become infinite in step 6, with a finite loss; a checkpoint after every step, two are kept."""
    settings = {"checkpoint_every_steps": 1}

    class Spoilt(RoundTrainer):
        def step(self) -> Any:
            metrics = super().step()
            if self.state.done == 6:
                with torch.no_grad():
                    next(self.model.parameters())[:] = torch.inf
            return metrics

    with pytest.raises(BadInput, match="steps 7 to 9"):
        train.run(setting.job("spoilt", **settings), trainer=Spoilt, checkpointer=InTurn)
    output = capsys.readouterr().out
    assert "checkpoint step-000006 holds numbers that are not finite and is removed" in output
    job = setting.job("spoilt", writer="e0002-bb", **settings)
    assert list(objects.usable_parts(setting.store, job.object_id)) == ["step-000005"]
    assert sha_of_weights(train.run(job)) == sha_of_weights(whole)


def test_train_with_infinite_losses_publishes_nothing(setting: Setting) -> None:
    job = setting.job("diverged", learning_rate=1e30, max_grad_norm=None)
    with pytest.raises(
        BadInput, match=r"training, steps \d+ to \d+, pairs 1:.* finite numbers; use a learning rate below 1e\+30"
    ):
        train.run(job)
    assert objects.read_manifest(setting.store, job.object_id) is None
