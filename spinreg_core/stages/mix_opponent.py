"""The stage `mix-opponent`: the round's pairs and their reference scores, which training only reads.

Decides: which pairs make up the opponent, which scores the loss will read, and which of them are known already.
Leaves out: joining and cutting pairs (`selfplay.pairs`), weights (`selfplay.opponent`), the forward pass (`logprobs`).

A job's `inputs`: {"data", "generations" (of this round), "previous" (holds policy/, pi_t), "base" (pi_0): object
ids, "earlier": [{"round", "generations", "pairs" (id or null)}, newest first], with objective.reference iterate also
"iterates": {number: id}}. Its `extra` may have "scored": ids of further pairs objects of this run with scores to reuse;
they change no result.
Leaves `pairs.parquet` (columns: `pairs.PAIRS_SCHEMA`) and `summary.json`. One model is in memory at a time.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spinreg_core.errors import BadInput, Damaged
from spinreg_core.logprobs.policy import load_for
from spinreg_core.logprobs.scoring import score
from spinreg_core.runs.fetch import fetch_file, fetch_files, fetch_folder
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import publish, read_manifest
from spinreg_core.runtime.distributed import Ranks, init_ranks
from spinreg_core.runtime.main import main
from spinreg_core.runtime.progress import Progress
from spinreg_core.selfplay.opponent import mixture_weights, references
from spinreg_core.selfplay.pairs import (
    IDS,
    PAIRS_SCHEMA,
    SCORES,
    SIDES,
    GeneratedRow,
    Pair,
    PairCounts,
    Reference,
    Side,
    counts,
    keyed,
    known_scores,
    make_pairs,
    replay,
    replay_iterates,
    treat_truncated,
)
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

# The sequences to score under one policy, by `sequence_key`.
Missing = dict[bytes, tuple[Pair, Side]]


class Treatment(TypedDict):
    """Pairs that were dropped or had their human answer clipped; replayed pairs, and those that were short."""

    dropped: int
    clipped: int
    replayed: NotRequired[int]
    replay_short: NotRequired[int]


class ScoreCounts(TypedDict):
    """Sequences under one policy that were scored or known already, and the speed of scoring."""

    scores_computed: int
    scores_reused: int
    scored_tokens_per_second: float


class Summary(PairCounts, Treatment, ScoreCounts):
    """The stage's metrics, and what `summary.json` holds."""


def run(job: Job) -> Manifest | None:
    """Build, score and publish the pairs of a round. Returns the manifest, which is empty on ranks other than 0.

    Raises:
        BadInput: no pair is usable, or a policy's scores are not finite.
        Damaged: an input cannot be read, or its rows do not belong together.
    """
    start = time.monotonic()
    store, ranks = open_store(job.store), init_ranks(job.config.resources)
    pairs, treatment = _opponent(store, job)
    summary: Summary = {**counts(pairs), **treatment, **_add_scores(store, job, pairs, ranks)}
    if not ranks.first:
        return None
    print(_described(summary), flush=True)
    folder = job.workdir / "out"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(pairs, schema=PAIRS_SCHEMA), folder / "pairs.parquet")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True))
    return publish(store, job, folder, metrics=dict(summary), seconds=time.monotonic() - start)


def _opponent(store: Store, job: Job) -> tuple[list[Pair], Treatment]:
    """Return the pairs to train on, and how their answers were treated."""
    opponent, earlier = job.config.opponent, job.inputs["earlier"]
    sources = [(job.round, job.inputs["generations"]), *((e["round"], e["generations"]) for e in earlier)]
    weights = mixture_weights(job.round - 1, opponent.history, opponent.weighting, decay=opponent.decay)
    expected = [job.round - k for k in range(len(weights) if opponent.source == "replay" or earlier else 1)]
    if [number for number, _ in sources] != expected:
        found = f"rounds {[e['round'] for e in earlier]}"
        raise BadInput(f"mix-opponent job of round {job.round}, inputs.earlier", found,
                       f"rounds {expected[1:]}, newest first")  # fmt: skip
    # With source regenerate the round's generations hold the drawn iterates already, except these.
    wanted = _not_given(store, job) if opponent.source == "regenerate" else {}
    generations = [
        (number, _generations(store, object_id, wanted if wanted and number < job.round else None))
        for number, object_id in sources
    ]
    columns = ["prompt_id", "prompt_ids", "answer_ids", "answer_truncated"]
    # A round may need a few of a million rows.
    asked = {row["prompt_id"] for _, found in generations for row in found}
    table = pq.read_table(fetch_file(store, job.inputs["data"], "train.parquet"), columns=columns,
                          filters=pc.field("prompt_id").isin(sorted(asked)))  # fmt: skip
    rows = {row["prompt_id"]: row for row in table.to_pylist()}
    joined = [make_pairs(found, rows, number) for number, found in generations]
    back = replay_iterates(joined[1:], wanted, seed=job.config.seed, round_number=job.round)
    # Replayed pairs join before truncated answers are treated, so that they lose as large a share as generated ones.
    before = [joined[0], back] if opponent.source == "regenerate" else joined
    after = [treat_truncated(pairs, opponent.truncated) for pairs in before]
    if opponent.source == "regenerate":
        used = [1.0, 1.0]
        own = replay(after[:1], [1.0], seed=job.config.seed, round_number=job.round) if after[0] or not after[1] else []
        # A round may consist of replayed pairs alone, but not of none.
        chosen = own + after[1]
    else:
        used = weights
        chosen = replay(after, weights, seed=job.config.seed, round_number=job.round, most=opponent.max_pairs)
    length_before = {pair["pair_id"]: len(pair["real_ids"]) for pairs in before for pair in pairs}
    treatment: Treatment = {
        # Only rounds with a positive weight lose pairs.
        "dropped": sum(len(a) - len(b) for a, b, w in zip(before, after, used, strict=True) if w > 0),
        "clipped": sum(len(pair["real_ids"]) < length_before[pair["pair_id"]] for pair in chosen),
    }
    if wanted:
        treatment |= {"replayed": len(back), "replay_short": sum(wanted.values()) - len(back)}
    return chosen, treatment


def _not_given(store: Store, job: Job) -> dict[int, int]:
    """Return how many answers of each iterate the round did not generate: as many earlier pairs come back."""
    manifest = read_manifest(store, job.inputs["generations"])
    if manifest is None:
        raise Damaged(f"{job.inputs['generations']}: found no manifest; expected the round's generations")
    return {int(iterate): count for iterate, count in manifest.metrics.get("replayed", {}).items()}


def _generations(store: Store, object_id: str, iterates: Iterable[int] | None = None) -> list[GeneratedRow]:
    """Return the rows of a round's shards, of some iterates or all."""
    columns = ["prompt_id", "answer", "iterate", "geometric", "prompt_ids", "answer_ids", "finish"]
    wanted = None if iterates is None else pc.field("iterate").isin(sorted(iterates))
    paths = fetch_files(store, object_id, "shards").values()
    return [row for path in paths for row in pq.read_table(path, columns=columns, filters=wanted).to_pylist()]


@dataclass
class _Spent:
    """The cost of scoring, without loading policies."""

    tokens: int = 0
    seconds: float = 0.0


def _add_scores(store: Store, job: Job, pairs: list[Pair], ranks: Ranks) -> ScoreCounts:
    """Fill the score columns that the loss reads (`opponent.references`)."""
    wants = references(job.config.objective.alpha, job.round)
    needed = [name for name in SCORES if wants[name]]
    # By the object of the policy: in round 1 both references are the base, which is scored once.
    values = _known(store, job, needed)
    keys = [{side: keyed(pair, side) for side in SIDES} for pair in pairs]
    work: dict[str, Missing] = {}
    wanted: set[tuple[str, bytes]] = set()
    for policy, (pair, own) in itertools.product(needed, zip(pairs, keys, strict=True)):
        object_id = _scorer(job, policy, pair["iterate"])
        known = values.setdefault(object_id, {})
        for side, key in own.items():
            wanted.add((object_id, key))
            if key not in known:
                work.setdefault(object_id, {})[key] = (pair, side)
    total = sum(map(len, work.values()))
    progress = Progress("mix-opponent", max(total, 1), "answers")
    spent = _Spent()
    for object_id, missing in work.items():
        values[object_id] |= _score(store, job, object_id, missing, progress, ranks, spent)
    for policy in needed:
        for pair, own in zip(pairs, keys, strict=True):
            found = values[_scorer(job, policy, pair["iterate"])]
            for side, key in own.items():
                pair[SCORES[policy][side]] = found[key]
        _require_finite(pairs, policy)
    return {
        "scores_computed": total,
        "scores_reused": len(wanted) - total,
        "scored_tokens_per_second": round(spent.tokens / spent.seconds, 1) if spent.tokens else 0.0,
    }


def _scorer(job: Job, policy: Reference, iterate: int) -> str:
    """Return the object id of the policy that scores pairs of an iterate for a column."""
    if policy == "previous" and job.config.objective.reference == "iterate":
        return str(job.inputs["iterates"][str(iterate)])
    return str(job.inputs[policy])


def _known(store: Store, job: Job, needed: Collection[Reference]) -> dict[str, dict[bytes, float]]:
    """Return the scores that earlier rounds of the run left, by the object of the policy.

    Scores under the previous policy of an earlier round are of use only if the reference is the pair's iterate.
    """
    reusable = [policy for policy in needed if policy == "base" or job.config.objective.reference == "iterate"]
    objects = [e["pairs"] for e in job.inputs["earlier"] if e["pairs"] is not None] + job.extra.get("scored", [])
    found: dict[str, dict[bytes, float]] = {}
    for object_id in dict.fromkeys(objects) if reusable else ():
        scores = [column for policy in reusable for column in SCORES[policy].values()]
        columns = ["iterate", "prompt_ids", *IDS.values(), *scores]
        rows = pq.read_table(fetch_file(store, object_id, "pairs.parquet"), columns=columns).to_pylist()
        by_iterate: dict[int, list[Pair]] = {}
        for row in rows:
            by_iterate.setdefault(row["iterate"], []).append(row)
        for policy, (iterate, own) in itertools.product(reusable, by_iterate.items()):
            if policy == "base" or str(iterate) in job.inputs["iterates"]:
                found.setdefault(_scorer(job, policy, iterate), {}).update(known_scores(own, policy))
    return found


def _score(
    store: Store, job: Job, object_id: str, missing: Missing, progress: Progress, ranks: Ranks, spent: _Spent
) -> dict[bytes, float]:
    """Return the scores of sequences under one policy, and add their cost to `spent`."""
    config = job.config
    folder = ranks.local_main_first(lambda: fetch_folder(store, object_id, "policy"))
    model = load_for(ranks, folder, config.training.precision)
    begin = time.monotonic()
    prompts = [pair["prompt_ids"] for pair, _ in missing.values()]
    answers = [pair[IDS[side]] for pair, side in missing.values()]
    found = score(
        model,
        prompts,
        answers,
        precision=config.training.precision,
        tokens_per_pass=config.resources.tokens_per_pass,
        ranks=ranks,
        progress=progress,
    )
    spent.seconds += time.monotonic() - begin
    spent.tokens += sum(map(len, prompts)) + sum(map(len, answers))
    return dict(zip(missing, found, strict=True))


def _require_finite(pairs: list[Pair], policy: Reference) -> None:
    columns = SCORES[policy].values()
    bad = [pair["pair_id"] for pair in pairs if not all(math.isfinite(pair[name] or 0.0) for name in columns)]
    if bad:
        raise BadInput(
            f"scores under the {policy} policy",
            f"are not finite for {len(bad)} of {len(pairs)} pairs ({', '.join(bad[:8])})",
            "check the policy's weights and their number format",
        )


def _described(summary: Summary) -> str:
    rounds = ", ".join(f"{n} of round {number}" for number, n in summary["by_round"].items())
    short = ""
    if summary.get("replay_short"):
        short = f" ({summary['replay_short']} pairs fewer than the shares ask for: earlier rounds have no more)"
    return (
        f"{summary['pairs']} pairs ({rounds}){short}; generated answers cut off: {summary['generated_truncated']}, "
        f"human answers clipped: {summary['clipped']}, pairs dropped: {summary['dropped']}, empty generated answers: "
        f"{summary['empty_generated']}, equal to the human answer: {summary['identical']}; scores computed: "
        f"{summary['scores_computed']}, reused: {summary['scores_reused']}"
    )


if __name__ == "__main__":
    main(run, ranked=True)
