"""The stage `train`: iterate n out of iterate n - 1 and the round's pairs.

Decides: where a killed round goes on, what is shown, what is published.
Leaves out: the loop (`training/trainer.py`), step checkpoints (`training/step_checkpoints.py`), file formats
(`training/checkpoint_files.py`).

A job's `inputs`: {"pairs", "previous" (holds policy/), with LoRA also "base"}: object ids. Leaves `policy/` (an
ordinary Hugging Face folder), with LoRA `adapter/`, `metrics.jsonl` (one line per step, see `training.Round.step`)
and `summary.json`.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from spinreg_core.config import TrainingConfig, of_round
from spinreg_core.errors import BadInput
from spinreg_core.logprobs.policy import compiled, load_for
from spinreg_core.models.averaging import average_policy
from spinreg_core.models.fsdp import empty_policy, require_weights
from spinreg_core.models.loading import load_policy
from spinreg_core.models.lora import add_adapter, read_adapter, start_adapter, targets_of
from spinreg_core.models.quantization import load_quantized
from spinreg_core.runs.fetch import fetch_file, fetch_folder, folder_of
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import fingerprint, publish, read_manifest, upload
from spinreg_core.runs.plans import average_key
from spinreg_core.runtime.distributed import Ranks, init_ranks
from spinreg_core.runtime.main import main
from spinreg_core.runtime.progress import Progress
from spinreg_core.runtime.supervision import Preempted, finishing_steps
from spinreg_core.selfplay.opponent import effective_alpha
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from spinreg_core.training.checkpoint_files import publish_adapted, publish_policy
from spinreg_core.training.step_checkpoints import StepCheckpoints
from spinreg_core.training.trainer import RoundTrainer

_SMALL_LORA_RATE = 5e-5
_DTYPES = {"master": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


def run(job: Job) -> dict[str, Any]:
    """Train what is left of the round and publish the policy. Returns the manifest (empty on ranks but the first).

    Its metrics are `summary.json` (see `training.Round.summary`). Raises BadInput, Damaged; Preempted passes through
    after the step under way and a last checkpoint, if there is time for it.
    """
    begin = time.monotonic()
    store, training, objective = open_store(job.store), job.config.training, job.config.objective
    ranks = init_ranks(job.config.resources)
    file = ranks.local_main_first(lambda: fetch_file(store, job.inputs["pairs"], "pairs.parquet"))
    pairs = pq.read_table(file).to_pylist()
    if training.activation_checkpointing == "selective":
        # It keeps results of operators that a compiled layer writes over.
        ranks = replace(ranks, compile=False)
    model, source = _policy(store, job, ranks)
    if training.precision == "bf16" and training.lora_rank is None:
        print("precision bf16: updates smaller than about 1/256 of a weight are rounded away; mixed keeps them")
    if ranks.mesh is not None:
        print(f"{ranks.size} ranks, mesh {dict(zip(ranks.mesh.mesh_dim_names or (), ranks.mesh.shape, strict=True))}")
    round_ = RoundTrainer(
        model,
        pairs,
        objective=objective.model_copy(update={"alpha": effective_alpha(objective.alpha, job.round)}),
        training=training,
        seed=job.config.seed,
        round_number=job.round,
        tokens_per_pass=job.config.resources.tokens_per_pass,
        ranks=ranks,
        kl_from=("previous", "base") if _alike(training, "opponent", "reference") else ("base",),
        starts_at_previous=job.round == 1 or _alike(training, "start", "reference"),
    )
    checkpoints = StepCheckpoints(store, job, round_, ranks)
    if checkpoints.resume():
        print(f"going on from the checkpoint of step {round_.state.done} of {round_.steps}", flush=True)
    else:
        round_.watch_start()
    _train(round_, checkpoints)
    summary = round_.summary()
    for text in summary["alarms"]:
        print(f"ALARM: {text}", flush=True)
    print(_described(summary), flush=True)
    folder = job.workdir / f"out-{ranks.rank}"
    if training.lora_rank is None:
        publish_policy(model, source, folder / "policy", _DTYPES[training.save_dtype], ranks)
    else:
        publish_adapted(model, source, folder, training, job.config.model, ranks)
    if not ranks.first:
        ranks.gather(upload(store, job, folder))
        return {}
    lines = (json.dumps(metrics) + "\n" for metrics in round_.state.metrics)
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True))
    own: list[dict[str, Any]] = []
    files = upload(store, job, folder) + [entry for entries in ranks.gather(own) for entry in entries]
    if training.average is not None:  # before the manifest: whoever finds the policy finds its average
        _publish_average(store, job, files)
    nothing = job.workdir / "manifest-only"
    nothing.mkdir(exist_ok=True)
    manifest = publish(store, job, nothing, metrics=summary, uploaded=files, seconds=time.monotonic() - begin)
    checkpoints.discard()
    return manifest


def _alike(training: TrainingConfig, *roles: str) -> bool:
    """Whether the same policies play these roles: averages all of them, or none."""
    return training.average is None or len({role in training.average_as for role in roles}) == 1


def _publish_average(store: Store, job: Job, files: list[dict[str, Any]]) -> None:
    training, begin = job.config.training, time.monotonic()
    assert training.average is not None
    before, base = job.inputs["before"], job.inputs["base"]
    key = average_key(training, job.object_id, before, base)
    inputs = {"policy": job.object_id, "before": before, "base": base}
    average = replace(job, stage="average", key=key, object_id=fingerprint("average", key), inputs=inputs)
    if read_manifest(store, average.object_id) is not None:
        return
    folder = job.workdir / "average"
    policy = folder_of(store, job.object_id, files, "policy")
    origin, earlier = (fetch_folder(store, object_id, "policy") for object_id in (base, before))
    average_policy(training.average, training.average_weight, origin, earlier, policy, folder / "policy")
    publish(store, average, folder, metrics={}, seconds=time.monotonic() - begin)
    print(f"average ({training.average}, weight {training.average_weight:g}) of {job.object_id} and {before}: "
          f"{average.object_id}", flush=True)  # fmt: skip


def _policy(store: Store, job: Job, ranks: Ranks) -> tuple[PreTrainedModel, Path]:
    """π_t, ready to be trained, and the folder that the published one will be like."""

    def fetch(name: str, folder: str) -> Path:
        return ranks.local_main_first(lambda: fetch_folder(store, job.inputs[name], folder))

    training = job.config.training
    if training.lora_rank is None:
        previous = fetch("previous", "policy")
        return load_for(ranks, previous, training.precision), previous
    base = fetch("base", "policy")
    model = _with_adapter(ranks, base, training)
    if job.inputs["previous"] == job.inputs["base"]:
        start_adapter(model, job.config.seed)
    else:
        read_adapter(model, fetch("previous", "adapter"), alone=ranks.size == 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(
        f"LoRA of rank {training.lora_rank} on {', '.join(sorted(targets_of(model)))}: "
        f"{sum(p.numel() for p in parameters):,} of {sum(p.numel() for p in model.parameters()):,} numbers trained"
    )
    peak = of_round(training.learning_rate, job.round)
    if peak < _SMALL_LORA_RATE:
        print(f"learning rate {peak:g}: an adapter usually needs 1e-4 or more; what it adds to a weight is small, and "
              "bfloat16 does not see changes below about 1/256 of a weight")  # fmt: skip
    return compiled(model, ranks), base  # not before: it tries the model out, numbers and all


def _with_adapter(ranks: Ranks, base: Path, training: TrainingConfig) -> PreTrainedModel:
    """The base, frozen, and an adapter whose numbers are still to be set."""
    add, bits = partial(add_adapter, training=training), training.lora_quantize
    if ranks.mesh is not None:
        if bits is not None:
            raise BadInput("resources.processes", f"{ranks.size}, with training.lora_quantize {bits}", "1")
        return load_for(replace(ranks, compile=False), base, training.precision, add)
    require_weights(empty_policy(base, training.precision), base)  # what is published is made of the base's files
    model = (
        load_policy(base, training.precision, ranks.device)
        if bits is None
        else load_quantized(base, training.precision, ranks.device, bits)
    )
    add(model)
    return model


def _train(round_: RoundTrainer, checkpoints: StepCheckpoints) -> None:
    progress = Progress("train", round_.steps, "steps", done=round_.state.done)
    with finishing_steps() as stopped:
        while round_.state.done < round_.steps:
            try:
                metrics = round_.step()
            except BadInput:
                checkpoints.remove_unsound()
                raise
            progress.update()
            print(_step_line(metrics, round_.steps), flush=True)
            if checkpoints.after_step(stopped()):
                raise Preempted  # also where only another rank was told
        checkpoints.wait()


def _step_line(m: dict[str, Any], steps: int) -> str:
    if "skipped" in m:
        return f"step {m['step']}/{steps} SKIPPED: {m['skipped']}, pairs {', '.join(m['skipped_pairs'][:8])}"
    divergence = "".join(
        f", KL from {name} {m[key]:+.2f}" for name in ("previous", "base") if (key := f"kl_from_{name}") in m
    )
    return (
        f"step {m['step']}/{steps}: loss {m['loss']:.4f}, margin {m['margin']:+.2f} nats, "
        f"accuracy {m['accuracy']:.2f}, "
        f"log p human {m['real_logp']:.1f} generated {m['generated_logp']:.1f}{divergence} nats/answer, "
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
    warnings.filterwarnings("ignore", "The value of the smallest subnormal")  # numpy, of that
    main(run, ranked=True)
