"""The stage `train`: iterate n out of iterate n - 1 and the round's pairs.

Decides: where an interrupted round resumes, what is printed, what is published.
Leaves out: the loop, step checkpoints and file formats (`training`).

A job's `inputs`: {"pairs", "previous" (holds policy/), with LoRA also "base"}: object ids. Leaves `policy/` (an
ordinary Hugging Face folder), with LoRA `adapter/`, `metrics.jsonl` (one `records.StepMetrics` per line) and
`summary.json` (`records.RoundSummary`).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

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
from spinreg_core.runs.manifest import Manifest
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
from spinreg_core.training.records import RoundSummary, StepMetrics
from spinreg_core.training.step_checkpoints import StepCheckpoints
from spinreg_core.training.trainer import RoundTrainer

_SMALL_LORA_RATE = 5e-5
_DTYPES = {"master": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


def run(
    job: Job,
    *,
    trainer: Callable[..., RoundTrainer] = RoundTrainer,
    checkpointer: Callable[..., StepCheckpoints] = StepCheckpoints,
) -> Manifest | None:
    """Train the rest of the round and publish the policy. Returns the manifest, which is empty on ranks other than 0.

    Raises:
        BadInput: the pairs cannot be trained on, or training does not stay finite.
        Damaged: an input cannot be read.
        Preempted: SIGTERM arrived; the current step is finished, and a last checkpoint if there is time for it.
    """
    begin = time.monotonic()
    store, training, objective = open_store(job.store), job.config.training, job.config.objective
    ranks = init_ranks(job.config.resources)
    file = ranks.local_main_first(lambda: fetch_file(store, job.inputs["pairs"], "pairs.parquet"))
    pairs = pq.read_table(file).to_pylist()
    if training.activation_checkpointing == "selective":
        # Selective checkpointing keeps results that a compiled layer overwrites, and its backward pass would fail.
        ranks = replace(ranks, compile=False)
    model, source = _policy(store, job, ranks)
    if training.precision == "bf16" and training.lora_rank is None:
        print("precision bf16 rounds away updates smaller than about 1/256 of a weight; mixed keeps them")
    if ranks.mesh is not None:
        print(f"{ranks.size} ranks, mesh {dict(zip(ranks.mesh.mesh_dim_names or (), ranks.mesh.shape, strict=True))}")
    round_ = trainer(
        model,
        pairs,
        objective=objective.model_copy(update={"alpha": effective_alpha(objective.alpha, job.round)}),
        training=training,
        seed=job.config.seed,
        round_number=job.round,
        tokens_per_pass=job.config.resources.tokens_per_pass,
        ranks=ranks,
        kl_from=("previous", "base") if _alike(training, "opponent", "reference") else ("base",),
        starts_at_previous=job.round == 1
        or (
            _alike(training, "start", "reference")
            and not training.rounds_adapter
            and objective.reference == "previous"  # replayed pairs keep the scores of their iterate
        ),
    )
    checkpoints = checkpointer(store, job, round_, ranks)
    if checkpoints.resume():
        print(f"resuming from the checkpoint of step {round_.state.done} of {round_.steps}", flush=True)
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
        return None
    lines = (json.dumps(metrics) + "\n" for metrics in round_.state.metrics)
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True))
    files = upload(store, job, folder)
    # Rank 0 has uploaded its files already, and adds nothing to those of the others.
    files += [entry for entries in ranks.gather(files[:0]) for entry in entries]
    if training.average is not None:
        # Before the manifest, so that the average exists wherever the policy does.
        _publish_average(store, job, folder_of(store, job.object_id, files, "policy"))
    manifest = publish(store, job, None, metrics=dict(summary), uploaded=files, seconds=time.monotonic() - begin)
    checkpoints.discard()
    return manifest


def _alike(training: TrainingConfig, *roles: str) -> bool:
    """Return True where the same policies play these roles: all of them averages, or none."""
    return training.average is None or len({role in training.average_as for role in roles}) == 1


def _publish_average(store: Store, job: Job, policy: Path) -> None:
    """Publish the average that ends with `policy`, the local copy of the policy that this job trained."""
    training, begin = job.config.training, time.monotonic()
    assert training.average is not None
    before, base = job.inputs["before"], job.inputs["base"]
    key = average_key(training, job.object_id, before, base)
    inputs = {"policy": job.object_id, "before": before, "base": base}
    average = replace(job, stage="average", key=key, object_id=fingerprint("average", key), inputs=inputs)
    if read_manifest(store, average.object_id) is not None:
        return
    folder = job.workdir / "average"
    origin, earlier = (fetch_folder(store, object_id, "policy") for object_id in (base, before))
    average_policy(training.average, training.average_weight, origin, earlier, policy, folder / "policy")
    publish(store, average, folder, metrics={}, seconds=time.monotonic() - begin)
    print(f"average ({training.average}, weight {training.average_weight:g}) of {job.object_id} and {before}: "
          f"{average.object_id}", flush=True)  # fmt: skip


def _policy(store: Store, job: Job, ranks: Ranks) -> tuple[PreTrainedModel, Path]:
    """Return π_t, ready to be trained, and the folder that the published policy is modelled on."""

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
        print(f"learning rate {peak:g} is low for an adapter, which usually needs 1e-4 or more: its updates are small, "
              "and bfloat16 rounds away changes below about 1/256 of a weight")  # fmt: skip
    # Compiling probes the model with its numbers, so the adapter must have them.
    return compiled(model, ranks), base


def _with_adapter(ranks: Ranks, base: Path, training: TrainingConfig) -> PreTrainedModel:
    """Return the frozen base with an adapter, which the caller fills with numbers."""
    add, bits = partial(add_adapter, training=training), training.lora_quantize
    if ranks.mesh is not None:
        if bits is not None:
            raise BadInput("resources.processes", f"is {ranks.size} with training.lora_quantize {bits}", "set it to 1")
        return load_for(replace(ranks, compile=False), base, training.precision, add)
    # The published policy is made from the base's files, so they must hold all weights.
    require_weights(empty_policy(base, training.precision), base)
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
                raise Preempted
        checkpoints.wait()


def _step_line(m: StepMetrics, steps: int) -> str:
    if "skipped" in m:
        return f"step {m['step']}/{steps} SKIPPED: {m['skipped']}, pairs {', '.join(m['skipped_pairs'][:8])}"
    guarded = f"guarded {m['guarded']:.2f}, " if "guarded" in m else ""
    divergence = f", KL from previous {m['kl_from_previous']:+.2f}" if "kl_from_previous" in m else ""
    divergence += f", KL from base {m['kl_from_base']:+.2f}" if "kl_from_base" in m else ""
    return (
        f"step {m['step']}/{steps}: loss {m['loss']:.4f}, margin {m['margin']:+.2f} nats, "
        f"accuracy {m['accuracy']:.2f}, {guarded}"
        f"log p human {m['real_logp']:.1f} generated {m['generated_logp']:.1f}{divergence} nats/answer, "
        f"gradient norm {m['grad_norm']:.2f}, learning rate {m['learning_rate']:.2e}, "
        f"{m['tokens_per_second']:.0f} tokens/s"
    )


def _described(s: RoundSummary) -> str:
    return (
        f"{s['pairs']} pairs, {s['steps']} steps in {s['seconds']:.0f} s: loss {s['first_loss']:.4f} -> "
        f"{s['last_loss']:.4f}; log p of human answers {s['real_logprob_change']:+.2f} +- "
        f"{s['real_logprob_change_error']:.2f} nats/answer ({s['watched_pairs']} pairs, before and after the round)"
    )


if __name__ == "__main__":
    # Pairs that the policy tells apart with confidence have gradients below 1e-38. CPUs compute with such denormal
    # numbers about twelve times slower (measured: 285 s for a step of 21 s). The setting reaches only threads that
    # start later, so it is made before everything else.
    torch.set_flush_denormal(True)
    # numpy warns about the setting.
    warnings.filterwarnings("ignore", "The value of the smallest subnormal")
    main(run, ranked=True)
