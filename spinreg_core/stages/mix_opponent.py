"""The stage `mix-opponent`: the round's pairs and their reference scores, which training only reads.

Decides: which pairs make up the opponent, which scores the loss will read, and which of them are known already.
Leaves out: joining and cutting (`selfplay/pairs.py`), weights (`selfplay/opponent.py`), the forward pass
(`logprobs/sequence.py`).

A job's `inputs`: {"data", "generations" (of this round), "previous" (holds policy/, pi_t), "base" (pi_0): object
ids, "earlier": [{"round", "generations", "pairs" (id or null)}, newest first]}. Its `extra` may have "scored": ids
of further pairs objects of this run, whose base scores may be taken over; they change no result.
Leaves `pairs.parquet` (columns: `pairs.PAIRS_SCHEMA`) and `summary.json`. One model is in memory at a time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.generation.engine import Sampling
from spinreg_core.logprobs.policy import load_for
from spinreg_core.logprobs.scoring import score
from spinreg_core.runs.fetch import fetch_file, fetch_files, fetch_folder
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import publish, read_manifest
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.runtime.distributed import init_ranks as join_ranks
from spinreg_core.runtime.main import main
from spinreg_core.runtime.progress import Progress
from spinreg_core.selfplay.opponent import mixture_weights, references
from spinreg_core.selfplay.pairs import (
    PAIRS_SCHEMA,
    Pair,
    counts,
    keyed,
    known_scores,
    make_pairs,
    replay,
    replay_iterates,
    sequence_key,
    treat_truncated,
)
from spinreg_core.selfplay.sampler_scores import checked_scores
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store


def run(job: Job) -> dict[str, Any]:
    """Build, score and publish the pairs of a round. Returns the manifest (empty on ranks but the first).

    Its metrics are `summary.json`: the numbers of `pairs.counts`, `dropped` and `clipped` pairs, `scores_computed`
    and `scores_reused` (sequences under one policy), `scored_tokens_per_second`. Raises BadInput (no usable pairs, a
    policy whose scores are not finite), Damaged. With scores of the engine also `scores_of_engine` and the
    figures of `engine_scores.checked_scores`.
    """
    start = time.monotonic()
    store, ranks = open_store(job.store), join_ranks(job.config.resources)
    pairs, treated = _opponent(store, job)
    summary = counts(pairs) | treated | _add_scores(store, job, pairs, ranks)
    if not ranks.first:
        return {}
    print(_described(summary), flush=True)
    folder = job.workdir / "out"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(pairs, schema=PAIRS_SCHEMA), folder / "pairs.parquet")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True))
    return publish(store, job, folder, metrics=summary, seconds=time.monotonic() - start)


def _opponent(store: Store, job: Job) -> tuple[list[Pair], dict[str, int]]:
    """The pairs to train on, and how many were dropped or had their human answer clipped."""
    opponent, earlier = job.config.opponent, job.inputs["earlier"]
    sources = [(job.round, job.inputs["generations"]), *((e["round"], e["generations"]) for e in earlier)]
    weights = mixture_weights(job.round - 1, opponent.history, opponent.weighting, decay=opponent.decay)
    expected = [job.round - k for k in range(len(weights) if opponent.source == "replay" or earlier else 1)]
    if [number for number, _ in sources] != expected:
        found = f"rounds {[e['round'] for e in earlier]}"
        raise BadInput(f"mix-opponent job of round {job.round}, inputs.earlier", found,
                       f"rounds {expected[1:]}, newest first")  # fmt: skip
    # With source regenerate the round's generations carry the drawn iterates already, all but these.
    wanted = _not_given(store, job) if opponent.source == "regenerate" else {}
    generations = [
        (number, _generations(store, object_id, wanted if wanted and number < job.round else None))
        for number, object_id in sources
    ]
    columns = ["prompt_id", "prompt_ids", "answer_ids", "answer_truncated"]
    asked = {row["prompt_id"] for _, found in generations for row in found}  # a few of a million, perhaps
    table = pq.read_table(fetch_file(store, job.inputs["data"], "train.parquet"), columns=columns,
                          filters=pc.field("prompt_id").isin(sorted(asked)))  # fmt: skip
    rows = {row["prompt_id"]: row for row in table.to_pylist()}
    joined = [make_pairs(found, rows, number) for number, found in generations]
    back = replay_iterates(joined[1:], wanted, seed=job.config.seed, round_number=job.round)
    # Before truncated answers are treated: what was drawn for an iterate loses as large a share as what it generates.
    before = [joined[0], back] if opponent.source == "regenerate" else joined
    after = [treat_truncated(pairs, opponent.truncated) for pairs in before]
    if opponent.source == "regenerate":
        used = [1.0, 1.0]
        own = replay(after[:1], [1.0], seed=job.config.seed, round_number=job.round) if after[0] or not after[1] else []
        chosen = own + after[1]  # a round may be made of replayed pairs alone, but not of none
    else:
        used = weights
        chosen = replay(after, weights, seed=job.config.seed, round_number=job.round)
    length_before = {pair["pair_id"]: len(pair["real_ids"]) for pairs in before for pair in pairs}
    replayed = {"replayed": len(back), "replay_short": sum(wanted.values()) - len(back)} if wanted else {}
    return chosen, replayed | {
        # Only rounds whose pairs are used at all lose any.
        "dropped": sum(len(a) - len(b) for a, b, w in zip(before, after, used, strict=True) if w > 0),
        "clipped": sum(len(pair["real_ids"]) < length_before[pair["pair_id"]] for pair in chosen),
    }


def _not_given(store: Store, job: Job) -> dict[int, int]:
    """How many answers of each iterate the round did not generate, so that earlier pairs of it come back."""
    manifest = read_manifest(store, job.inputs["generations"])
    if manifest is None:
        raise Damaged(f"{job.inputs['generations']}: found no manifest; expected the round's generations")
    return {int(iterate): count for iterate, count in manifest["metrics"].get("replayed", {}).items()}


def _generations(store: Store, object_id: str, iterates: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Rows of a round's shards, of some iterates or all."""
    columns = ["prompt_id", "answer", "iterate", "geometric", "prompt_ids", "answer_ids", "finish"]
    wanted = None if iterates is None else pc.field("iterate").isin(sorted(iterates))
    paths = fetch_files(store, object_id, "shards").values()
    return [row for path in paths for row in pq.read_table(path, columns=columns, filters=wanted).to_pylist()]


@dataclass
class _Spent:
    """What scoring took, without loading policies."""

    scores: int = 0
    tokens: int = 0
    seconds: float = 0.0


def _add_scores(store: Store, job: Job, pairs: list[Pair], ranks: Ranks) -> dict[str, Any]:
    """Fill the score columns that the loss reads (`rounds.references`)."""
    wants = references(job.config.objective.alpha, job.round)
    needed: list[Literal["previous", "base"]] = [name for name in ("previous", "base") if wants[name]]
    known = _known(store, job) if wants["base"] else {}
    values: dict[str, dict[bytes, float]] = {}
    work: dict[str, dict[bytes, tuple[Pair, str]]] = {}  # object id of a policy -> sequences to score under it
    for policy in needed:
        is_base = job.inputs[policy] == job.inputs["base"]
        values[policy] = known if is_base else {}
        missing = work.setdefault(job.inputs[policy], {})
        for pair in pairs:
            for which in ("real", "generated"):
                key = keyed(pair, which)
                if key not in values[policy]:
                    missing[key] = (pair, which)
    said = _engine_scores(store, job, work.get(job.inputs["previous"], {}))
    wanted = {keyed(pair, which) for pair in pairs for which in ("real", "generated")}
    reused = sum(len(wanted) - len(missing) for missing in work.values())
    progress = Progress("mix-opponent", max(sum(map(len, work.values())), 1), "answers")
    spent = _Spent()
    figures: dict[str, Any] = {}
    for object_id, missing in work.items():

        def scored(part: dict[bytes, tuple[Pair, str]], object_id: str = object_id) -> dict[bytes, float]:
            found, took = _score(store, job, object_id, part, progress, ranks)
            spent.scores += len(part)
            spent.seconds += took
            spent.tokens += sum(len(pair["prompt_ids"]) + len(pair[f"{which}_ids"]) for pair, which in part.values())
            return found

        if said and object_id == job.inputs["previous"]:
            before = spent.scores
            found, figures = _with_engine(missing, said, scored)
            progress.update(len(missing) - (spent.scores - before))
        else:
            found = scored(missing)
        for policy in needed:
            if job.inputs[policy] == object_id:
                values[policy] = values[policy] | found
    for policy in needed:
        for pair in pairs:
            for which in ("real", "generated"):
                pair[f"{policy}_{which}"] = values[policy][keyed(pair, which)]
        _require_finite(pairs, policy)
    return figures | {
        "scores_computed": spent.scores,
        "scores_reused": reused,
        "scores_of_engine": sum(map(len, work.values())) - spent.scores,
        "scored_tokens_per_second": round(spent.tokens / spent.seconds, 1) if spent.tokens else 0.0,
    }


def _engine_scores(store: Store, job: Job, missing: dict[bytes, tuple[Pair, str]]) -> dict[str, dict[bytes, float]]:
    """What the engine said of this round's answers of the previous policy, by shard; nothing where it cannot stand for
    our scores."""
    if job.config.opponent.scores == "scorer" or not missing:
        return {}
    if not Sampling.of(job.config.generation, ()).is_the_policy:
        print("opponent.scores engine: the sampler is not neutral, so its log-probabilities are not the answers' "
              "under the policy; all are computed", flush=True)  # fmt: skip
        return {}
    found: dict[str, dict[bytes, float]] = {}
    columns = ["policy", "geometric", "prompt_ids", "answer_ids", "logprobs"]
    for name, path in fetch_files(store, job.inputs["generations"], "shards").items():
        rows = pq.read_table(path, columns=columns).to_pylist()
        own = [row for row in rows if row["policy"] == job.inputs["previous"] and not row["geometric"]]
        sums = {sequence_key(row["prompt_ids"], row["answer_ids"]): math.fsum(row["logprobs"]) for row in own}
        found[name] = {key: value for key, value in sums.items() if key in missing}
    return found


def _with_engine(
    missing: dict[bytes, tuple[Pair, str]],
    said: dict[str, dict[bytes, float]],
    scored: Callable[[dict[bytes, tuple[Pair, str]]], dict[bytes, float]],
) -> tuple[dict[bytes, float], dict[str, Any]]:
    """Scores of all that is missing, and the figures of the check: the scorer takes what the engine did not say, the
    samples, and then what the engine is not believed."""
    candidates = {key for shard in said.values() for key in shard}
    found: dict[bytes, float] = {}

    def check(sample: Sequence[bytes]) -> list[float]:
        chosen = set(sample)
        found.update(scored({k: v for k, v in missing.items() if k not in candidates or k in chosen}))
        return [found[key] for key in sample]

    taken, figures = checked_scores(said, check)
    found = taken | found
    rest = {key: value for key, value in missing.items() if key not in found}
    return found | (scored(rest) if rest else {}), figures


def _known(store: Store, job: Job) -> dict[bytes, float]:
    """Scores under pi_0 that earlier rounds of the run left."""
    objects = [e["pairs"] for e in job.inputs["earlier"] if e["pairs"] is not None] + job.extra.get("scored", [])
    found: dict[bytes, float] = {}
    for object_id in dict.fromkeys(objects):
        columns = ["prompt_ids", "real_ids", "generated_ids", "base_real", "base_generated"]
        found |= known_scores(pq.read_table(fetch_file(store, object_id, "pairs.parquet"), columns=columns).to_pylist(),
                              "base")  # fmt: skip
    return found


def _score(
    store: Store,
    job: Job,
    object_id: str,
    missing: dict[bytes, tuple[Pair, str]],
    progress: Progress,
    ranks: Ranks,
) -> tuple[dict[bytes, float], float]:
    """Scores by sequence, and the seconds they took, without those for loading the policy."""
    if not missing:
        return {}, 0.0
    config = job.config
    folder = ranks.local_main_first(lambda: fetch_folder(store, object_id, "policy"))
    model = load_for(ranks, folder, config.training.precision)
    begin = time.monotonic()
    found = score(
        model,
        [pair["prompt_ids"] for pair, _ in missing.values()],
        [pair[f"{which}_ids"] for pair, which in missing.values()],
        precision=config.training.precision,
        tokens_per_pass=config.resources.tokens_per_pass,
        ranks=ranks,
        progress=progress,
    )
    return dict(zip(missing, found, strict=True)), time.monotonic() - begin


def _require_finite(pairs: list[Pair], policy: Literal["previous", "base"]) -> None:
    bad = [p["pair_id"] for p in pairs if not math.isfinite(p[f"{policy}_real"] + p[f"{policy}_generated"])]
    if bad:
        raise BadInput(
            f"scores under the {policy} policy",
            f"log-probabilities that are not finite for {len(bad)} of {len(pairs)} pairs ({', '.join(bad[:8])})",
            "finite numbers; the policy's weights or its number format are at fault",
        )


def _described(summary: dict[str, Any]) -> str:
    rounds = ", ".join(f"{n} of round {number}" for number, n in summary["by_round"].items())
    engine = ""
    if "engine_shards" in summary:
        engine = (
            f" ({summary['engine_checked']} checked: off by {summary['engine_mean_difference']:+.3g} nats on average, "
            f"{summary['engine_worst_difference']:+.3g} at most; {summary['engine_shards_refused']} of "
            f"{summary['engine_shards']} shards refused)"
        )
    short = ""
    if summary.get("replay_short"):
        short = f" ({summary['replay_short']} of the pairs to replay were not there: the shares are off by as many)"
    return (
        f"{summary['pairs']} pairs ({rounds}){short}; generated answers cut off: {summary['generated_truncated']}, "
        f"human answers clipped: {summary['clipped']}, pairs dropped: {summary['dropped']}, answers of an "
        f"end-of-turn only: "
        f"{summary['empty_generated']}, equal to the human answer: {summary['identical']}; scores computed: "
        f"{summary['scores_computed']}, reused: {summary['scores_reused']}, the engine's: "
        f"{summary['scores_of_engine']}{engine}"
    )


if __name__ == "__main__":
    main(run, ranked=True)
