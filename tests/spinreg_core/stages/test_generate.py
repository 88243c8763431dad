"""The generate stage: who answers what, what is committed when, and that a killed stage goes on where it was."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM

from spinreg_core.errors import BadInput, StageFailed
from spinreg_core.generation import worker as answer_stage
from spinreg_core.generation import worker_process as engine_process
from spinreg_core.generation.shards import SHARD_SCHEMA, Rows, Source, drawn_sources, round_prompts
from spinreg_core.models import loading
from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runtime.child import run_in_process
from spinreg_core.runtime.progress import parse
from spinreg_core.stages import generate
from spinreg_core.stages.generate import run
from spinreg_core.store.base import Store
from tests.support.generation_fixtures import END, HELDOUT, LOADS, PROMPTS, House, by_answer, drawn


def parts_bytes(store: Store, object_id: str) -> dict[str, tuple[bytes | None, bytes | None]]:
    """Name -> (part file, shard file), as they lie in the store."""
    return {
        name: (store.read(f"objects/{object_id}/parts/{name}.json"), store.read(part.files[0].key))
        for name, part in objects.usable_parts(store, object_id).items()
    }


def assert_equal(found: pa.Table, expected: pa.Table) -> None:
    """The same answers; their log-probabilities but for how sums are rounded in another batch."""
    assert found.drop_columns(["logprobs"]).equals(expected.drop_columns(["logprobs"]))
    for a, b in zip(found["logprobs"].to_pylist(), expected["logprobs"].to_pylist(), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Every further commit dies before it happens, as a kill would."""
    real, left = answer_stage.commit_part, [shards]

    def commit(*arguments: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(answer_stage, "commit_part", commit)


def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(answer_stage, "open_engine", refuse)


def test_generate_by_one_iterate_answers_the_rounds_prompts(house: House) -> None:
    job = house.job("plain", iterates=[1], round_number=2, max_new_tokens=31)
    manifest = run(job)
    assert manifest == objects.read_manifest(house.store, job.object_id)
    found = house.answers(manifest)
    data = pq.read_table(house.root / "data" / "train.parquet")
    expected = data.take(sorted(round_prompts(PROMPTS, 13, 2, "fresh", 7)))
    assert found["prompt_id"].to_pylist() == expected["prompt_id"].to_pylist()
    assert found["prompt_ids"].to_pylist() == expected["prompt_ids"].to_pylist()
    assert set(found["iterate"].to_pylist()) == {1}
    assert found.schema.equals(SHARD_SCHEMA)
    settings = json.loads(found.schema.metadata[b"spinreg"])
    assert settings["mixture"] is None
    assert settings["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 31,
                                    "stop_ids": [END]}  # fmt: skip
    assert set(found["policy"].to_pylist()) == {"policy-1"}
    assert len(set(found["seed"].to_pylist())) == 13
    model = LlamaForCausalLM.from_pretrained(house.root / "iterate-1" / "policy").eval()
    for answer in found.to_pylist():
        ids = answer["answer_ids"]
        assert ids.count(END) == (answer["finish"] == "stop")
        assert ids[-1] == END if answer["finish"] == "stop" else len(ids) == 31
        assert answer["text"] == house.renderer.decode(ids)
        assert answer["logprobs"] == pytest.approx(token_logprobs(model, answer["prompt_ids"], ids), abs=1e-4)
    assert len(set(found["finish"].to_pylist())) == 2
    lengths = [len(ids) for ids in found["answer_ids"].to_pylist()]
    metrics = manifest.metrics
    assert metrics["prompts"] == 13
    assert metrics["tokens"] == sum(lengths)
    assert metrics["mean_length"] == pytest.approx(sum(lengths) / 13)
    assert metrics["truncated"] == found["finish"].to_pylist().count("length") / 13
    assert metrics["empty"] == sum(not text.strip() for text in found["text"].to_pylist())
    assert metrics["invalid_text"] == sum("\ufffd" in text for text in found["text"].to_pylist()) > 0
    assert metrics["geometric"] == 0
    assert metrics["startup_seconds"] > 0
    assert metrics["tokens_per_second"] > 0


def test_generate_by_several_iterates_answers_drawn_prompts(house: House) -> None:
    job = house.job("mixed", iterates=[2, 1, 0])
    found = house.answers(run(job))
    names = found["prompt_id"].to_pylist()
    drawn, _, _ = drawn_sources(names, 1, [1 / 3] * 3, geometric_share=0, replay_share=0, round_number=3, seed=7)
    assert found["iterate"].to_pylist() == drawn[:, 0].tolist()
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


def test_generate_of_heldout_rows_answers_all_of_them(house: House) -> None:
    found = house.answers(run(house.job("heldout", iterates=[1], kind="heldout", shard_size=2)))
    assert found["prompt_id"].to_pylist() == [f"heldout-{i:04d}" for i in range(HELDOUT)]
    assert set(found["iterate"].to_pylist()) == {1}


@pytest.mark.parametrize("finished", [1, 3])
def test_generate_after_a_kill_continues_from_its_shards(
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
    assert len(after) == len(manifest.files) > finished
    assert_equal(house.answers(manifest), whole)  # no row lost or doubled
    assert manifest.metrics["prompts"] == 13
    output = capsys.readouterr().out
    assert f"{finished} of {len(after)} shards were committed before" in output
    assert "13/13 answers (100 %)" in output
    lines = [line for line in map(parse, output.splitlines()) if line is not None]
    assert lines[0].text.endswith(f"; shards: {finished} of {len(after)} committed")
    assert lines[-1].text.endswith(f"; shards: {len(after)} of {len(after)} committed")


def test_generate_with_a_damaged_part_answers_its_shard_again(house: House) -> None:
    """Alone; before, every start of the stage ended in Damaged."""
    job = house.job("cut", iterates=[2])
    expected = house.answers(run(job))
    before = parts_bytes(house.store, job.object_id)
    house.store.delete(objects.manifest_key(job.object_id))  # killed before it was published
    name = sorted(before)[0]
    house.store.write(objects.part_key(job.object_id, name), (before[name][0] or b"")[:50])
    assert_equal(house.answers(run(replace(job, writer="e2-b"))), expected)
    after = parts_bytes(house.store, job.object_id)
    assert {other for other in before if after[other][0] != before[other][0]} == {name}


def test_generate_with_all_shards_there_loads_no_model(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(generate, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(house.job("late", iterates=[2]))
    no_engine(monkeypatch)
    manifest = run(house.job("late", iterates=[2], writer="e2-b"))
    assert manifest.metrics["prompts"] == 13
    assert run(house.job("late", iterates=[2], writer="e3-c")) == manifest


def test_generate_with_a_modified_sampler_says_so(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    run(house.job("neutral", iterates=[2]))
    assert "is not the iterate" not in capsys.readouterr().out
    run(house.job("sharp", iterates=[2], top_p=0.9))
    assert "temperature 1, top_p 0.9, top_k 0; neutral is 1, 1, 0): the opponent q_t is not" in capsys.readouterr().out


def test_generate_with_a_prompt_without_room_commits_nothing(house: House) -> None:
    file = house.root / "iterate-2" / "policy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 48}))
    house._publish("policy-9", house.root / "iterate-2")
    job = house.job("long", iterates=[2], max_new_tokens=32)
    job = replace(job, inputs=job.inputs | {"policies": {"2": "policy-9"}})
    with pytest.raises(BadInput, match=r"prompt train-\d+ has 1\d tokens plus max_new_tokens 32; expected at most 48"):
        run(job)
    assert objects.usable_parts(house.store, "generate-long") == {}


def test_generate_without_a_policy_of_an_iterate_is_refused(house: House) -> None:
    job = house.job("gap", iterates=[2, 1, 0])
    with pytest.raises(BadInput, match=r"no policy for iterates \[1\]"):
        run(replace(job, inputs=job.inputs | {"policies": {"0": "policy-0", "2": "policy-2"}}))


def test_generate_in_a_child_process_makes_the_same_or_raises(house: House) -> None:
    whole = house.answers(run(house.job("whole", iterates=[2, 1])))
    run_in_process(house.job("child", iterates=[2, 1]), "spinreg_core.stages.generate")
    found = objects.require_manifest(house.store, "generate-child")
    assert_equal(house.answers(found), whole)
    job = house.job("bad", iterates=[2, 1])
    bad = replace(job, inputs=job.inputs | {"policies": {"1": "policy-1"}})
    with pytest.raises(BadInput, match=r"^generate job of round 3: found no policy for iterates \[2\]"):
        run_in_process(bad, "spinreg_core.stages.generate")


@pytest.mark.long
def test_generate_answers_do_not_depend_on_shards_or_engines(house: House) -> None:
    """Engine hf on a CPU; two engines are two processes that take shards from one list."""
    wanted = {"iterates": [2, 1], "answers_per_prompt": 2}
    whole = drawn(by_answer(house.answers(run(house.job("whole", **wanted)))))
    assert len(whole) == 26
    for name, size, tokens, processes in (("large", 50, 5000, 1), ("small", 1, 1, 1), ("two", 3, 200, 2)):
        resources = {"kv_cache_tokens": tokens, "processes": processes}
        found = run(house.job(name, **wanted, shard_size=size, resources=resources))
        assert drawn(by_answer(house.answers(found))) == whole
        assert found.metrics["prompts"] == 26


def test_generate_of_several_answers_draws_each_on_its_own(house: House) -> None:
    found = by_answer(house.answers(run(house.job("several", iterates=[2, 1, 0], answers_per_prompt=3))))
    names = {name for name, _ in found}
    assert len(names) == 13
    assert set(found) == {(name, k) for name in names for k in range(3)}
    assert any(len({found[name, k]["iterate"] for k in range(3)}) > 1 for name in names)
    texts = [{tuple(found[name, k]["answer_ids"]) for k in range(3)} for name in names]
    assert sum(len(t) == 3 for t in texts) > 8
    single = by_answer(house.answers(run(house.job("single", iterates=[2, 1, 0]))))
    assert drawn(single) == {key: value for key, value in drawn(found).items() if key[1] == 0}


def test_generate_with_a_share_of_mixtures_samples_from_them(house: House) -> None:
    alpha = 0.3
    job = house.job("mixed", iterates=[2, 1], answers_per_prompt=2, geometric={"share": 0.5, "alpha": alpha})
    manifest = run(job)
    rows = by_answer(house.answers(manifest)).values()
    assert 5 < sum(row["geometric"] for row in rows) < 21
    assert manifest.metrics["geometric"] == sum(row["geometric"] for row in rows) / 26
    models = [LlamaForCausalLM.from_pretrained(house.root / f"iterate-{n}" / "policy").eval() for n in range(3)]
    for row in rows:
        own = token_table(models[row["iterate"]], row["prompt_ids"], row["answer_ids"])
        if row["geometric"]:
            base = token_table(models[0], row["prompt_ids"], row["answer_ids"])
            own = (alpha * own + (1 - alpha) * base).log_softmax(-1)
        expected = own[range(len(row["answer_ids"])), row["answer_ids"]].tolist()
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
    settings = [json.loads(pq.read_schema(house.store.local_path(e.key)).metadata[b"spinreg"])["mixture"]  # type: ignore[arg-type]
                for e in manifest.files]  # fmt: skip
    assert {"policies": ["policy-2", "policy-0"], "weights": [alpha, 1 - alpha]} in settings
    assert None in settings


def apart(house: House, job: Job) -> dict[str, str]:
    """Return the draws of an engine for each source alone, by shard."""
    rows = Rows(fetch.fetch_file(house.store, "data", "train.parquet"))
    shards, _ = answer_stage.planned(job, rows)
    found: dict[str, str] = {}
    for source in sorted({shard.source for shard in shards}):
        own = [shard for shard in shards if shard.source == source]
        answer_stage.answer_shards(
            replace(job, object_id="generate-apart", workdir=house._workdir()), house.store, rows, [source], [own],
            on_answer=lambda n: None, on_commit=lambda number, meta: found.update({shards[number].name: meta["drawn"]}),
        )  # fmt: skip
    return found


BOTH = {"share": 0.5, "alpha": 0.3}  # plain answers, and such of the mixture


@pytest.mark.parametrize(
    ("iterates", "expected"), [([2, 1, 0], [0, 1, 2]), pytest.param([2, 1], [1, 0, 2], marks=pytest.mark.long)]
)
def test_generate_loads_each_policy_once(
    house: House, monkeypatch: pytest.MonkeyPatch, iterates: list[int], expected: list[int]
) -> None:
    """However many sources it takes part in, and with no more than one other in memory."""
    job = house.job("once", iterates=iterates, answers_per_prompt=2, geometric=BOTH)
    alone = apart(house, job)
    load, models, loaded = loading.load_policy, list[weakref.ref[Any]](), list[str]()

    def noted(folder: Path, *more: Any) -> Any:
        gc.collect()
        assert sum(model() is not None for model in models) < 2, loaded
        loaded.append(folder.parts[folder.parts.index("objects") + 1])
        model = load(folder, *more)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_policy", noted)
    run(job)
    assert loaded == [f"policy-{n}" for n in expected]
    gc.collect()
    assert not [model for model in models if model() is not None]
    metas = {name: part.meta for name, part in objects.usable_parts(house.store, job.object_id).items()}
    assert {name: meta["drawn"] for name, meta in metas.items()} == alone
    begun = [(m["iterate"], m["geometric"]) for m in metas.values() if m["startup_seconds"] > 0]
    assert sorted(begun) == sorted({(m["iterate"], m["geometric"]) for m in metas.values()})
    assert len(begun) == 2 * len(iterates) - (0 in iterates)


@pytest.mark.long
def test_generate_with_two_engines_loads_each_policy_once_each(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"iterates": [2, 1], "answers_per_prompt": 2, "geometric": BOTH, "shard_size": 2}
    alone = apart(house, house.job("alone", **settings))
    script = tmp_path / "noting.py"
    script.write_text(
        LOADS.format(root=str(house.root)) + "from spinreg_core.generation.worker import main, run\nmain(run)\n"
    )
    monkeypatch.setattr(engine_process, "COMMAND", [sys.executable, "-u", str(script)])
    run(house.job("two", **settings, resources={"processes": 2}))
    assert {n: p.meta["drawn"] for n, p in objects.usable_parts(house.store, "generate-two").items()} == alone
    loads = house.loads()
    assert len(loads) == 2, "four sources, and no process but the two engines"
    assert all(len(set(own)) == len(own) for own in loads.values()), loads
    assert set().union(*loads.values()) == {"policy-0", "policy-1", "policy-2"}


def test_generate_with_vllm_gives_mixtures_to_one_hf_engine(house: House) -> None:
    job = house.job("both", engine="vllm", iterates=[2, 1], answers_per_prompt=2, geometric=BOTH)
    rows = Rows(fetch.fetch_file(house.store, "data", "train.parquet"))
    shards, _ = answer_stage.planned(job, rows)
    lists = generate._lists(job, shards)
    assert sorted(shard.number for own in lists for shard in own) == list(range(len(shards)))
    assert [sorted({shard.source for shard in own}) for own in lists] == [
        [Source(1, False)], [Source(2, False)], [Source(1, True), Source(2, True)],
    ]  # fmt: skip


KILLER = """
import os, sys
from spinreg_core.generation.hf import HfEngine
from spinreg_core.generation import worker
original = HfEngine._decode
def dies(self, prompts, seeds, sampling, note):
    flag = {flag!r}
    if {always} or not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), 9)
    return original(self, prompts, seeds, sampling, note)
HfEngine._decode = dies
worker.main(worker.run)
"""


def deadly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, always: bool) -> None:
    """Engine processes that are killed in the middle of their first wave: the first of them, or all."""
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(flag=str(tmp_path / "flag"), always=always))
    monkeypatch.setattr(engine_process, "COMMAND", [sys.executable, "-u", str(script)])


@pytest.mark.long
def test_generate_with_a_dead_engine_reassigns_its_shards(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = drawn(by_answer(house.answers(run(house.job("whole", iterates=[2])))))
    deadly(monkeypatch, tmp_path, always=False)
    found = run(house.job("dies", iterates=[2], resources={"processes": 2}))
    assert drawn(by_answer(house.answers(found))) == whole
    output = capsys.readouterr().out
    assert "an engine ended with status -9; its 1 open shards go back to the list" in output
    assert "13/13 answers (100 %)" in output


AFTER_COMMIT = """
import os
from spinreg_core.generation import worker
commit = worker.commit_part
def dies(*arguments):
    part = commit(*arguments)
    flag = {flag!r}
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), 9)
    return part
worker.commit_part = dies
worker.main(worker.run)
"""


@pytest.mark.long
def test_generate_keeps_unreported_shards_of_a_dead_engine(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not answered again, and its bytes are not written over."""
    script = tmp_path / "killer.py"
    script.write_text(AFTER_COMMIT.format(flag=str(tmp_path / "flag")))
    monkeypatch.setattr(engine_process, "COMMAND", [sys.executable, "-u", str(script)])
    manifest = run(house.job("quiet", iterates=[2], resources={"processes": 2}))
    assert (tmp_path / "flag").exists()
    parts = objects.usable_parts(house.store, "generate-quiet")
    writers = {part.files[0].key.split("/")[3] for part in parts.values()}
    assert len(writers) > 1, "every engine process writes below a name of its own"
    assert manifest.metrics["prompts"] == 13
    assert len(house.answers(manifest)) == 13  # every file has the hash that was committed
    data = list((house.root / "store" / "objects" / "generate-quiet" / "data").rglob("*.parquet"))
    assert len(data) == len(parts), "no shard was answered twice"


@pytest.mark.long
def test_generate_with_a_shard_that_kills_engines_names_it(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deadly(monkeypatch, tmp_path, always=True)
    with pytest.raises(StageFailed, match=r"3 engines died over shard-0000\d \(the last with status -9\)"):
        run(house.job("dies", iterates=[2], resources={"processes": 2}))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_generate_with_vllm_runs_an_engine_per_iterate(house: House) -> None:
    """Two iterates, so two vLLMs one after the other; each draws what its own policy makes most likely."""
    cold = {"iterates": [2, 1], "temperature": 0.01}
    expected = house.answers(run(house.job("hf", **cold)))
    found = house.answers(run(house.job("vllm", engine="vllm", **cold)))
    differ = ["answer_ids", "logprobs", "text", "finish"]
    assert found.drop_columns(differ).equals(expected.drop_columns(differ))
    models = [LlamaForCausalLM.from_pretrained(house.root / f"iterate-{n}" / "policy").eval() for n in range(3)]
    for answer in found.to_pylist():
        own, other = models[answer["iterate"]], models[0]
        # At temperature 0.01 a token 0.2 below the best has odds of e^-20.
        assert shortfall(own, answer["prompt_ids"], answer["answer_ids"]) < 0.2
        assert shortfall(other, answer["prompt_ids"], answer["answer_ids"]) > 0.2


@torch.no_grad()
def token_table(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[answer tokens, vocabulary] log-probabilities, from one plain forward pass."""
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def token_logprobs(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> list[float]:
    found: list[float] = token_table(model, prompt, answer)[range(len(answer)), answer].tolist()
    return found


@torch.no_grad()
def shortfall(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    """Return the largest distance of an answer's token from the best one of its place (logits)."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())


def test_generate_of_replayed_pairs_alone_commits_no_shard(house: House) -> None:
    """With few prompts, all may be drawn for earlier iterates; nothing is generated then."""
    job = house.job("replayed", iterates=[2, 1])
    job = replace(job, extra=job.extra | {"replay_share": 1.0, "weights": [1e-12, 1 - 1e-12]})
    manifest = run(job)
    assert manifest.metrics["replayed"] == {"1": 13}
    assert manifest.metrics["prompts"] == 0
    assert manifest.files == []
