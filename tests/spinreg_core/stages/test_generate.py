"""The generate stage: who answers what, what is committed when, and that a killed stage goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spinreg_core import objects
from spinreg_core.config import RunConfig
from spinreg_core.data.split import round_prompts
from spinreg_core.errors import BadInput
from spinreg_core.render import Renderer
from spinreg_core.stages import generate
from spinreg_core.stages.generate import drawn_iterates, ensure_generations, make_shards, run
from spinreg_core.stages.job import Job
from spinreg_core.store import Store, open_store

END, PROMPTS, HELDOUT = 1, 23, 5
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_policy(folder: Path, seed: int) -> None:
    """A random Llama over bytes, with a chat template; it ends a turn about every thirtieth token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=96, initializer_range=0.3, bos_token_id=None, eos_token_id=END, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[END] = 0.0  # a logit in the middle of the others': neither rare nor certain
        model.lm_head.weight *= 0.5
    model.save_pretrained(folder)


def rows(renderer: Renderer, count: int, kind: str) -> pa.Table:
    prompts = [[{"role": "user", "content": f"{kind} {i} " + "x" * (i % 7)}] for i in range(count)]
    return pa.table(
        {
            "prompt_id": [f"{kind}-{i:04d}" for i in range(count)],
            "prompt_ids": pa.array([renderer.prompt_ids(p) for p in prompts], pa.list_(pa.int32())),
            "answer": ["yes"] * count,
        }
    )


class House:
    """A local store with a data object and the policies of iterates 0, 1 and 2."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, open_store(str(root / "store"))
        for n in range(3):
            write_policy(root / f"iterate-{n}" / "policy", seed=n)
            self._publish(f"policy-{n}", root / f"iterate-{n}")
        self.renderer = Renderer.from_folder(root / "iterate-0" / "policy")
        (root / "data").mkdir()
        for kind, count in (("train", PROMPTS), ("heldout", HELDOUT)):
            pq.write_table(rows(self.renderer, count, kind), root / "data" / f"{kind}.parquet")
        self._publish("data", root / "data")

    def _publish(self, name: str, folder: Path) -> None:
        job = Job("base", name, {}, self.store.url, "w", 0, {}, RunConfig(), self.root)
        objects.publish(self.store, job, folder, metrics={})

    def job(self, name: str, *, iterates: list[int], round_number: int = 3, engine: str = "hf", kind: str = "train",
            writer: str = "e1-a", **generation: Any) -> Job:  # fmt: skip
        """`iterates`, newest first, share the prompts equally."""
        config = RunConfig.model_validate(
            {
                "store": self.store.url,
                "seed": 7,
                "data": {"prompts_per_round": 13, "max_prompt_tokens": 64, "max_length": 96},
                "generation": {"dtype": "float32", "max_new_tokens": 12, "shard_size": 4, "batch_size": 3} | generation,
            }
        )
        extra: dict[str, Any] = {"rows": kind}
        if kind == "train":
            extra["weights"] = [1 / len(iterates)] * len(iterates)
        policies = {str(n): f"policy-{n}" for n in iterates}
        return Job(
            stage="generate", object_id=f"generate-{name}", key={"sampler": {"engine": engine}}, store=self.store.url,
            writer=writer, round=round_number, inputs={"data": "data", "policies": policies}, config=config,
            workdir=self._workdir(), extra=extra,
        )  # fmt: skip

    def _workdir(self) -> Path:
        folder = self.root / f"work-{len(list(self.root.glob('work-*')))}"
        folder.mkdir()
        return folder

    def answers(self, manifest: dict[str, Any]) -> pa.Table:
        names = sorted(entry["name"] for entry in manifest["files"])
        paths = [objects.fetch_file(self.store, manifest["object_id"], name) for name in names]
        return pa.concat_tables([pq.read_table(path) for path in paths])


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    return House(tmp_path)


def parts_bytes(store: Store, object_id: str) -> dict[str, tuple[bytes | None, bytes | None]]:
    """Name -> (part file, shard file), as they lie in the store."""
    return {
        name: (store.read(f"objects/{object_id}/parts/{name}.json"), store.read(part["files"][0]["key"]))
        for name, part in objects.list_parts(store, object_id).items()
    }


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Every further commit dies before it happens, as a kill would."""
    real, left = generate.commit_part, [shards]

    def commit(*arguments: Any) -> dict[str, Any]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(generate, "commit_part", commit)


def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generate, "open_engine", refuse)


def test_shards_cover_every_row_once_and_hold_one_iterate_each() -> None:
    rows_, iterates = list(range(100, 140)), [i % 3 for i in range(40)]
    shards = make_shards(rows_, iterates, 5, seed=1, round_number=2, kind="train")
    assert [s.number for s in shards] == list(range(len(shards)))
    assert [(s.iterate, r) for s in shards for r in s.rows] == sorted(
        zip(iterates, rows_, strict=True), key=lambda pair: pair[0]
    )
    assert all(0 < len(s.rows) <= 5 for s in shards)
    assert len(shards) == sum(math.ceil(iterates.count(n) / 5) for n in range(3))


def test_shard_seeds_depend_on_run_round_kind_and_number_only() -> None:
    def seeds(size: int = 5, **change: Any) -> list[int]:
        which = {"seed": 1, "round_number": 2, "kind": "train"} | change
        return [s.seed for s in make_shards(range(20), [0] * 20, size, **which)]

    variants = [seeds(), seeds(seed=2), seeds(round_number=3), seeds(kind="heldout")]
    assert len({s for v in variants for s in v}) == 16
    assert seeds(size=10) == seeds()[:2]
    assert all(0 <= s < 2**31 for s in seeds())


def test_drawn_iterates_follow_the_weights_and_reproduce() -> None:
    names = [f"p{i}" for i in range(4000)]
    drawn = drawn_iterates(names, [0.5, 0.3, 0.2], round_number=5, seed=3)
    assert drawn == drawn_iterates(names, [0.5, 0.3, 0.2], round_number=5, seed=3)
    share = {n: count / 4000 for n, count in Counter(drawn).items()}
    assert share == pytest.approx({4: 0.5, 3: 0.3, 2: 0.2}, abs=0.03)


def test_a_round_by_one_iterate(house: House) -> None:
    job = house.job("plain", iterates=[2])
    manifest = run(job)
    assert manifest == objects.read_manifest(house.store, job.object_id)
    found = house.answers(manifest)
    data = pq.read_table(house.root / "data" / "train.parquet")
    expected = data.take(round_prompts(PROMPTS, 13, 3, "fresh", 7))
    assert found["prompt_id"].to_pylist() == expected["prompt_id"].to_pylist()
    assert found["prompt_ids"].to_pylist() == expected["prompt_ids"].to_pylist()
    assert set(found["iterate"].to_pylist()) == {2}
    assert found.schema.names == ["prompt_id", "iterate", "prompt_ids", "answer_ids", "text", "finish", "seed"]
    for answer in found.to_pylist():
        ids = answer["answer_ids"]
        assert ids.count(END) == (answer["finish"] == "stop")
        assert ids[-1] == END if answer["finish"] == "stop" else len(ids) == 12
        assert answer["text"] == house.renderer.decode(ids)
    assert len(set(found["finish"].to_pylist())) == 2
    lengths = [len(ids) for ids in found["answer_ids"].to_pylist()]
    metrics = manifest["metrics"]
    assert metrics["prompts"] == 13
    assert metrics["tokens"] == sum(lengths)
    assert metrics["mean_length"] == pytest.approx(sum(lengths) / 13)
    assert metrics["truncated"] == found["finish"].to_pylist().count("length") / 13
    assert metrics["empty"] == found["answer_ids"].to_pylist().count([END])
    assert metrics["startup_seconds"] > 0
    assert metrics["tokens_per_second"] > 0


def test_several_iterates_answer_their_own_drawn_prompts(house: House) -> None:
    job = house.job("mixed", iterates=[2, 1, 0])
    found = house.answers(run(job))
    names = found["prompt_id"].to_pylist()
    assert found["iterate"].to_pylist() == drawn_iterates(names, [1 / 3] * 3, round_number=3, seed=7)
    assert set(found["iterate"].to_pylist()) == {0, 1, 2}
    data = pq.read_table(house.root / "data" / "train.parquet")
    wanted = data["prompt_id"].take(round_prompts(PROMPTS, 13, 3, "fresh", 7)).to_pylist()
    assert sorted(names) == sorted(wanted)
    # Near greedily, each answer is that of its own policy alone and of no other.
    cold = house.answers(run(house.job("cold", iterates=[2, 1, 0], temperature=1e-4)))
    alone = {n: house.answers(run(house.job(f"alone-{n}", iterates=[n], round_number=n + 1, temperature=1e-4,
                                            shard_size=50))) for n in range(3)}  # fmt: skip
    by_policy = {n: dict(zip(t["prompt_id"].to_pylist(), t["answer_ids"].to_pylist(), strict=True))
                 for n, t in alone.items()}  # fmt: skip
    compared = 0
    for answer in cold.to_pylist():
        own = by_policy[answer["iterate"]].get(answer["prompt_id"])
        if own is not None:
            assert answer["answer_ids"] == own
            compared += 1
    assert compared >= 5


def test_held_out_rows_are_all_answered_by_the_policy(house: House) -> None:
    found = house.answers(run(house.job("heldout", iterates=[1], kind="heldout", shard_size=2)))
    assert found["prompt_id"].to_pylist() == [f"heldout-{i:04d}" for i in range(HELDOUT)]
    assert set(found["iterate"].to_pylist()) == {1}


@pytest.mark.parametrize("finished", [1, 3])
def test_a_killed_stage_goes_on_from_its_shards(
    house: House, monkeypatch: pytest.MonkeyPatch, finished: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = house.answers(run(house.job("whole", iterates=[2, 1])))
    with monkeypatch.context() as patch:
        stop_after(patch, finished)
        with pytest.raises(KeyboardInterrupt):
            run(house.job("killed", iterates=[2, 1]))
    assert objects.read_manifest(house.store, "generate-killed") is None
    before = parts_bytes(house.store, "generate-killed")
    assert len(before) == finished
    capsys.readouterr()
    manifest = run(house.job("killed", iterates=[2, 1], writer="e2-b"))
    after = parts_bytes(house.store, "generate-killed")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(manifest["files"]) > finished
    assert house.answers(manifest).equals(whole)  # no row lost or doubled; hf on CPU repeats, whoever draws
    assert manifest["metrics"]["prompts"] == 13
    output = capsys.readouterr().out
    assert f"{finished} of {len(after)} shards were committed before" in output
    assert "13/13 prompts (100 %)" in output


def test_nothing_is_loaded_when_only_the_manifest_is_missing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(generate, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(house.job("late", iterates=[2]))
    no_engine(monkeypatch)
    manifest = ensure_generations(house.job("late", iterates=[2], writer="e2-b"))
    assert manifest["metrics"]["prompts"] == 13
    assert ensure_generations(house.job("late", iterates=[2], writer="e3-c")) == manifest


def test_another_sampler_than_the_policys_own_is_said(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    run(house.job("neutral", iterates=[2]))
    assert "is not the iterate" not in capsys.readouterr().out
    run(house.job("sharp", iterates=[2], top_p=0.9))
    assert "temperature 1, top_p 0.9, top_k 0; neutral is 1, 1, 0): the opponent q_t is not" in capsys.readouterr().out


def test_a_prompt_without_room_ends_the_stage_before_anything_is_committed(house: House) -> None:
    file = house.root / "iterate-2" / "policy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 48}))
    house._publish("policy-9", house.root / "iterate-2")
    job = house.job("long", iterates=[2], max_new_tokens=32)
    job = replace(job, inputs=job.inputs | {"policies": {"2": "policy-9"}})
    with pytest.raises(
        BadInput, match=r"prompt train-\d+: found 1\d tokens plus max_new_tokens 32; expected at most 48"
    ):
        run(job)
    assert objects.list_parts(house.store, "generate-long") == {}


def test_an_iterate_without_a_policy_is_refused(house: House) -> None:
    job = house.job("gap", iterates=[2, 1, 0])
    with pytest.raises(BadInput, match=r"no policy for iterates \[1\]"):
        run(replace(job, inputs=job.inputs | {"policies": {"0": "policy-0", "2": "policy-2"}}))


def test_a_child_process_answers_one_iterate_and_its_errors_arrive(house: House) -> None:
    job = house.job("child", iterates=[2, 1])
    generate._in_process(replace(job, extra=job.extra | {"iterate": 1}))
    assert objects.read_manifest(house.store, job.object_id) is None
    own = [pq.read_table(house.store.local_path(part["files"][0]["key"]))  # type: ignore[arg-type]
           for part in objects.list_parts(house.store, job.object_id).values()]  # fmt: skip
    assert set(pa.concat_tables(own)["iterate"].to_pylist()) == {1}
    assert house.answers(run(job)).equals(house.answers(run(house.job("whole", iterates=[2, 1]))))
    with pytest.raises(BadInput, match=r"^generate job of round 3: found no policy for iterates \[2\]"):
        generate._in_process(
            replace(house.job("bad", iterates=[2, 1]), inputs=job.inputs | {"policies": {"1": "policy-1"}})
        )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_answers_in_processes_of_their_own(house: House) -> None:
    """Two iterates, so two vLLMs one after the other; each draws what its own policy makes most likely."""
    cold = {"iterates": [2, 1], "temperature": 0.01}
    expected = house.answers(run(house.job("hf", **cold)))
    found = house.answers(ensure_generations(house.job("vllm", engine="vllm", **cold)))
    drawn = ["answer_ids", "text", "finish"]
    assert found.drop_columns(drawn).equals(expected.drop_columns(drawn))
    models = [LlamaForCausalLM.from_pretrained(house.root / f"iterate-{n}" / "policy").eval() for n in range(3)]
    for answer in found.to_pylist():
        own, other = models[answer["iterate"]], models[0]
        # At temperature 0.01 a token 0.2 below the best has odds of e^-20.
        assert shortfall(own, answer["prompt_ids"], answer["answer_ids"]) < 0.2
        assert shortfall(other, answer["prompt_ids"], answer["answer_ids"]) > 0.2


@torch.no_grad()
def shortfall(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    """How far the worst token of an answer is below the best one of its place (logits)."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())
