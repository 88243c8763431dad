"""The stage `generate`: iterates answer prompts, shard by shard, each shard committed when it is finished.

Decides: which iterate answers which row, how rows form shards, each shard's seed, what is kept of an answer.
Leaves out: rendering (`render.py`), decoding (`engines/`), pairing answers with human ones (`mix_opponent.py`).

A job's `inputs`: {"data": object id, "policies": {"<iterate n>": object id with `policy/`}}. Its `extra`:

    rows       "train": the prompts of the job's round. "heldout": every held-out prompt.
    weights    of the iterates round-1, round-2, ... (rows train only); each row's is drawn with them.
    iterate    optional: answer this iterate's shards and publish nothing (see `_in_process`).

`key["sampler"]["engine"]` names the engine, so that what is run is what was fingerprinted. Importing this file
loads nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinreg_core.config import sampling_dtype
from spinreg_core.engines import Answer, Sampling, check_prompts, open_engine
from spinreg_core.errors import (
    EXIT_BAD_INPUT,
    EXIT_DAMAGED,
    EXIT_PREEMPTED,
    BadInput,
    Damaged,
    StageFailed,
    StagePreempted,
)
from spinreg_core.objects import commit_part, fetch_file, fetch_folder, list_parts, publish, read_manifest, upload
from spinreg_core.opponent import draw_iterate
from spinreg_core.progress import Progress
from spinreg_core.stages.job import Job, main
from spinreg_core.store import Store, open_store

if TYPE_CHECKING:
    import pyarrow as pa

    from spinreg_core.render import Renderer


@dataclass(frozen=True)
class Shard:
    """Rows (indices into the job's rows file) that one iterate answers under one seed."""

    number: int
    iterate: int
    rows: list[int]
    seed: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"


def drawn_iterates(prompt_ids: Sequence[str], weights: Sequence[float], *, round_number: int, seed: int) -> list[int]:
    """The iterate that answers each prompt of a round (counted from 1): round - 1 - k with probability weights[k]."""
    t = round_number - 1
    return [t - draw_iterate(weights, seed=seed, round_index=t, prompt_id=p) for p in prompt_ids]


def make_shards(
    rows: Sequence[int], iterates: Sequence[int], size: int, *, seed: int, round_number: int, kind: str
) -> list[Shard]:
    """Cut rows into shards of at most `size`, each of one iterate: iterates ascending, rows in their order.

    A shard's seed is a function of run seed, round, kind of rows and shard number alone.
    """
    shards: list[Shard] = []
    for iterate in sorted(set(iterates)):
        own = [row for row, by in zip(rows, iterates, strict=True) if by == iterate]
        for start in range(0, len(own), size):
            number = len(shards)
            text = json.dumps(["spinreg generate", seed, round_number, kind, number])
            shard_seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
            shards.append(Shard(number, iterate, own[start : start + size], shard_seed))
    return shards


def ensure_generations(job: Job) -> dict[str, Any]:
    """The manifest of a generate job, made now if it is not there. For stages that need samples (evaluate).

    With engine hf this process answers and frees the model again. With engine vllm a child process answers,
    because only its end surely gives the GPU's memory back. Raises as `run`; StageFailed, StagePreempted for the
    child.
    """
    store = open_store(job.store)
    found = read_manifest(store, job.object_id)
    if found is not None:
        return found
    job.workdir.mkdir(parents=True, exist_ok=True)
    if _engine(job) == "hf":
        return run(job)
    _in_process(job)
    found = read_manifest(store, job.object_id)
    if found is None:
        raise StageFailed(f"the generate process ended well but left no {job.object_id}")
    return found


def run(job: Job) -> dict[str, Any]:
    """Answer what is not committed yet, then publish. Returns the manifest.

    Its metrics: `prompts`, `tokens` (sampled), `mean_length` (tokens), `truncated` (share cut off by
    max_new_tokens), `empty` (answers that are an end-of-turn only), `tokens_per_second` (while answering),
    `startup_seconds` (loading engines, all attempts together). Raises BadInput, Damaged.
    """
    start = time.monotonic()
    store = open_store(job.store)
    kind, generation = job.extra["rows"], job.config.generation
    table = _read_rows(fetch_file(store, job.inputs["data"], f"{kind}.parquet"))
    shards = _shards(job, table)
    unknown = {s.iterate for s in shards} - {int(n) for n in job.inputs["policies"]}
    if unknown or not shards:
        raise BadInput(f"generate job of round {job.round}", f"no policy for iterates {sorted(unknown)}" if unknown
                       else f"no rows in {kind}.parquet", "a policy for every iterate, and rows")  # fmt: skip
    done = list_parts(store, job.object_id)
    missing = [s for s in shards if s.name not in done]
    only = job.extra.get("iterate")
    progress = Progress("generate", sum(len(s.rows) for s in shards), "prompts",
                        done=sum(len(s.rows) for s in shards if s.name in done))  # fmt: skip
    if done and only is None:
        print(f"{len(shards) - len(missing)} of {len(shards)} shards were committed before", flush=True)
    sampling = Sampling.of(generation, ())
    if not sampling.is_the_policy and only is None:
        print(
            f"The sampler is not the policy's own (temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, "
            f"top_k {sampling.top_k}; neutral is 1, 1, 0): the opponent q_t is not the iterate, but a modified one.",
            flush=True,
        )
    iterates = sorted({s.iterate for s in missing} if only is None else {only})
    for n in iterates:
        if _engine(job) == "vllm" and len(iterates) > 1:
            # One vLLM after another in one process is not sure to find the GPU's memory free.
            _in_process(replace(job, extra=job.extra | {"iterate": n}))
        else:
            _answer(job, store, [s for s in missing if s.iterate == n], table, progress)
    if only is not None:
        return {"object_id": f"the shards of iterate {only}"}
    metrics = _metrics([part["meta"] for part in list_parts(store, job.object_id).values()])
    nothing = job.workdir / "manifest-only"
    nothing.mkdir(exist_ok=True)
    manifest = publish(store, job, nothing, metrics=metrics, parts=[s.name for s in shards],
                       seconds=time.monotonic() - start)  # fmt: skip
    print(f"{metrics['prompts']} answers, {metrics['mean_length']:.1f} tokens each, {100 * metrics['truncated']:.1f} % "
          f"cut off, {metrics['empty']} empty, {metrics['tokens_per_second']:.0f} tokens/s", flush=True)  # fmt: skip
    return manifest


def _engine(job: Job) -> Any:
    return job.key["sampler"]["engine"]


def _read_rows(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["prompt_id", "prompt_ids"])


def _shards(job: Job, table: pa.Table) -> list[Shard]:
    from spinreg_core.data.split import round_prompts

    config, kind = job.config, job.extra["rows"]
    if kind == "train":
        data = config.data
        rows = round_prompts(len(table), data.prompts_per_round, job.round, data.round_prompts, config.seed)
        names = table["prompt_id"].take(rows).to_pylist()
        iterates = drawn_iterates(names, job.extra["weights"], round_number=job.round, seed=config.seed)
    else:
        (only,) = job.inputs["policies"]
        rows, iterates = list(range(len(table))), [int(only)] * len(table)
    # Held-out sampling has one seed for all iterates, so that equal policies give equal answers.
    number = job.round if kind == "train" else 0
    return make_shards(rows, iterates, config.generation.shard_size, seed=config.seed, round_number=number, kind=kind)


def _answer(job: Job, store: Store, shards: list[Shard], table: pa.Table, progress: Progress) -> None:
    """Answer and commit the shards of one iterate."""
    from transformers import AutoConfig

    from spinreg_core.render import Renderer

    start = time.monotonic()
    iterate = shards[0].iterate
    generation, engine_name = job.config.generation, _engine(job)
    generation = generation.model_copy(update={"dtype": sampling_dtype(job.config)})
    policy = fetch_folder(store, job.inputs["policies"][str(iterate)], "policy")
    renderer = Renderer.from_folder(policy)
    sampling = Sampling.of(generation, renderer.stop_ids)
    mine = table.take([row for s in shards for row in s.rows])
    prompts, names = mine["prompt_ids"].to_pylist(), mine["prompt_id"].to_pylist()
    check_prompts(prompts, sampling, AutoConfig.from_pretrained(policy, local_files_only=True), names)
    print(f"engine {engine_name} ({generation.dtype}) for iterate {iterate}: {len(prompts)} prompts", flush=True)
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    engine = open_engine(engine_name, policy, generation, job.config.resources, pad_id=renderer.pad_id,
                         longest=longest)  # fmt: skip
    startup = time.monotonic() - start
    try:
        for shard in shards:
            begin = time.monotonic()
            rows = table.take(shard.rows)
            answers = engine.generate(rows["prompt_ids"].to_pylist(), sampling, shard.seed, progress.update)
            meta = _meta(answers) | {
                "iterate": iterate,
                "seed": shard.seed,
                "seconds": round(time.monotonic() - begin, 3),
                "startup_seconds": round(startup, 3),
            }
            startup = 0.0  # counted once, with the first shard of an engine's life
            folder = job.workdir / shard.name
            _write(folder / "shards" / f"{shard.number:05d}.parquet", shard, rows, answers, renderer)
            commit_part(store, job, shard.name, upload(store, job, folder), meta)
    finally:
        engine.close()


def _write(path: Path, shard: Shard, rows: pa.Table, answers: list[Answer], renderer: Renderer) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    ids = pa.list_(pa.int32())
    table = pa.table(
        {
            "prompt_id": rows["prompt_id"],
            "iterate": pa.array([shard.iterate] * len(answers), pa.int32()),
            "prompt_ids": rows["prompt_ids"].cast(ids),
            "answer_ids": pa.array([a.token_ids for a in answers], ids),
            "text": pa.array([renderer.decode(a.token_ids) for a in answers], pa.string()),
            "finish": pa.array([a.finish for a in answers], pa.string()),
            "seed": pa.array([shard.seed] * len(answers), pa.int64()),
        }
    )
    pq.write_table(table, path)


def _meta(answers: list[Answer]) -> dict[str, Any]:
    return {
        "prompts": len(answers),
        "tokens": sum(len(a.token_ids) for a in answers),
        "truncated": sum(a.finish == "length" for a in answers),
        "empty": sum(a.finish == "stop" and len(a.token_ids) == 1 for a in answers),
    }


def _metrics(metas: list[dict[str, Any]]) -> dict[str, Any]:
    prompts, tokens, truncated, empty = (sum(m[k] for m in metas) for k in ("prompts", "tokens", "truncated", "empty"))
    return {
        "prompts": prompts,
        "tokens": tokens,
        "mean_length": tokens / prompts,
        "truncated": truncated / prompts,
        "empty": empty,
        "tokens_per_second": tokens / max(sum(m["seconds"] for m in metas), 1e-3),
        "startup_seconds": round(sum(m["startup_seconds"] for m in metas), 3),
    }


def _in_process(job: Job) -> None:
    """Run a generate job in a child process that shows its output here. Raises as its exit status says."""
    folder = job.workdir / f"generate-{job.extra.get('iterate', 'all')}"
    folder.mkdir(parents=True, exist_ok=True)
    replace(job, workdir=folder).save(folder / "job.json")
    command = [sys.executable, "-m", "spinreg_core.stages.generate", str(folder / "job.json")]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        except BaseException:  # SIGTERM: what the child has committed stays
            child.kill()
            raise
    if child.returncode == EXIT_BAD_INPUT:
        raise BadInput.from_message(last.removeprefix("bad input: "))
    if child.returncode == EXIT_DAMAGED:
        raise Damaged(last.removeprefix("damaged: "))
    if child.returncode in (EXIT_PREEMPTED, -15):
        raise StagePreempted("the generate process was stopped from outside")
    if child.returncode:
        raise StageFailed(f"the generate process ended with status {child.returncode}: {last}")


if __name__ == "__main__":
    main(run)
