"""The stage `train`: iterate n out of iterate n - 1 and the round's pairs.

Decides: when checkpoints are committed, where a killed round goes on, what is shown, what is published.
Leaves out: the loop (`training.py`), file formats (`checkpoints.py`).

A job's `inputs`: {"pairs", "previous" (holds policy/)}: object ids. Leaves `policy/` (an ordinary Hugging Face
folder), `metrics.jsonl` (one line per step, see `training.Round.step`) and `summary.json`. Parts `step-000050` are
checkpoints, in files `step-000050/...`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from spinreg_core.checkpoints import load_checkpoint, publish_policy, save_checkpoint
from spinreg_core.errors import Damaged
from spinreg_core.logprobs import load_policy
from spinreg_core.objects import commit_part, fetch_file, fetch_folder, fetch_part, list_parts, publish
from spinreg_core.progress import Progress
from spinreg_core.rounds import effective_alpha
from spinreg_core.scoring import resolve_device
from spinreg_core.stages.job import Job, Preempted, main
from spinreg_core.store import Store, open_store
from spinreg_core.training import Round, RoundState

# A stopped process has about 20 s left (tasks/process.py): a checkpoint that takes longer than this is not begun.
_QUICK_SECONDS = 5.0
_ASSUMED_BYTES_PER_SECOND = 300e6  # until a checkpoint of this run was timed
_DTYPES = {"master": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


def run(job: Job) -> dict[str, Any]:
    """Train what is left of the round and publish the policy. Returns the manifest.

    Its metrics are `summary.json` (see `training.Round.summary`). Raises BadInput, Damaged; Preempted passes through
    after a last checkpoint, if that is quick.
    """
    begin = time.monotonic()
    store, training, objective = open_store(job.store), job.config.training, job.config.objective
    pairs = pq.read_table(fetch_file(store, job.inputs["pairs"], "pairs.parquet")).to_pylist()
    previous = fetch_folder(store, job.inputs["previous"], "policy")
    model = load_policy(previous, training.precision, resolve_device(job.config.resources.device))
    if training.precision == "bf16":
        print("precision bf16: updates smaller than about 1/256 of a weight are rounded away; mixed keeps them")
    round_ = Round(
        model,
        pairs,
        objective=objective.model_copy(update={"alpha": effective_alpha(objective.alpha, job.round)}),
        training=training,
        seed=job.config.seed,
        round_number=job.round,
        tokens_per_pass=job.config.resources.tokens_per_pass,
    )
    resumed = _resume(store, job, round_)
    if resumed:
        print(f"going on from the checkpoint of step {round_.state.done} of {round_.steps}", flush=True)
    else:
        round_.watch_start()
    checkpoints = _Checkpoints(store, job, round_)
    _train(round_, checkpoints)
    summary = round_.summary()
    for text in summary["alarms"]:
        print(f"ALARM: {text}", flush=True)
    print(_described(summary), flush=True)
    folder = job.workdir / "out"
    publish_policy(model, previous, folder / "policy", _DTYPES[training.save_dtype])
    lines = (json.dumps(metrics) + "\n" for metrics in round_.state.metrics)
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True))
    return publish(store, job, folder, metrics=summary, seconds=time.monotonic() - begin)


def _train(round_: Round, checkpoints: _Checkpoints) -> None:
    progress = Progress("train", round_.steps, "steps", done=round_.state.done)
    every = round_.training.checkpoint_every_steps
    try:
        while round_.state.done < round_.steps:
            metrics = round_.step()
            progress.update()
            done = round_.state.done
            print(_step_line(metrics, round_.steps), flush=True)
            if every is not None and done % every == 0 and done < round_.steps:
                checkpoints.commit()
    except Preempted:
        # `consistent` says whether weights and optimiser are those of one finished step.
        if round_.consistent and checkpoints.worth_it():
            checkpoints.commit()
        raise


class _Checkpoints:
    """Commits the state of a round under the number of its last step."""

    def __init__(self, store: Store, job: Job, round_: Round) -> None:
        self.store, self.job, self.round = store, job, round_
        self.last_step = round_.state.done  # nothing to save before the first step from here
        self.last_seconds: float | None = None

    def commit(self) -> None:
        begin, state = time.monotonic(), self.round.state
        name = f"step-{state.done:06d}"
        folder = self.job.workdir / name
        save_checkpoint(folder / name, self.round.model, self.round.optimizer, asdict(state))
        commit_part(self.store, self.job, name, folder, {"step": state.done})
        for path in (folder / name).iterdir():
            path.unlink()
        self.last_step, self.last_seconds = state.done, time.monotonic() - begin
        print(f"checkpoint {name} committed after {self.last_seconds:.1f} s", flush=True)

    def worth_it(self) -> bool:
        """Whether there is something new to save and it will be saved within seconds."""
        if self.round.training.checkpoint_every_steps is None or self.round.state.done == self.last_step:
            return False
        tensors = list[torch.Tensor](self.round.model.parameters())
        tensors += [t for states in self.round.optimizer.state.values() for t in states.values()]
        estimate = sum(t.nbytes for t in tensors) / _ASSUMED_BYTES_PER_SECOND
        return (self.last_seconds if self.last_seconds is not None else estimate) <= _QUICK_SECONDS


def _resume(store: Store, job: Job, round_: Round) -> bool:
    """Put the newest readable checkpoint in place; False where there is none."""
    for name, part in reversed(list_parts(store, job.object_id).items()):
        try:
            files = {Path(file).name: path for file, path in fetch_part(store, part).items()}
        except Damaged as error:  # an older one, or the start, costs time but nothing else
            print(f"checkpoint {name} cannot be read and is passed over: {error}", flush=True)
            continue
        round_.state = RoundState(**load_checkpoint(files, round_.model, round_.optimizer))
        return True
    return False


def _step_line(m: dict[str, Any], steps: int) -> str:
    if "skipped" in m:
        return f"step {m['step']}/{steps} SKIPPED: {m['skipped']}, pairs {', '.join(m['skipped_pairs'][:8])}"
    ratios = "".join(
        f", {name} {m[key]:+.2f}"
        for name, key in (
            ("to previous", "log_ratio_previous_generated"),
            ("to base", "log_ratio_base_generated"),
        )
        if key in m
    )
    return (
        f"step {m['step']}/{steps}: loss {m['loss']:.4f}, margin {m['margin']:+.2f} nats, "
        f"accuracy {m['accuracy']:.2f}, "
        f"log p human {m['real_logp']:.1f} generated {m['generated_logp']:.1f} nats/answer"
        f"{ratios and ' (log-ratio of generated' + ratios + ')'}, "
        f"gradient norm {m['grad_norm']:.2f}, learning rate {m['learning_rate']:.2e}, "
        f"{m['tokens_per_second']:.0f} tokens/s"
    )


def _described(s: dict[str, Any]) -> str:
    return (
        f"{s['pairs']} pairs, {s['steps']} steps in {s['seconds']:.0f} s: loss {s['first_loss']:.4f} -> "
        f"{s['last_loss']:.4f}; log p of human answers {s['real_logprob_change']:+.2f} +- "
        f"{s['real_logprob_change_error']:.2f} nats/answer ({s['watched_pairs']} pairs, before and after the round)"
    )


if __name__ == "__main__":
    # A pair told apart with confidence has a gradient below 1e-38, and CPUs compute with such numbers a dozen times
    # slower (measured: 285 s for a step of 21 s). Here and not below: only threads started later keep to it.
    torch.set_flush_denormal(True)
    main(run)
