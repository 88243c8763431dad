"""One engine that answers and commits shards; run as a process, the engine of one GPU (or group of GPUs).

Decides: the shards of a job, which models stay loaded from one source to the next, and that a shard is committed as
soon as its last answer ends, while the engine answers the next one.
Leaves out: which engine gets which shards (`generation.pool`), decoding (`generation.engine`).

    python -m spinreg_core.generation.worker JOB.json

The job is a generate job with "sources": [[iterate, geometric], ...] in its `extra`, ascending: those of all shards
that may come. The worker reads waves from its input, one JSON list of shard numbers (all of one source) per line, to
the end of the input. It writes these lines:

    answered N;               N more answers
    committed NUMBER {...};   a shard, and its meta
    idle;                     the wave is done

They go to the file descriptor in SPINREG_SAY, because libraries print to the output, or to the output without it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from spinreg_core.config import sampling_dtype
from spinreg_core.generation.engine import Answer, Engine, Sampling, check_prompts
from spinreg_core.generation.open import open_engine
from spinreg_core.generation.shards import (
    Rows,
    Shard,
    ShardMeta,
    Source,
    answer_seed,
    drawn_sources,
    make_shards,
    round_prompts,
    shard_meta,
    write_shard,
)
from spinreg_core.runs.fetch import fetch_file, fetch_folder
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import commit_part, upload
from spinreg_core.runtime.main import main
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

if TYPE_CHECKING:
    from spinreg_core.models.chat_template import Renderer


# Shards that may wait for their upload before the engine waits for them.
_COMMITS_BEHIND = 8


@dataclass
class _ShardInProgress:
    """A shard with some of its answers."""

    shard: Shard
    rows: pa.Table
    seeds: list[int]
    answers: dict[int, Answer]


@dataclass
class _LoadedSource:
    """An engine loaded with the policies of one source."""

    source: Source
    policy: str
    # The sampler and the mixture, as a shard's file has them.
    settings: dict[str, Any]
    engine: Engine
    renderer: Renderer
    sampling: Sampling
    config: Any
    # Seconds of loading, which count for the first shard of the source only.
    loading: float = 0.0


def answer_shards(
    job: Job,
    store: Store,
    rows: Rows,
    sources: Sequence[Source],
    waves: Iterable[list[Shard]],
    *,
    on_answer: Callable[[int], None],
    on_commit: Callable[[int, ShardMeta], None],
) -> None:
    """Answer waves of shards, each wave of one of `sources`. `on_answer(n)` reports n more answers.

    Within a wave no answer waits for the end of a shard. Shards end one after the other, because answers begin in their
    order. With ascending sources, engine hf loads each policy once and holds at most one iterate and the base.

    Raises:
        BadInput: a policy or prompt cannot be used.
        Damaged: a stored file does not match its manifest.
    """
    # Local folders of the policies in use by object id, and their models by folder.
    folders: dict[str, Path] = {}
    loaded: dict[Path, Any] = {}
    turn: _LoadedSource | None = None

    def commit(turn: _LoadedSource, done: _ShardInProgress, seconds: float) -> None:
        answers = [done.answers[i] for i in range(len(done.answers))]
        texts = [turn.renderer.decode(a.token_ids) for a in answers]
        meta = shard_meta(turn.source, answers, texts, seconds=seconds, startup_seconds=turn.loading)
        turn.loading = 0.0
        folder = job.workdir / done.shard.name
        write_shard(folder / "shards" / f"{done.shard.number:05d}.parquet", done.shard, done.rows, answers, texts,
                    done.seeds, policy=turn.policy, settings=turn.settings)  # fmt: skip
        part = commit_part(store, job, done.shard.name, upload(store, job, folder), dict(meta))
        shutil.rmtree(folder)
        # The meta of the part: another worker may have committed the shard first.
        on_commit(done.shard.number, cast(ShardMeta, part.meta))

    try:
        # One thread uploads, so that shards are committed in their order and the engine does not wait for the store.
        with ThreadPoolExecutor(1) as pool:
            for wave in waves:
                (source,) = {shard.source for shard in wave}
                if turn is None or turn.source != source:
                    begin = time.monotonic()
                    for policy in folders.keys() - _needed(job, source, sources):
                        loaded.pop(folders.pop(policy), None)
                    if turn is not None:
                        # Before the next models are loaded, because memory may not hold both.
                        turn.engine.close()
                    turn = _turn(job, store, source, folders, loaded)
                    turn.loading = time.monotonic() - begin
                _answer_wave(turn, [_opened(job, rows, shard, turn.sampling, turn.config) for shard in wave], on_answer,
                             lambda *done: pool.submit(commit, *done))  # fmt: skip
    finally:
        # `close` can free only what nothing else holds.
        loaded.clear()
        if turn is not None:
            turn.engine.close()


def _needed(job: Job, source: Source, sources: Sequence[Source]) -> set[str]:
    """Return the policies of a source, and the base where a later source mixes with it."""
    bases = (base for later in sources if later > source for base in engine_of(job, later)[1][1:])
    return {*engine_of(job, source)[1], *bases}


def _turn(job: Job, store: Store, source: Source, folders: dict[str, Path], loaded: dict[Path, Any]) -> _LoadedSource:
    from transformers import AutoConfig

    from spinreg_core.models.chat_template import Renderer

    name, policies, weights = engine_of(job, source)
    generation = job.config.generation.model_copy(update={"dtype": sampling_dtype(job.config)})
    for policy in policies:
        if policy not in folders:
            folders[policy] = fetch_folder(store, policy, "policy")
    own = folders[policies[0]]
    renderer = Renderer.from_folder(own, job.config.data.template_arguments)
    sampling = Sampling.of(generation, renderer.stop_ids)
    mixture = {"policies": policies, "weights": weights} if source.geometric else None
    print(f"engine {name} ({generation.dtype}) for iterate {source.iterate}"
          + (f", mixed with the base {weights[0]:g} : {weights[1]:g}" if mixture else ""), flush=True)  # fmt: skip
    engine = open_engine(
        name, [folders[policy] for policy in policies], generation, job.config.resources, pad_id=renderer.pad_id,
        weights=weights, longest=job.config.data.max_prompt_tokens + sampling.max_new_tokens, loaded=loaded,
    )  # fmt: skip
    settings = {"sampling": vars(sampling), "mixture": mixture}
    config = AutoConfig.from_pretrained(own, trust_remote_code=False, local_files_only=True)
    return _LoadedSource(source, policies[0], settings, engine, renderer, sampling, config)


def _opened(job: Job, rows: Rows, shard: Shard, sampling: Sampling, config: Any) -> _ShardInProgress:
    table, kind = rows.take(shard.rows), job.extra["rows"]
    names = table["prompt_id"].to_pylist()
    # Engines check the prompts as well, but cannot name them.
    check_prompts(table["prompt_ids"].to_pylist(), sampling, config, names)
    # Held-out sampling uses the same seeds for all iterates, so that equal policies give equal answers.
    number = job.round if kind == "train" else 0
    seeds = [
        answer_seed(seed=job.config.seed, round_number=number, kind=kind, prompt_id=name, answer=int(which))
        for name, which in zip(names, shard.answers, strict=True)
    ]
    return _ShardInProgress(shard, table, seeds, {})


def _answer_wave(
    turn: _LoadedSource,
    wave: list[_ShardInProgress],
    on_answer: Callable[[int], None],
    commit: Callable[[_LoadedSource, _ShardInProgress, float], Future[None]],
) -> None:
    prompts: list[list[int]] = []
    owners: list[tuple[_ShardInProgress, int]] = []
    for part in wave:
        ids = part.rows["prompt_ids"].to_pylist()
        # Longest first, so that prompts of similar length are read together.
        for i in sorted(range(len(ids)), key=lambda i, ids=ids: (-len(ids[i]), i)):  # type: ignore[misc]
            prompts.append(ids[i])
            owners.append((part, i))
    commits: deque[Future[None]] = deque()
    last = time.monotonic()

    def note(index: int, answer: Answer) -> None:
        nonlocal last
        part, i = owners[index]
        part.answers[i] = answer
        on_answer(1)
        if len(part.answers) == len(part.seeds):
            now = time.monotonic()
            commits.append(commit(turn, part, now - last))
            last = now
            while commits and (len(commits) > _COMMITS_BEHIND or commits[0].done()):
                commits.popleft().result()

    turn.engine.generate(prompts, turn.sampling, [part.seeds[i] for part, i in owners], note)
    while commits:
        commits.popleft().result()


def engine_of(job: Job, source: Source) -> tuple[Any, list[str], list[float]]:
    """Return (engine, policy objects, weights of their mixture) of a source. Only engine hf samples mixtures."""
    own = job.inputs["policies"][str(source.iterate)]
    if not source.geometric:
        return job.key["sampler"]["engine"], [own], [1.0]
    alpha = job.extra["geometric"]["alpha"]
    return "hf", [own, job.inputs["policies"]["0"]], [alpha, 1 - alpha]


def planned(job: Job, rows: Rows) -> tuple[list[Shard], dict[str, int]]:
    """Return all shards of a job, committed or not, and the number of replayed answers by iterate.

    Pairs of earlier rounds replace the replayed answers, which are in no shard. The result depends on the job alone.
    """
    config, data, size = job.config, job.config.data, job.config.generation.shard_size
    if job.extra["rows"] != "train":
        (only,) = job.inputs["policies"]
        iterates = np.full((len(rows), 1), int(only))
        return make_shards(np.arange(len(rows)), iterates, np.zeros_like(iterates, bool), size), {}
    chosen = round_prompts(len(rows), data.prompts_per_round, job.round, data.round_prompts, config.seed)
    iterates, mixed, replayed = drawn_sources(
        rows.names(chosen), config.generation.answers_per_prompt, job.extra["weights"],
        geometric_share=job.extra.get("geometric", {"share": 0.0})["share"],
        replay_share=job.extra.get("replay_share", 0.0), round_number=job.round, seed=config.seed,
    )  # fmt: skip
    not_given = zip(*np.unique(iterates[replayed], return_counts=True), strict=True)
    return make_shards(chosen, iterates, mixed, size, replayed), {str(n): int(count) for n, count in not_given}


def run(job: Job) -> None:
    """Answer the waves from standard input. Raises as `answer_shards`."""
    say = os.fdopen(int(os.environ.get("SPINREG_SAY", sys.stdout.fileno())), "w", closefd=False)
    speaking = threading.Lock()

    def tell(line: str) -> None:
        # Two threads report: the engine's the answers, and that of the uploads the shards.
        with speaking:
            try:
                print(f"{line};", file=say, flush=True)
            except OSError:
                print("the stage closed its end of the socket: all shards are done, or it has ended", flush=True)
                # In the thread of the uploads an exception would end nothing before the next shard.
                os._exit(1)

    store = open_store(job.store)
    rows = Rows(fetch_file(store, job.inputs["data"], f"{job.extra['rows']}.parquet"))
    shards, _ = planned(job, rows)

    def waves() -> Iterable[list[Shard]]:
        for line in sys.stdin:
            yield [shards[number] for number in json.loads(line)]
            tell("idle")

    answer_shards(
        job, store, rows, [Source(*source) for source in job.extra["sources"]], waves(),
        on_answer=lambda n: tell(f"answered {n}"),
        on_commit=lambda number, meta: tell(f"committed {number} {json.dumps(meta)}"),
    )  # fmt: skip


if __name__ == "__main__":
    main(run)
