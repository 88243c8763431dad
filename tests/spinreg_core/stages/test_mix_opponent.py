"""The mix-opponent stage on a real store: pairs, scores, and what is not scored twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import validate
from spinreg_core.errors import BadInput, Damaged
from spinreg_core.logprobs.scoring import score
from spinreg_core.models.loading import load_policy
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.plans import plan_mix_opponent
from spinreg_core.runtime.progress import parse
from spinreg_core.selfplay.pairs import PAIRS_SCHEMA, Pair
from spinreg_core.stages import mix_opponent
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.builders import make_head
from tests.support.tiny_models import random_rows, write_policy

LIMIT = 6  # generated answers longer than this are cut off
ROWS = 12


class Run:
    """A store with data, three policies and the generations of rounds 1 to 3 over the same prompts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store: Store = open_store(str(root / "store"))
        self.policies = [self._policy(seed) for seed in range(3)]
        prompts, answers = random_rows(ROWS, 50)
        names = [f"{i:016x}" for i in range(ROWS)]
        columns = {"prompt_id": names, "prompt_ids": prompts, "answer_ids": answers, "answer_truncated": [False] * ROWS}
        self.data = self._publish("data", {"train.parquet": pa.table(columns)})
        self.prompts = dict(zip(names, prompts, strict=True))
        self.generations = [self.generate(number, number - 1) for number in (1, 2, 3)]

    def _publish(self, stage: str, tables: dict[str, pa.Table], metrics: dict[str, Any] | None = None) -> str:
        folder = self.root / f"out-{len(list(self.root.iterdir()))}"
        for name, table in tables.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, folder / name)
        return self._put(stage, folder, metrics)

    def _put(self, stage: str, folder: Path, metrics: dict[str, Any] | None = None) -> str:
        key = {"from": folder.name}
        job = Job(stage, objects.fingerprint(stage, key), key, "", "e0001-aa", 0, {}, RunConfig(), folder)
        return str(objects.publish(self.store, job, folder, metrics=metrics or {}).object_id)

    def _policy(self, seed: int) -> str:
        write_policy(self.root / f"policy-{seed}" / "policy", seed)
        return self._put("base", self.root / f"policy-{seed}")

    def generate(self, number: int, iterate: int, replayed: dict[str, int] | None = None, **changes: Any) -> str:
        """Answers of round `number` to every prompt, in two shards; `replayed`: answers not given, by iterate."""
        _, answers = random_rows(ROWS, 100 + number, longest=10)
        rows = [
            {
                "prompt_id": name,
                "answer": 0,
                "iterate": iterate,
                "geometric": False,
                "prompt_ids": prompt,
                "answer_ids": answer[:LIMIT],
                "text": "",
                "finish": "length" if len(answer) > LIMIT else "stop",
            }
            | changes
            for (name, prompt), answer in zip(self.prompts.items(), answers, strict=True)
        ]
        half = [pa.Table.from_pylist(rows[:5]), pa.Table.from_pylist(rows[5:])]
        return self._publish("generate", {f"shards/{i:05d}.parquet": table for i, table in enumerate(half)},
                             {"replayed": replayed or {}})  # fmt: skip

    def job(self, number: int, earlier: list[dict[str, Any]] | None = None, **groups: Any) -> Job:
        groups = {
            "objective": {"alpha": 0.5},
            "opponent": {"history": "all"},
            "training": {"precision": "fp32"},
        } | groups
        config = RunConfig(resources={"device": "cpu", "tokens_per_pass": 100}, **groups)  # type: ignore[arg-type]
        inputs = {
            "data": self.data,
            "generations": self.generations[number - 1],
            "earlier": earlier or [],
            "previous": self.policies[number - 1],
            "base": self.policies[0],
        }
        if config.objective.reference == "iterate":
            inputs["iterates"] = {str(n): self.policies[n] for n in range(number)}
        key = {"round": number, "inputs": inputs, "groups": groups}
        workdir = self.root / f"work-{len(list(self.root.iterdir()))}"
        object_id = objects.fingerprint("mix-opponent", key)
        return Job(
            "mix-opponent", object_id, key, str(self.root / "store"), "e0001-aa", number, inputs, config, workdir
        )

    def earlier(self, *numbers: int, pairs: dict[int, str] | None = None) -> list[dict[str, Any]]:
        pairs = pairs or {}
        return [{"round": n, "generations": self.generations[n - 1], "pairs": pairs.get(n)} for n in numbers]

    def pairs(self, manifest: Manifest | None) -> list[Pair]:
        assert manifest is not None
        table = pq.read_table(fetch.fetch_file(self.store, manifest.object_id, "pairs.parquet"))
        assert table.schema.equals(PAIRS_SCHEMA)
        return table.to_pylist()

    def check_scores(self, pairs: list[Pair], policy: int, name: str) -> None:
        model = load_policy(self.root / f"policy-{policy}" / "policy", "fp32", "cpu")
        for which in ("real", "generated"):
            expected = score(
                model,
                [p["prompt_ids"] for p in pairs],
                [p[f"{which}_ids"] for p in pairs],
                precision="fp32",
                tokens_per_pass=70,
            )
            assert [p[f"{name}_{which}"] for p in pairs] == pytest.approx(expected, abs=1e-3)


@pytest.fixture(scope="module", name="prepared")
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def scores_of(pairs: list[Pair]) -> dict[str, bool]:
    """Which score columns are filled; each must be filled for all pairs or for none."""
    found = {}
    for name in ("previous_real", "previous_generated", "base_real", "base_generated"):
        (found[name],) = {pair[name] is not None for pair in pairs}
    return found


def test_round_1_scores_each_answer_once_for_both_references(prepared: Run, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = mix_opponent.run(prepared.job(1))
    pairs = prepared.pairs(manifest)
    assert len(pairs) == ROWS
    assert all(scores_of(pairs).values())
    assert [p["previous_real"] for p in pairs] == [p["base_real"] for p in pairs]
    prepared.check_scores(pairs, 0, "previous")
    metrics = manifest.metrics
    different = len({(tuple(p["prompt_ids"]), tuple(p[f"{w}_ids"])) for p in pairs for w in ("real", "generated")})
    assert (metrics["scores_computed"], metrics["scores_reused"]) == (different, 0)
    lines = [line for line in map(parse, capsys.readouterr().out.splitlines()) if line]
    assert lines[-1].text.startswith(f"[mix-opponent] {different}/{different} ")
    summary = json.loads(fetch.fetch_file(prepared.store, manifest.object_id, "summary.json").read_text())
    assert summary == metrics


@pytest.mark.parametrize(("alpha", "filled"), [(1.0, "previous"), (0.0, "base")])
def test_scores_that_the_loss_does_not_read_are_null(prepared: Run, alpha: float, filled: str) -> None:
    job = prepared.job(2, prepared.earlier(1), objective={"alpha": alpha})
    pairs = prepared.pairs(mix_opponent.run(job))
    assert scores_of(pairs) == {f"{n}_{w}": n == filled for n in ("previous", "base") for w in ("real", "generated")}
    prepared.check_scores(pairs, {"previous": 1, "base": 0}[filled], filled)


def test_fictitious_play_replays_rounds_and_scores_the_base_once(prepared: Run) -> None:
    """log pi_0(real) is computed in round 1 and never again; log pi_0(generated) once per generated set."""
    first = mix_opponent.run(prepared.job(1, opponent={"truncated": "keep"}))
    known = {1: first.object_id}
    second = mix_opponent.run(prepared.job(2, prepared.earlier(1, pairs=known), opponent={"truncated": "keep"}))
    known[2] = second.object_id
    third = mix_opponent.run(prepared.job(3, prepared.earlier(2, 1, pairs=known), opponent={"truncated": "keep"}))
    pairs = prepared.pairs(third)
    assert Counter(p["round"] for p in pairs) == {1: ROWS, 2: ROWS, 3: ROWS}
    assert all(p["iterate"] == p["round"] - 1 and p["pair_id"] == f"{p['round']}:{p['prompt_id']}" for p in pairs)
    prepared.check_scores(pairs, 0, "base")
    prepared.check_scores(pairs, 2, "previous")

    def sequences(which: str, rounds: set[int]) -> set[tuple[Any, ...]]:
        return {(*p["prompt_ids"], -1, *p[f"{which}_ids"]) for p in pairs if p["round"] in rounds}

    real, old = sequences("real", {1}), sequences("generated", {1, 2})
    assert real == sequences("real", {1, 2, 3})
    new = sequences("generated", {3}) - old - real
    every = real | old | new
    assert third.metrics["scores_computed"] == len(every) + len(new)  # all under pi_2, only new ones under pi_0
    assert third.metrics["scores_reused"] == len(every) - len(new)
    by_id = {p["pair_id"]: p for n in (first, second) for p in prepared.pairs(n)}
    for pair in pairs:
        if pair["round"] < 3:
            assert pair["base_real"] == by_id[pair["pair_id"]]["base_real"]  # the very number, not one close to it

    # The same, where no earlier pairs are replayed but the run names them.
    alone = prepared.job(3, opponent={"history": 1, "truncated": "keep"})
    found = mix_opponent.run(replace(alone, extra={"scored": [first.object_id]})).metrics
    assert found["scores_reused"] >= ROWS
    assert found["scores_computed"] == 2 * len(real | sequences("generated", {3})) - found["scores_reused"]


def test_clipped_answer_is_scored_again(prepared: Run) -> None:
    whole = mix_opponent.run(prepared.job(1, opponent={"truncated": "keep"}))
    earlier = prepared.earlier(1, pairs={1: whole.object_id})
    manifest = mix_opponent.run(prepared.job(2, earlier, opponent={"truncated": "clip_real"}))
    assert manifest.metrics["clipped"] > 0
    prepared.check_scores(prepared.pairs(manifest), 0, "base")


@pytest.mark.parametrize("truncated", ["keep", "drop", "clip_real"])
def test_truncated_answers_are_treated_and_counted(prepared: Run, truncated: str) -> None:
    manifest = mix_opponent.run(prepared.job(1, opponent={"truncated": truncated}))
    pairs, metrics = prepared.pairs(manifest), manifest.metrics
    before = prepared.pairs(mix_opponent.run(prepared.job(1, opponent={"truncated": "keep"})))
    cut = [p for p in before if p["generated_truncated"]]
    longer = [p for p in cut if len(p["real_ids"]) > LIMIT]
    assert len(cut) > len(longer) > 0
    assert len(cut) < ROWS
    assert metrics["pairs"] == len(pairs) == ROWS - (len(cut) if truncated == "drop" else 0)
    assert metrics["dropped"] == (len(cut) if truncated == "drop" else 0)
    assert metrics["clipped"] == metrics["real_truncated"] == (len(longer) if truncated == "clip_real" else 0)
    assert metrics["generated_truncated"] == (0 if truncated == "drop" else len(cut))
    for pair in pairs:
        assert pair["real_truncated"] == (pair["real_ids"][-1] != 1)
        if pair["real_truncated"]:
            assert len(pair["real_ids"]) == LIMIT == len(pair["generated_ids"])


def test_weights_set_the_shares_of_the_rounds(prepared: Run) -> None:
    opponent = {"history": 3, "weighting": [2, 1, 1], "truncated": "keep"}
    manifest = mix_opponent.run(prepared.job(3, prepared.earlier(2, 1), opponent=opponent))
    assert manifest.metrics["by_round"] == {"3": ROWS, "2": ROWS // 2, "1": ROWS // 2}


def test_max_pairs_limits_the_round_and_its_scoring(prepared: Run) -> None:
    opponent = {"history": "all", "truncated": "keep", "max_pairs": ROWS + 1}
    manifest = mix_opponent.run(prepared.job(3, prepared.earlier(2, 1), opponent=opponent))
    pairs = prepared.pairs(manifest)
    assert len(pairs) == ROWS + 1
    shares = Counter(p["round"] for p in pairs)
    assert max(shares.values()) - min(shares.values()) <= 1
    sequences = {(*p["prompt_ids"], -1, *p[f"{w}_ids"]) for p in pairs for w in ("real", "generated")}
    assert manifest.metrics["scores_computed"] == 2 * len(sequences)
    prepared.check_scores(pairs, 2, "previous")


SCORES = ("previous_real", "previous_generated", "base_real", "base_generated")


def scores_by_id(pairs: list[Pair]) -> dict[str, list[float | None]]:
    return {pair["pair_id"]: [pair[name] for name in SCORES] for pair in pairs}  # type: ignore[literal-required]


def test_iterate_reference_of_history_1_is_the_previous_policy(prepared: Run) -> None:
    found = [
        prepared.pairs(mix_opponent.run(prepared.job(2, objective={"reference": name}, opponent={"history": 1})))
        for name in ("previous", "iterate")
    ]
    assert found[0] == found[1]


def test_iterate_reference_keeps_the_scores_of_replayed_pairs(prepared: Run) -> None:
    """Each pair has the scores of the iterate that sampled it, computed once, in its own round."""
    objective, known, before = {"reference": "iterate"}, dict[int, str](), dict[str, list[float | None]]()
    for number in (1, 2, 3):
        earlier = prepared.earlier(*range(number - 1, 0, -1), pairs=known)
        manifest = mix_opponent.run(prepared.job(number, earlier, objective=objective, opponent={"truncated": "keep"}))
        known[number], pairs = manifest.object_id, prepared.pairs(manifest)
        assert {p["round"] for p in pairs} == set(range(1, number + 1))
        for iterate in range(number):
            own = [p for p in pairs if p["iterate"] == iterate]
            prepared.check_scores(own, iterate, "previous")
        assert scores_by_id(pairs).items() >= before.items(), "exactly equal, not just close"
        before = scores_by_id(pairs)
        new = {
            (*p["prompt_ids"], -1, *p[f"{w}_ids"]) for p in pairs if p["round"] == number for w in ("real", "generated")
        }
        assert manifest.metrics["scores_computed"] <= 2 * len(new), "nothing of earlier rounds is scored again"


def test_iterate_reference_of_unknown_pairs_scores_them_under_each_iterate(prepared: Run) -> None:
    """Earlier rounds may lack a pair, for example because of a limit."""
    manifest = mix_opponent.run(prepared.job(3, prepared.earlier(2, 1), objective={"reference": "iterate"}))
    pairs = prepared.pairs(manifest)
    for iterate in (0, 1, 2):
        prepared.check_scores([p for p in pairs if p["iterate"] == iterate], iterate, "previous")
    prepared.check_scores(pairs, 0, "base")


def test_iterate_reference_of_regenerated_answers_is_the_drawn_iterate(prepared: Run) -> None:
    groups = {"objective": {"reference": "iterate", "alpha": 1.0}, "opponent": {"source": "regenerate"}}
    job = prepared.job(3, **groups)
    other = prepared.generate(3, 1)
    found = mix_opponent.run(replace(job, inputs=job.inputs | {"generations": other}, object_id=job.object_id + "i"))
    prepared.check_scores(prepared.pairs(found), 1, "previous")


def test_regenerated_answers_keep_the_iterate_that_was_drawn(prepared: Run) -> None:
    job = prepared.job(3, opponent={"source": "regenerate", "history": "all"})
    other = prepared.generate(3, 1)
    manifest = mix_opponent.run(replace(job, inputs=job.inputs | {"generations": other}, object_id=job.object_id + "r"))
    assert manifest.metrics["by_iterate"] == {"1": ROWS}
    assert manifest.metrics["by_round"] == {"3": ROWS}


def test_replay_share_brings_back_pairs_of_each_iterate(prepared: Run) -> None:
    """Source regenerate with a replay_share: of every iterate as many come back as were drawn for it."""
    opponent = {"source": "regenerate", "history": "all", "replay_share": 0.5, "truncated": "keep"}
    job = prepared.job(3, prepared.earlier(2, 1), opponent=opponent)
    found = {}
    for name, replayed in (("some", {"1": 5, "0": 3}), ("short", {"1": 5, "0": ROWS + 2}), ("more", {"1": 7, "0": 3})):
        inputs = job.inputs | {"generations": prepared.generate(3, 2, replayed)}
        found[name] = mix_opponent.run(replace(job, inputs=inputs, object_id=f"{job.object_id}-{name}"))
    metrics = found["some"].metrics
    assert metrics["by_round"] == {"3": ROWS, "2": 5, "1": 3}
    assert metrics["by_iterate"] == {"2": ROWS, "1": 5, "0": 3}
    assert (metrics["replayed"], metrics["replay_short"]) == (8, 0)
    assert found["short"].metrics["by_iterate"] == {"2": ROWS, "1": 5, "0": ROWS}
    assert found["short"].metrics["replay_short"] == 2
    pairs = {name: prepared.pairs(manifest) for name, manifest in found.items()}
    taken = {name: {p["pair_id"] for p in own if p["iterate"] == 1} for name, own in pairs.items()}
    assert taken["some"] == taken["short"] < taken["more"]
    prepared.check_scores(pairs["some"], 2, "previous")
    prepared.check_scores(pairs["some"], 0, "base")
    with pytest.raises(BadInput, match=r"inputs\.earlier: found rounds \[1\]"):
        mix_opponent.run(replace(prepared.job(3, prepared.earlier(1), opponent=opponent), object_id="other"))


def test_replayed_pairs_lose_as_many_as_generated_ones(prepared: Run) -> None:
    """`truncated: drop` must not shift the shares of the iterates towards those that are replayed."""
    opponent = {"source": "regenerate", "history": 2, "replay_share": 1.0}
    other = prepared.generate(2, 1, {"0": ROWS})
    found = {}
    for treatment in ("keep", "drop"):
        job = prepared.job(2, prepared.earlier(1), opponent=opponent | {"truncated": treatment})
        job = replace(job, inputs=job.inputs | {"generations": other}, object_id=f"{job.object_id}-{treatment}")
        manifest = mix_opponent.run(job)
        found[treatment] = manifest.metrics
        if treatment == "keep":
            cut = Counter(str(p["iterate"]) for p in prepared.pairs(manifest) if p["generated_truncated"])
    assert found["keep"]["by_iterate"] == {"0": ROWS, "1": ROWS}
    assert found["drop"]["by_iterate"] == {n: ROWS - cut[n] for n in ("0", "1")}
    assert found["drop"]["dropped"] == sum(cut.values())
    assert found["drop"]["replay_short"] == 0


def test_mix_opponent_of_inconsistent_inputs_is_refused(prepared: Run) -> None:
    with pytest.raises(BadInput, match=r"inputs\.earlier: found rounds \[1\]"):
        mix_opponent.run(prepared.job(3, prepared.earlier(1)))
    job = prepared.job(1)
    other = prepared.generate(1, 0, prompt_ids=[3, 3, 3])
    with pytest.raises(Damaged, match="other prompt tokens"):
        mix_opponent.run(replace(job, inputs=job.inputs | {"generations": other}))
    cut = prepared.generate(1, 0, finish="length")
    job = prepared.job(1, opponent={"truncated": "drop"})
    with pytest.raises(BadInput, match="no usable pair of round 1"):
        mix_opponent.run(replace(job, inputs=job.inputs | {"generations": cut}))


def test_infinite_scores_name_their_pairs(prepared: Run) -> None:
    from safetensors.torch import load_file, save_file

    folder = prepared.root / "broken" / "policy"
    write_policy(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    job = prepared.job(2, prepared.earlier(1), opponent={"truncated": "keep"})
    inputs = job.inputs | {"previous": prepared._put("base", folder.parent)}
    with pytest.raises(BadInput, match=r"previous policy are not finite for 24 of 24 pairs \([12]:0{12}"):
        mix_opponent.run(replace(job, inputs=inputs, object_id=job.object_id + "n"))
    assert objects.read_manifest(prepared.store, job.object_id + "n") is None


def test_removed_scores_field_scorer_is_accepted_and_engine_is_refused() -> None:
    for value in ("scorer", None):
        assert validate({"opponent": {"scores": value}}) == RunConfig()
    with pytest.raises(BadInput, match=r"opponent\.scores is no longer a field; remove it: spinreg scores"):
        validate({"opponent": {"scores": "engine"}})


def test_key_without_the_scores_field_is_that_of_0_1_0() -> None:
    key = plan_mix_opponent(RunConfig(), make_head(1), 1).key
    assert key["opponent"] == {"source": "replay", "truncated": "clip_real", "scores": "scorer"}
