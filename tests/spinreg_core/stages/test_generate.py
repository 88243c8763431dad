"""The generate stage: who answers what, what is committed when, and that a killed stage goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
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
from spinreg_core.errors import BadInput, StageFailed
from spinreg_core.render import Renderer
from spinreg_core.shards import SHARD_SCHEMA, drawn_sources
from spinreg_core.stages import answer as answer_stage
from spinreg_core.stages import engine_process, generate, orders
from spinreg_core.stages.generate import ensure_generations, run
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
            writer: str = "e1-a", geometric: dict[str, float] | None = None, resources: dict[str, Any] | None = None,
            **generation: Any) -> Job:  # fmt: skip
        """`iterates`, newest first, share the prompts equally."""
        config = RunConfig.model_validate(
            {
                "store": self.store.url,
                "seed": 7,
                "data": {"prompts_per_round": 13, "max_prompt_tokens": 64, "max_length": 96},
                "resources": {"device": "cpu", "kv_cache_tokens": 150} | (resources or {}),
                "generation": {"dtype": "float32", "max_new_tokens": 12, "shard_size": 4} | generation,
            }
        )
        extra: dict[str, Any] = {"rows": kind}
        if kind == "train":
            extra["weights"] = [1 / len(iterates)] * len(iterates)
        policies = {str(n): f"policy-{n}" for n in iterates}
        if geometric:
            extra["geometric"] = geometric
            policies["0"] = "policy-0"
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


def assert_equal(found: pa.Table, expected: pa.Table) -> None:
    """The same answers; their log-probabilities but for how sums are rounded in another batch."""
    assert found.drop_columns(["logprobs"]).equals(expected.drop_columns(["logprobs"]))
    for a, b in zip(found["logprobs"].to_pylist(), expected["logprobs"].to_pylist(), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Every further commit dies before it happens, as a kill would."""
    real, left = answer_stage.commit_part, [shards]

    def commit(*arguments: Any) -> dict[str, Any]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(answer_stage, "commit_part", commit)


def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(answer_stage, "open_engine", refuse)


def test_a_round_by_one_iterate(house: House) -> None:
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
    metrics = manifest["metrics"]
    assert metrics["prompts"] == 13
    assert metrics["tokens"] == sum(lengths)
    assert metrics["mean_length"] == pytest.approx(sum(lengths) / 13)
    assert metrics["truncated"] == found["finish"].to_pylist().count("length") / 13
    assert metrics["empty"] == found["answer_ids"].to_pylist().count([END])
    assert metrics["invalid_text"] == sum("\ufffd" in text for text in found["text"].to_pylist()) > 0
    assert metrics["geometric"] == 0
    assert metrics["startup_seconds"] > 0
    assert metrics["tokens_per_second"] > 0


def test_several_iterates_answer_their_own_drawn_prompts(house: House) -> None:
    job = house.job("mixed", iterates=[2, 1, 0])
    found = house.answers(run(job))
    names = found["prompt_id"].to_pylist()
    drawn, _ = drawn_sources(names, 1, [1 / 3] * 3, geometric_share=0, round_number=3, seed=7)
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
    assert_equal(house.answers(manifest), whole)  # no row lost or doubled
    assert manifest["metrics"]["prompts"] == 13
    output = capsys.readouterr().out
    assert f"{finished} of {len(after)} shards were committed before" in output
    assert "13/13 answers (100 %)" in output


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


def test_a_child_process_makes_the_same_and_its_errors_arrive(house: House) -> None:
    whole = house.answers(run(house.job("whole", iterates=[2, 1])))
    generate._in_process(house.job("child", iterates=[2, 1]))
    found = objects.require_manifest(house.store, "generate-child")
    assert_equal(house.answers(found), whole)
    job = house.job("bad", iterates=[2, 1])
    with pytest.raises(BadInput, match=r"^generate job of round 3: found no policy for iterates \[2\]"):
        generate._in_process(replace(job, inputs=job.inputs | {"policies": {"1": "policy-1"}}))


def by_answer(table: pa.Table) -> dict[tuple[str, int], dict[str, Any]]:
    rows = {(row["prompt_id"], row["answer"]): row for row in table.to_pylist()}
    assert len(rows) == len(table)
    return rows


def drawn(rows: dict[tuple[str, int], dict[str, Any]]) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {key: (row["iterate"], row["geometric"], row["answer_ids"], row["seed"]) for key, row in rows.items()}


def test_answers_do_not_depend_on_shards_memory_or_the_number_of_engines(house: House) -> None:
    """Engine hf on a CPU; two engines are two processes that take shards from one list."""
    wanted = {"iterates": [2, 1], "answers_per_prompt": 2}
    whole = drawn(by_answer(house.answers(run(house.job("whole", **wanted)))))
    assert len(whole) == 26
    for name, size, tokens, processes in (("large", 50, 5000, 1), ("small", 1, 1, 1), ("two", 3, 200, 2)):
        resources = {"kv_cache_tokens": tokens, "processes": processes}
        found = run(house.job(name, **wanted, shard_size=size, resources=resources))
        assert drawn(by_answer(house.answers(found))) == whole
        assert found["metrics"]["prompts"] == 26


def test_several_answers_to_a_prompt_are_drawn_on_their_own(house: House) -> None:
    found = by_answer(house.answers(run(house.job("several", iterates=[2, 1, 0], answers_per_prompt=3))))
    names = {name for name, _ in found}
    assert len(names) == 13
    assert set(found) == {(name, k) for name in names for k in range(3)}
    assert any(len({found[name, k]["iterate"] for k in range(3)}) > 1 for name in names)
    texts = [{tuple(found[name, k]["answer_ids"]) for k in range(3)} for name in names]
    assert sum(len(t) == 3 for t in texts) > 8
    single = by_answer(house.answers(run(house.job("single", iterates=[2, 1, 0]))))
    assert drawn(single) == {key: value for key, value in drawn(found).items() if key[1] == 0}


def test_a_share_of_the_answers_comes_from_the_mixture_with_the_base(house: House) -> None:
    alpha = 0.3
    job = house.job("mixed", iterates=[2, 1], answers_per_prompt=2, geometric={"share": 0.5, "alpha": alpha})
    manifest = run(job)
    rows = by_answer(house.answers(manifest)).values()
    assert 5 < sum(row["geometric"] for row in rows) < 21
    assert manifest["metrics"]["geometric"] == sum(row["geometric"] for row in rows) / 26
    models = [LlamaForCausalLM.from_pretrained(house.root / f"iterate-{n}" / "policy").eval() for n in range(3)]
    for row in rows:
        own = token_table(models[row["iterate"]], row["prompt_ids"], row["answer_ids"])
        if row["geometric"]:
            base = token_table(models[0], row["prompt_ids"], row["answer_ids"])
            own = (alpha * own + (1 - alpha) * base).log_softmax(-1)
        expected = own[range(len(row["answer_ids"])), row["answer_ids"]].tolist()
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
    settings = [json.loads(pq.read_schema(house.store.local_path(e["key"])).metadata[b"spinreg"])["mixture"]  # type: ignore[arg-type]
                for e in manifest["files"]]  # fmt: skip
    assert {"policies": ["policy-2", "policy-0"], "weights": [alpha, 1 - alpha]} in settings
    assert None in settings


KILLER = """
import os, sys
from spinreg_core.engines.hf import HfEngine
from spinreg_core.stages import answer
original = HfEngine._decode
def dies(self, prompts, seeds, sampling, note):
    flag = {flag!r}
    if {always} or not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), 9)
    return original(self, prompts, seeds, sampling, note)
HfEngine._decode = dies
answer.main(answer.run)
"""


def deadly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, always: bool) -> None:
    """Engine processes that are killed in the middle of their first wave: the first of them, or all."""
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(flag=str(tmp_path / "flag"), always=always))
    monkeypatch.setattr(engine_process, "COMMAND", [sys.executable, "-u", str(script)])


def test_a_dead_engines_shards_go_back_to_the_list(
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
from spinreg_core.stages import answer
commit = answer.commit_part
def dies(*arguments):
    part = commit(*arguments)
    flag = {flag!r}
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), 9)
    return part
answer.commit_part = dies
answer.main(answer.run)
"""


def test_what_a_dead_engine_committed_but_did_not_tell_of_is_kept(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not answered again, and its bytes are not written over."""
    script = tmp_path / "killer.py"
    script.write_text(AFTER_COMMIT.format(flag=str(tmp_path / "flag")))
    monkeypatch.setattr(engine_process, "COMMAND", [sys.executable, "-u", str(script)])
    manifest = run(house.job("quiet", iterates=[2], resources={"processes": 2}))
    assert (tmp_path / "flag").exists()
    parts = objects.list_parts(house.store, "generate-quiet")
    writers = {part["files"][0]["key"].split("/")[3] for part in parts.values()}
    assert len(writers) > 1, "every engine process writes below a name of its own"
    assert manifest["metrics"]["prompts"] == 13
    assert len(house.answers(manifest)) == 13  # every file has the hash that was committed
    data = list((house.root / "store" / "objects" / "generate-quiet" / "data").rglob("*.parquet"))
    assert len(data) == len(parts), "no shard was answered twice"


def test_a_shard_that_kills_every_engine_is_named(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deadly(monkeypatch, tmp_path, always=True)
    with pytest.raises(StageFailed, match=r"3 engines died over shard-0000\d \(the last with status -9\)"):
        run(house.job("dies", iterates=[2], resources={"processes": 2}))


AFTER_OTHERS = """
import os, sys, time
from spinreg_core import objects
from spinreg_core.engines.hf import HfEngine
from spinreg_core.stages import answer
from spinreg_core.store import open_store
original = HfEngine._decode
def waits(self, *arguments):
    parts = lambda: objects.part_names(open_store({store!r}), {object_id!r})
    while not parts():
        time.sleep(0.1)
    return original(self, *arguments)
HfEngine._decode = waits
answer.main(answer.run)
"""


def two_machines(house: House, monkeypatch: pytest.MonkeyPatch, name: str, **settings: Any) -> Job:
    """A job of two machines, of which this one answers nothing before the other has committed a shard."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = house.job(name, resources={"nodes": 2, "rendezvous": f"localhost:{port}"}, **settings)
    script = house.root / f"{name}.py"
    script.write_text(AFTER_OTHERS.format(store=house.store.url, object_id=job.object_id))
    monkeypatch.setattr(engine_process, "COMMAND", [sys.executable, "-u", str(script)])
    return job


def test_another_machine_takes_shards(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes with nothing in common but the store and the rendezvous; two sources, so two attempts."""
    settings: dict[str, Any] = {"iterates": [2, 1]}
    whole = drawn(by_answer(house.answers(run(house.job("whole", **settings)))))
    job = two_machines(house, monkeypatch, "shared", shard_size=1, **settings)
    with subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "join", job.config.run, "--store", job.store],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3]), "PYTHONUNBUFFERED": "1"},
    ) as second:  # fmt: skip
        try:
            found = run(job)
            time.sleep(3)  # the other machine hears that all is over
        finally:
            os.killpg(second.pid, signal.SIGKILL)
        assert second.stdout is not None
        heard = second.stdout.read()
    assert drawn(by_answer(house.answers(found))) == whole
    assert re.search(r"an engine of \S+ \(127\.0\.0\.1|::1\) takes part", capsys.readouterr().out)
    writers = {part["writer"] for part in objects.list_parts(house.store, job.object_id).values()}
    assert {w for w in writers if socket.gethostname() in w}, writers
    assert len(writers) > 1, "both machines answered"
    assert "taking part in generate of round 3" in heard
    assert "Traceback" not in heard, heard
    assert orders.read_order(house.store, job.config.run) == {"attempt": None}


class Guest(threading.Thread):
    """Speaks to the machine of the flow as an engine elsewhere does, and leaves in the middle of its first wave."""

    def __init__(self, job: Job, store: Store) -> None:
        super().__init__(daemon=True)
        self.job, self.store = job, store
        self.waves: list[list[int]] = []
        self.refused = False

    def run(self) -> None:
        while not (order := orders.read_order(self.store, self.job.config.run)) or not order["attempt"]:
            time.sleep(0.05)
        address = ("localhost", int(self.job.config.resources.rendezvous.rpartition(":")[2]))  # type: ignore[union-attr]
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"x" * 512)
            self.refused = stranger.recv(1) == b""
        while len(self.waves) < 2:
            with socket.create_connection(address) as line, line.makefile() as lines:
                line.sendall(f"{order['attempt']} guest".encode().ljust(512))
                if lines.readline() != "begin\n" or not (wave := lines.readline()):
                    return
                self.waves.append(json.loads(wave))
                line.sendall(b"answered 1\n")
        commit_last_shard(self.job, self.store)


def commit_last_shard(job: Job, store: Store) -> None:
    """What the engines of this machine wait for."""
    rows = generate.Rows(objects.fetch_file(store, "data", "train.parquet"))
    shard = answer_stage.planned(job, rows)[-1]
    answer_stage.answer_shards(replace(job, writer="by-hand"), store, rows, shard.source, [[shard]],
                               on_answer=lambda n: None, on_commit=lambda number, meta: None)  # fmt: skip


def test_shards_of_a_machine_that_is_lost_go_back_to_the_list(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = drawn(by_answer(house.answers(run(house.job("whole", iterates=[2])))))
    job = two_machines(house, monkeypatch, "lost", iterates=[2], shard_size=2)
    guest = Guest(job, house.store)
    guest.start()
    found = run(job)
    guest.join(timeout=10)
    assert guest.refused, "who does not know the attempt is not let in"
    first, second = guest.waves
    assert first[0] not in second, "what an engine elsewhere died over is done here"
    assert drawn(by_answer(house.answers(found))) == whole
    output = capsys.readouterr().out
    assert re.search(r"an engine of guest \(\S+\) was lost; its \d open shards go back to the list", output)
    assert "13/13 answers (100 %)" in output


def test_a_taken_rendezvous_is_said(house: House) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = house.job("taken", iterates=[2], resources={"nodes": 2, "rendezvous": f"localhost:{port}"})
        with pytest.raises(StageFailed, match=rf"resources.rendezvous: cannot listen at port {port} for the engines"):
            run(job)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_answers_in_processes_of_their_own(house: House) -> None:
    """Two iterates, so two vLLMs one after the other; each draws what its own policy makes most likely."""
    cold = {"iterates": [2, 1], "temperature": 0.01}
    expected = house.answers(run(house.job("hf", **cold)))
    found = house.answers(ensure_generations(house.job("vllm", engine="vllm", **cold)))
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
    """How far the worst token of an answer is below the best one of its place (logits)."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())
