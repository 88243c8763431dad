"""The stage `generate`: iterates answer prompts shard by shard, and every finished shard is committed.

Decides: the number of engines, the missing shards, and the metrics of the whole. Leaves out: engines, their pool, and
the iterate of each prompt (`spinreg_core.generation`); pairing with human answers (the stage `mix-opponent`).

A job's `inputs`: {"data": object id, "policies": {"<iterate n>": object id with `policy/`}}. Its `extra`:

    rows       "train": the prompts of the job's round. "heldout": every held-out prompt.
    weights    of the iterates round-1, round-2, ... (rows train only); the iterate of each answer is drawn with them.
    geometric  optional: {"share", "alpha"} of answers sampled from the mixture of their iterate with iterate 0.
    replay_share  optional: the share of the answers of earlier iterates that are left out (`opponent.replay_share`).

`key["sampler"]["engine"]` names the engine, so that the engine that runs is the one in the fingerprint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

from spinreg_core.errors import BadInput
from spinreg_core.generation.engine import Sampling
from spinreg_core.generation.pool import Pool, devices_of, next_wave
from spinreg_core.generation.remote_workers import offer_workers
from spinreg_core.generation.shards import Rows, Shard, ShardMeta, Source
from spinreg_core.generation.worker import answer_shards, engine_of, planned
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import publish, usable_parts
from spinreg_core.runtime.main import main
from spinreg_core.runtime.nodes import ATTEMPT_VARIABLE
from spinreg_core.runtime.progress import Progress
from spinreg_core.store.open import open_store


def run(job: Job) -> Manifest:
    """Answer the prompts of missing shards, then publish. Returns the manifest.

    Its metrics: `prompts` (answers), `tokens` (sampled), `mean_length` (tokens), `truncated` (share cut off by
    max_new_tokens), `empty` (answers of blanks alone), `invalid_text` (answers that are not valid UTF-8: their tokens
    are kept, their text shows U+FFFD), `geometric` (share sampled from the mixture), `tokens_per_second` (of one engine
    while it answers), `startup_seconds` (of loading engines in all attempts), `replayed` (answers left out, by iterate:
    pairs of earlier rounds replace them). Raises BadInput, Damaged.
    """
    start = time.monotonic()
    store = open_store(job.store)
    kind = job.extra["rows"]
    rows = Rows(fetch_file(store, job.inputs["data"], f"{kind}.parquet"))
    shards, not_given = planned(job, rows)
    unknown = {s.source.iterate for s in shards} - {int(n) for n in job.inputs["policies"]}
    if unknown or not (shards or not_given):
        raise BadInput(f"generate job of round {job.round}", f"no policy for iterates {sorted(unknown)}" if unknown
                       else f"no rows in {kind}.parquet", "a policy for every iterate, and rows")  # fmt: skip
    metas: dict[str, Any] = {name: part.meta for name, part in usable_parts(store, job.object_id).items()}
    missing = [s for s in shards if s.name not in metas]
    progress = Progress("generate", sum(len(s.rows) for s in shards), "answers",
                        done=sum(len(s.rows) for s in shards if s.name in metas))  # fmt: skip
    progress.note = f"shards: {len(metas)} of {len(shards)} committed"
    if metas:
        print(f"{len(metas)} of {len(shards)} shards were committed before", flush=True)
    sampling = Sampling.of(job.config.generation, ())
    if not sampling.is_the_policy:
        print(
            f"The sampler is not the policy's own (temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, "
            f"top_k {sampling.top_k}; neutral is 1, 1, 0): the opponent q_t is not the iterate, but a modified one.",
            flush=True,
        )

    def on_commit(number: int, meta: ShardMeta) -> None:
        metas[shards[number].name] = meta
        print(f"shard {len(metas)} of {len(shards)}: {meta['prompts']} answers, {meta['tokens']} tokens in "
              f"{meta['seconds']:.1f} s", flush=True)  # fmt: skip
        progress.tell(f"shards: {len(metas)} of {len(shards)} committed")

    lists = _lists(job, missing)
    for own in lists:
        sources = sorted({shard.source for shard in own})
        engine = engine_of(job, sources[0])[0]
        devices = _devices(job, engine)
        alone = len(devices) == 1 and (engine == "hf" or len(lists) == 1)
        if alone and job.config.resources.nodes == 1:
            answer_shards(job, store, rows, sources, _waves(own), on_answer=progress.update, on_commit=on_commit)
        else:
            Pool(job, store, own, devices, progress.update, on_commit).run()
    metrics = _metrics(list(metas.values())) | {"replayed": not_given}
    manifest = publish(store, job, None, metrics=metrics, parts=[s.name for s in shards],
                       seconds=time.monotonic() - start)  # fmt: skip
    print(f"{metrics['prompts']} answers, {metrics['mean_length']:.1f} tokens each, {100 * metrics['truncated']:.1f} % "
          f"cut off, {metrics['empty']} empty, {metrics['tokens_per_second']:.0f} tokens/s", flush=True)  # fmt: skip
    return manifest


def _lists(job: Job, shards: list[Shard]) -> list[list[Shard]]:
    """Shards that the same engines answer: all of hf's, which come last, and those of each source of vllm, because one
    vLLM after another in one process is not sure to find the GPU's memory free."""
    lists: dict[Source | None, list[Shard]] = {}
    for shard in shards:
        hf = engine_of(job, shard.source)[0] == "hf"
        lists.setdefault(None if hf else shard.source, []).append(shard)
    return [lists[source] for source in sorted(lists, key=lambda source: source is None)]


def _waves(shards: list[Shard]) -> Iterable[list[Shard]]:
    left = list(shards)
    while left:
        wave = next_wave(left, 1, 0)
        del left[: len(wave)]
        yield wave


def lend(job: Job) -> None:
    """Lend the engines of this machine to a run of another machine, which sends them shards to answer.

    The `extra` of the job also has the sources, as the job of a worker has.
    """
    engine = engine_of(job, Source(*job.extra["sources"][0]))[0]
    offer_workers(job, os.environ[ATTEMPT_VARIABLE], _devices(job, engine))


def _devices(job: Job, engine: str) -> list[dict[str, str]]:
    """Return the environment of each engine of this machine: one per GPU, or per `tensor_parallel` GPUs.

    Raises BadInput if `tensor_parallel` does not divide the number of GPUs.
    """
    resources = job.config.resources
    tensor_parallel = job.config.generation.tensor_parallel if engine == "vllm" else 1
    if resources.processes in ("auto", 1) and resources.device == "cpu":
        return [{}]
    import torch

    from spinreg_core.runtime.distributed import processes_here, resolve_device

    processes = processes_here(resources)
    if resolve_device(resources.device) == "cpu":
        return devices_of(processes, 1, [], len(os.sched_getaffinity(0))) if processes > 1 else [{}]
    if processes % tensor_parallel:
        raise BadInput("generation.tensor_parallel", f"{tensor_parallel} with {processes} GPUs", "a divisor of them")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    if processes == tensor_parallel:
        return [{}]
    return devices_of(processes // tensor_parallel, tensor_parallel, gpus, 1)


def _metrics(metas: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("prompts", "tokens", "truncated", "empty", "invalid_text")
    prompts, tokens, truncated, empty, invalid = (sum(m[k] for m in metas) for k in names)
    return {
        "prompts": prompts,
        "tokens": tokens,
        "mean_length": tokens / max(prompts, 1),
        "truncated": truncated / max(prompts, 1),
        "empty": empty,
        "invalid_text": invalid,
        "geometric": sum(m["prompts"] for m in metas if m["geometric"]) / max(prompts, 1),
        "tokens_per_second": tokens / max(sum(m["seconds"] for m in metas), 1e-3),
        "startup_seconds": round(sum(m["startup_seconds"] for m in metas), 3),
    }


if __name__ == "__main__":
    main(lend if ATTEMPT_VARIABLE in os.environ else run)
