"""Three iterates of a tiny random model, evaluated in a row on a real store, against brute force."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from spinreg_core.config import EvaluationConfig, GenerationConfig, RunConfig, TrainingConfig
from spinreg_core.errors import BadInput, Damaged
from spinreg_core.evaluation.heldout import heldout_metrics
from spinreg_core.evaluation.metrics import GAME, METRICS
from spinreg_core.logprobs import policy as policy_module
from spinreg_core.models.chat_template import Renderer
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import fingerprint, publish, read_manifest, require_manifest
from spinreg_core.stages import evaluate, generate
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store

LETTERS = "abcdefghijklmnopqrstuvwxyz .#0123456789"
ALPHA = 0.25
BETA = 0.1  # the default
CONFIG = RunConfig(
    generation=GenerationConfig(engine="hf", dtype="float32", max_new_tokens=8, shard_size=5),
    training=TrainingConfig(precision="fp32"),
    evaluation=EvaluationConfig(bootstrap=100, shown_samples=3),
    objective={"alpha": ALPHA},
    resources={"device": "cpu"},
)


def save_policy(folder: Path, seed: int) -> None:
    """A Llama of a few thousand random weights, one letter a token, with a chat template."""
    vocab = {"<end>": 0, "<user>": 1, "<assistant>": 2, "<unk>": 3} | {c: i + 4 for i, c in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
    ).save_pretrained(folder)


@dataclass
class World:
    """A store with held-out rows and three policies, and the jobs that evaluate them."""

    store: Store
    data: str
    policies: list[str]
    root: Path

    def job(self, iterate: int, evaluated: Sequence[str] = (), config: RunConfig = CONFIG) -> Job:
        """The job of an iterate's evaluation; its held-out answers are sampled unless they are there."""
        inputs = {
            "data": self.data, "policy": self.policies[iterate], "base": self.policies[0],
            "previous": self.policies[iterate - 1] if iterate else None,
            "evaluate_base": evaluated[0] if iterate else None,
            "evaluate_previous": evaluated[iterate - 1] if iterate else None,
            "heldout": self.heldout(iterate),
        }  # fmt: skip
        key = {"n": iterate, "inputs": inputs, "config": config.model_dump(mode="json")}
        return Job("evaluate", fingerprint("evaluate", key), key, self.store.url, "e0001-test", iterate, inputs,
                   config, self.root / f"work-{iterate}")  # fmt: skip

    def heldout(self, iterate: int) -> str:
        """This iterate's answers to the held-out prompts."""
        inputs = {"data": self.data, "policies": {str(iterate): self.policies[iterate]}}
        key = inputs | {"sampler": {"engine": "hf"}}
        job = Job("generate", fingerprint("generate", key), key, self.store.url, "e0001-test", iterate, inputs, CONFIG,
                  self.root / f"answers-{iterate}", {"rows": "heldout"})  # fmt: skip
        if read_manifest(self.store, job.object_id) is None:
            job.workdir.mkdir(exist_ok=True)
            generate.run(job)
        return job.object_id

    def rows(self, object_id: str) -> dict[str, list[Any]]:
        return pq.read_table(fetch_file(self.store, object_id, "rows.parquet")).to_pydict()

    def put(self, stage: str, folder: Path) -> str:
        job = Job(stage, fingerprint(stage, {"folder": str(folder)}), {}, self.store.url, "e0001-put", 0, {}, CONFIG,
                  folder)  # fmt: skip
        return publish(self.store, job, folder, metrics={}).object_id


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("evaluate")
    made = World(open_store(str(root / "store")), "", [], root)
    for seed in range(3):
        save_policy(root / f"policy-{seed}" / "policy", seed)
        made.policies.append(made.put("base" if seed == 0 else "train", root / f"policy-{seed}"))
    renderer = Renderer.from_folder(root / "policy-0" / "policy")
    rows = []
    for i in range(12):
        messages = [{"role": "user", "content": f"what is {i} and {LETTERS[i] * (i % 4)}"}]
        answer = f"it is {i}.#### {i}" if i % 3 == 0 else f"letter {LETTERS[i]}"
        ids = renderer.answer_ids(messages, answer)
        rows.append(
            {
                "prompt_id": f"{i:016x}", "source_row": i, "messages": json.dumps(messages), "answer": answer,
                "prompt_ids": renderer.prompt_ids(messages), "answer_ids": ids[:-2] if i == 5 else ids,
                "answer_truncated": i == 5, "final_answer": str(i) if i % 3 == 0 else None,
            }
        )  # fmt: skip
    (root / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "heldout.parquet")
    made.data = made.put("data", root / "data")
    return made


def evaluated_by(job: Job) -> Manifest:
    manifest = evaluate.run(job)
    assert manifest is not None
    return manifest


@pytest.fixture(scope="module")
def evaluated(world: World) -> list[str]:
    """Object ids of the evaluations of iterates 0, 1 and 2."""
    found: list[str] = []
    for iterate in range(3):
        found.append(evaluated_by(world.job(iterate, found)).object_id)
    return found


def brute_force(world: World, iterate: int, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """Log-probabilities token by token in float64, one forward pass per token."""
    model = LlamaForCausalLM.from_pretrained(world.root / f"policy-{iterate}" / "policy").double().eval()
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        total = 0.0
        for k, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer[:k]])).logits[0, -1]
            total += torch.log_softmax(logits, -1)[token].item()
        found.append(total)
    return found


@pytest.mark.parametrize("iterate", [0, 1, 2])
def test_evaluate_scores_equal_brute_force(world: World, evaluated: list[str], iterate: int) -> None:
    """Also those that were taken from earlier evaluations: each column is what its name says."""
    data = pq.read_table(fetch_file(world.store, world.data, "heldout.parquet")).to_pydict()
    rows = world.rows(evaluated[iterate])
    answers = {"real": data["answer_ids"], "sample": rows["sample_ids"]}
    under = {"": iterate, "_base": 0}
    if iterate:
        answers["previous_sample"] = world.rows(evaluated[iterate - 1])["sample_ids"]
        under["_previous"] = iterate - 1
    for kind, ids in answers.items():
        for suffix, policy in under.items():
            expected = brute_force(world, policy, data["prompt_ids"], ids)
            assert rows[f"{kind}{suffix}_logp"] == pytest.approx(expected, abs=2e-4), (kind, suffix)
    if not iterate:
        absent = [name for name in rows if "previous" in name]
        assert len(absent) == 6
        assert all(value is None for name in absent for value in rows[name])
    assert rows["prompt_id"] == data["prompt_id"]
    assert rows["answer_tokens"] == [len(ids) for ids in data["answer_ids"]]
    assert rows["final_answer"] == data["final_answer"]
    assert rows["sample_engine_logp"] == pytest.approx(rows["sample_logp"], abs=2e-4), "the engine samples in fp32 too"
    if iterate:
        opponents = world.rows(evaluated[iterate - 1])["sample_ids"]
        assert rows["previous_sample_tokens"] == [len(ids) for ids in opponents]


@pytest.mark.parametrize("iterate", [1, 2])
def test_evaluate_credit_of_tokens_sums_to_the_reward(world: World, evaluated: list[str], iterate: int) -> None:
    """beta (log p - alpha log p_previous - (1 - alpha) log p_base), token by token, for both answers."""
    data = pq.read_table(fetch_file(world.store, world.data, "heldout.parquet")).to_pydict()
    rows = world.rows(evaluated[iterate])
    document = json.loads(fetch_file(world.store, evaluated[iterate], "samples.json").read_bytes())
    alpha = ALPHA if iterate > 1 else 1.0
    renderer = Renderer.from_folder(world.root / "policy-0" / "policy")
    assert len(document["samples"]) == 3
    for i, shown in enumerate(document["samples"]):
        for kind, ids in (("answer", data["answer_ids"][i]), ("sample", rows["sample_ids"][i])):
            credit, prompt = shown["credit"][kind], data["prompt_ids"][i]
            assert len(credit) == len(ids)
            assert "".join(piece for piece, _ in credit) == renderer.text(ids)
            prefixes = [ids[: k + 1] for k in range(len(ids))]
            own, previous, base = (
                np.diff([0, *brute_force(world, n, [prompt] * len(ids), prefixes)]) for n in (iterate, iterate - 1, 0)
            )
            expected = BETA * (own - alpha * previous - (1 - alpha) * base)
            assert [value for _, value in credit] == pytest.approx(expected, abs=2e-4)
    margins = document["margins"]
    assert sum(margins["counts"]) == len(rows["prompt_id"])
    assert margins["edges"][0] < margins["quantiles"]["0.5"] < margins["edges"][-1]


def test_evaluate_shows_samples_of_its_own_policy(world: World, evaluated: list[str]) -> None:
    renderer = Renderer.from_folder(world.root / "policy-0" / "policy")
    data = pq.read_table(fetch_file(world.store, world.data, "heldout.parquet")).to_pydict()
    seen = []
    for iterate, object_id in enumerate(evaluated):
        rows = world.rows(object_id)
        assert rows["sample_text"] == [renderer.decode(ids) for ids in rows["sample_ids"]]
        for ids, finish in zip(rows["sample_ids"], rows["sample_finish"], strict=True):
            assert (finish == "stop") == (ids[-1] == renderer.end_of_turn)
            assert len(ids) <= 8 if finish == "stop" else len(ids) == 8
        shown = json.loads(fetch_file(world.store, object_id, "samples.json").read_bytes())["samples"]
        assert [s["prompt_id"] for s in shown] == data["prompt_id"][:3]
        assert [s["answer"] for s in shown] == data["answer"][:3]
        assert [s["sample"] for s in shown] == rows["sample_text"][:3]
        assert shown[1]["messages"] == json.loads(data["messages"][1])
        seen.append(rows["sample_text"])
        generated = world.heldout(iterate)
        files = require_manifest(world.store, generated).files
        assert len(files) == 3
        tables = [pq.read_table(fetch_file(world.store, generated, file.name)).to_pylist() for file in files]
        answers = {answer["prompt_id"]: answer["answer_ids"] for table in tables for answer in table}
        assert rows["sample_ids"] == [answers[prompt_id] for prompt_id in data["prompt_id"]]
    assert len({tuple(texts) for texts in seen}) == 3


@pytest.mark.parametrize("iterate", [0, 1, 2])
def test_evaluate_metrics_follow_from_the_rows(world: World, evaluated: list[str], iterate: int) -> None:
    """metrics.json and the manifest are what anybody gets from rows.parquet alone."""
    table = pq.read_table(fetch_file(world.store, evaluated[iterate], "rows.parquet"))
    alpha = ALPHA if iterate > 1 else 1.0  # in round 1 both references are the base
    expected = heldout_metrics(table, alpha=alpha, beta=BETA, resamples=100, seed=CONFIG.seed)
    stored = json.loads(fetch_file(world.store, evaluated[iterate], "metrics.json").read_bytes())
    assert stored == expected
    later = {"nll_vs_base", "nll_vs_previous", "reward_accuracy", "kl_previous", "margin", "separated", "real_change",
             "generated_change", "length_bias"}  # fmt: skip
    assert {*METRICS, *GAME} <= set(stored) | (later if iterate == 0 else set())
    manifest = require_manifest(world.store, evaluated[iterate])
    intervals, scored = manifest.metrics.pop("intervals"), manifest.metrics.pop("tokens_scored")
    rows = table.to_pydict()
    human, samples = sum(rows["answer_tokens"]), sum(map(len, rows["sample_ids"]))
    opponents = sum(rows["previous_sample_tokens"]) if iterate else 0
    # Under the iterate all three; its samples under base and previous policy too, which are one in round 1.
    assert scored == human + opponents + samples * (1 + min(iterate, 2))
    assert manifest.metrics == {name: e["value"] for name, e in expected.items()}
    assert intervals == {name: [e["low"], e["high"]] for name, e in expected.items()}


def test_evaluate_of_an_unchanged_policy_shows_no_difference(world: World, evaluated: list[str]) -> None:
    """Equal policies get one seed and give equal answers: every difference is 0 but for rounding, every pair a tie."""
    still = replace(world, policies=[world.policies[0]] * 2)
    object_id = evaluated_by(still.job(1, evaluated)).object_id
    assert world.rows(object_id)["sample_ids"] == world.rows(evaluated[0])["sample_ids"]
    manifest = require_manifest(world.store, object_id)
    zero = ("nll_vs_base", "nll_vs_previous", "kl_base", "kl_previous")
    assert [manifest.metrics[name] for name in zero] == pytest.approx([0, 0, 0, 0], abs=1e-5)
    assert manifest.metrics["reward_accuracy"] == 0.5


def test_evaluate_reward_accuracy_equals_that_of_the_policies(world: World, evaluated: list[str]) -> None:
    """r = log p_2 - alpha log p_1 - (1 - alpha) log p_0, human answers against iterate 1's samples."""
    data = pq.read_table(fetch_file(world.store, world.data, "heldout.parquet")).to_pydict()
    opponents = world.rows(evaluated[1])["sample_ids"]

    def reward(answers: list[list[int]]) -> np.ndarray:
        own, previous, base = (np.array(brute_force(world, n, data["prompt_ids"], answers)) for n in (2, 1, 0))
        return own - ALPHA * previous - (1 - ALPHA) * base

    wins = (reward(data["answer_ids"]) > reward(opponents)).mean()
    manifest = require_manifest(world.store, evaluated[2])
    assert manifest.metrics["reward_accuracy"] == pytest.approx(wins)


@pytest.mark.parametrize(
    ("iterate", "expected"),
    [
        (0, [(0, 24)]),  # y, y' under the base
        (1, [(1, 36), (0, 12)]),  # y, y', y'' under iterate 1; y' under the base, which is also the previous
        (2, [(2, 36), (0, 12), (1, 12)]),
    ],
)
def test_evaluate_scores_nothing_twice_with_one_model_in_memory(
    world: World,
    evaluated: list[str],
    iterate: int,
    expected: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    calls: list[tuple[str, int]] = []
    alive: list[int] = []
    loaded: list[str] = []
    real_score, real_load = evaluate.score, policy_module.load_for

    def score(policy: Any, prompts: list[list[int]], answers: list[list[int]], **options: Any) -> list[float]:
        calls.append((loaded[-1], len(answers)))
        return real_score(policy, prompts, answers, **options)

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), PreTrainedModel) for thing in gc.get_objects())

    def load(*arguments: Any) -> PreTrainedModel:
        alive.append(count())
        loaded.append(str(arguments[1]))
        return real_load(*arguments)

    before = count()
    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(evaluate, "load_for", load)
    job = world.job(iterate, evaluated)
    again = replace(job, object_id=job.object_id + "-again", workdir=tmp_path / "work")
    evaluate.run(again)
    folders = [str(world.store.local_path(f"objects/{p}/data/e0001-put/policy")) for p in world.policies]
    assert [(folders.index(folder), answers) for folder, answers in calls] == expected
    assert alive == [before] * len(expected)
    assert world.rows(again.object_id) == world.rows(evaluated[iterate])


def test_evaluate_with_answers_to_other_prompts_raises(world: World, evaluated: list[str], tmp_path: Path) -> None:
    """As they are where a shard of them is missing."""
    job = world.job(1, evaluated)
    shard = fetch_file(world.store, job.inputs["heldout"], "shards/00000.parquet")
    (tmp_path / "shards").mkdir()
    shutil.copy(shard, tmp_path / "shards")
    with pytest.raises(Damaged, match="found answers to 5 prompts; expected 12"):
        evaluate.run(replace(job, inputs=job.inputs | {"heldout": world.put("generate", tmp_path)}))


def test_evaluate_again_keeps_the_first_manifest(world: World, evaluated: list[str], tmp_path: Path) -> None:
    job = replace(world.job(1, evaluated), writer="e0002-late", workdir=tmp_path / "work")
    assert evaluated_by(job).writer == "e0001-test"


def test_evaluate_without_the_earlier_evaluations_is_refused(world: World, evaluated: list[str]) -> None:
    job = world.job(1, evaluated)
    with pytest.raises(BadInput, match=r"round 1, inputs\.evaluate_previous: found None"):
        evaluate.run(replace(job, inputs=job.inputs | {"evaluate_previous": None}))
    with pytest.raises(BadInput, match=r"round 0, inputs\.evaluate_base: found evaluate-"):
        evaluate.run(replace(job, round=0))


def test_evaluate_with_earlier_evaluations_of_other_rows_is_refused(
    world: World, evaluated: list[str], tmp_path: Path
) -> None:
    table = pq.read_table(fetch_file(world.store, world.data, "heldout.parquet"))
    pq.write_table(table.slice(1), tmp_path / "heldout.parquet")
    other = world.put("data", tmp_path)
    job = world.job(1, evaluated)
    with pytest.raises(BadInput, match=r"about other rows; expected an evaluation of the held-out rows of data-"):
        evaluate.run(replace(job, inputs=job.inputs | {"data": other}))


def test_evaluate_gsm8k_without_marked_answers_is_refused(world: World, tmp_path: Path) -> None:
    table = pq.read_table(fetch_file(world.store, world.data, "heldout.parquet"))
    keep = [i for i, answer in enumerate(table["final_answer"].to_pylist()) if answer is None]
    pq.write_table(table.take(keep), tmp_path / "heldout.parquet")
    config = CONFIG.model_copy(update={"evaluation": EvaluationConfig(final_answer="gsm8k")})
    job = world.job(0, config=config)
    with pytest.raises(BadInput, match=r"evaluation\.final_answer"):
        evaluate.run(replace(job, inputs=job.inputs | {"data": world.put("data", tmp_path)}))


def test_evaluate_of_a_policy_with_nan_weights_names_it(world: World, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy", 7)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    model.save_pretrained(tmp_path / "policy")
    broken = world.put("train", tmp_path)
    job = world.job(0)
    with pytest.raises(BadInput, match=rf"policy {broken}: found \d+ log-probabilities that are not finite"):
        evaluate.run(replace(job, inputs=job.inputs | {"policy": broken}))
