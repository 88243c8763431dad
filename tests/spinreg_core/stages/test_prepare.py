"""The stage `prepare`: what it leaves in the store, what it shares, and what it refuses before what."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from spinreg_core.data.encode import ROWS_SCHEMA
from spinreg_core.data.inspect import inspect
from spinreg_core.errors import EXIT_BAD_INPUT, BadInput
from spinreg_core.models import source as model_source
from spinreg_core.models.chat_template import Renderer
from spinreg_core.runs.fetch import fetch_file, fetch_folder
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import read_manifest
from spinreg_core.stages import prepare
from spinreg_core.store.folder import FolderStore
from tests.support.builders import make_config, make_job
from tests.support.chat_models import TEMPLATES
from tests.support.files import write_jsonl

ROWS = [{"prompt": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(40)]


def job(tmp_path: Path, dataset: str, name: str = "work", **fields: Any) -> Job:
    data = {"heldout_rows": 8} | fields.pop("data", {})
    store = str(tmp_path / "store")
    config = make_config(model=fields.pop("model", "random:tiny"), dataset=dataset, store=store, data=data, **fields)
    workdir = tmp_path / name
    workdir.mkdir()
    return make_job("prepare", workdir, config=config, object_id="", store=store, writer="e1-test", round=0)


class Prepared(NamedTuple):
    """The manifest of the rows, and the id of the base."""

    data: Manifest
    base: str

    @property
    def object_id(self) -> str:
        return self.data.object_id

    @property
    def metrics(self) -> dict[str, Any]:
        return self.data.metrics


def run(work: Job) -> Prepared:
    return Prepared(prepare.run(work), json.loads((work.workdir / "result.json").read_text())["base"])


def table(store: FolderStore, data: str, part: str) -> Any:
    return pq.read_table(fetch_file(store, data, f"{part}.parquet"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
def test_prepare_with_quantized_base_publishes_float32(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS)
    plain = run(job(tmp_path, rows, "plain"))
    rounded = run(job(tmp_path, rows, "rounded", training={"lora_rank": 4, "lora_quantize": "4bit"}))
    assert plain.base != rounded.base
    store = FolderStore(tmp_path / "store")
    before, after = (fetch_folder(store, manifest.base, "policy") for manifest in (plain, rounded))
    assert {p.name for p in before.iterdir()} == {p.name for p in after.iterdir()}
    assert json.loads((after / "config.json").read_text())["dtype"] == "float32"
    weights, changed = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert {value.dtype for value in changed.values()} == {torch.float32}
    assert weights.keys() == changed.keys()
    assert not all(torch.equal(weights[name].float(), changed[name]) for name in weights)


def test_prepare_publishes_data_and_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(
        tmp_path, write_jsonl(tmp_path / "x.jsonl", [*ROWS, ROWS[0], {"prompt": "?"}]), data={"max_bad_share": 0.1}
    )
    manifest = run(work)
    store = FolderStore(tmp_path / "store")
    result = json.loads((work.workdir / "result.json").read_text())
    assert manifest.object_id == result["data"]
    assert manifest.base == result["base"]
    assert result["summary"] == manifest.metrics

    policy = fetch_folder(store, result["base"], "policy")
    renderer = Renderer.from_folder(policy)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in policy.iterdir()
    }
    assert not any(p.is_symlink() for p in policy.iterdir())

    train, heldout = table(store, result["data"], "train"), table(store, result["data"], "heldout")
    assert train.schema == heldout.schema == ROWS_SCHEMA
    assert (train.num_rows, heldout.num_rows) == (32, 8)
    assert not set(train["prompt_id"].to_pylist()) & set(heldout["prompt_id"].to_pylist())
    for row in train.to_pylist() + heldout.to_pylist():
        messages = json.loads(row["messages"])
        assert row["prompt_ids"] == renderer.prompt_ids(messages)
        assert row["answer_ids"] == renderer.answer_ids(messages, row["answer"])
        assert row["final_answer"] == row["answer"].rsplit(" ", 1)[1]

    (bad,) = json.loads(fetch_file(store, result["data"], "rejected.json").read_text())
    assert (bad["part"], bad["row"], bad["reason"]) == ("train", 42, "missing_column")
    summary = json.loads(fetch_file(store, result["data"], "summary.json").read_text())
    assert summary["records"] == 42
    assert summary["exact_duplicates"] == 1
    assert summary["bad_rows"] == {"missing_column": 1}
    assert summary["final_answers"] == 8
    shown = capsys.readouterr().out
    assert "32 rows to train on, 8 held out" in shown
    assert "bad rows: 1 missing_column" in shown


def test_prepare_again_publishes_nothing_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_jsonl(tmp_path / "x.jsonl", ROWS)
    first = run(job(tmp_path, dataset))
    files = sorted(p for p in (tmp_path / "store").rglob("*") if p.is_file())
    again = run(job(tmp_path, dataset, "again"))
    assert (again.object_id, again.base) == (first.object_id, first.base)
    assert sorted(p for p in (tmp_path / "store").rglob("*") if p.is_file()) == files
    assert capsys.readouterr().out.count("in the store already") == 2


def test_data_id_follows_everything_that_changes_rows(tmp_path: Path) -> None:
    dataset = write_jsonl(tmp_path / "x.jsonl", ROWS)
    toy = model_source.resolve_model("random:tiny", prepare.cache_folder())
    other = shutil.copytree(toy, tmp_path / "other")
    (other / "chat_template.jinja").write_text("Be kind.\n" + (toy / "chat_template.jinja").read_text())
    made = {}
    for name, fields in {
        "same": {},
        "objective": {"objective": {"alpha": 0.1}, "data": {"prompts_per_round": 3, "max_bad_share": 0.5}},
        "seed": {"seed": 1},
        "heldout": {"data": {"heldout_rows": 9}},
        "limit": {"data": {"max_length": 700}},
        "final": {"evaluation": {"final_answer": "none"}},
        "split": {"data": {"split": "train[:30]"}},
        "template": {"model": str(other)},
    }.items():
        made[name] = run(job(tmp_path, dataset, name, **fields))
    assert made["objective"].object_id == made["same"].object_id
    assert len({m.object_id for m in made.values()}) == 7
    assert made.pop("template").base not in {m.base for m in made.values()}
    assert len({m.base for m in made.values()}) == 1


def test_data_id_moves_for_rows_that_earlier_objects_cut(tmp_path: Path) -> None:
    """Objects of 0.1.0 hold answers without the thoughts that the template cuts."""
    toy = model_source.resolve_model("random:tiny", prepare.cache_folder())
    cutting = shutil.copytree(toy, tmp_path / "cutting")
    template = (toy / "chat_template.jinja").read_text()
    changed = template.replace("m['content']", "m['content'].split('</think>')[-1]")
    assert changed != template
    (cutting / "chat_template.jinja").write_text(changed)
    thoughtful = [{"prompt": "What is it?", "answer": "<think>One.</think>\nIt is 1.\n#### 1"}]
    keys = {
        (rows is ROWS, model): prepare_key(tmp_path, write_jsonl(tmp_path / "x.jsonl", rows), model)
        for rows in (ROWS, ROWS + thoughtful)
        for model in (str(toy), str(cutting))
    }
    assert {place for place, key in keys.items() if "written" in key} == {(False, str(cutting))}


def prepare_key(tmp_path: Path, dataset: str, model: str) -> dict[str, Any]:
    work = job(tmp_path, dataset, f"key-{len(list(tmp_path.iterdir()))}", model=model, data={"max_bad_share": 0.5})
    return dict(run(work).data.key)


def test_prepare_says_that_it_uses_the_default_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = model_source.resolve_model("random:tiny", prepare.cache_folder())
    bare = shutil.copytree(toy, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    dataset = write_jsonl(tmp_path / "x.jsonl", ROWS)
    for model, said in ((toy, False), (bare, True)):
        run(job(tmp_path, dataset, f"of-{model.name}", model=str(model)))
        assert ("has no chat template" in capsys.readouterr().out) == said


def test_prepare_warns_of_text_before_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = model_source.resolve_model("random:tiny", prepare.cache_folder())
    other = shutil.copytree(toy, tmp_path / "other")
    (other / "chat_template.jinja").write_text(TEMPLATES["empty_thoughts"])
    dataset = write_jsonl(tmp_path / "x.jsonl", ROWS)
    run(job(tmp_path, dataset))
    assert "warning" not in capsys.readouterr().out
    run(job(tmp_path, dataset, "other-run", model=str(other)))
    warning = r"warning: the chat template writes '<think>\n\n</think>\n\n' before every answer"
    assert warning in capsys.readouterr().out
    config = make_config(model=str(other), dataset=dataset)
    assert warning in inspect(config)[0]


def test_prepare_counts_shortened_prompts(tmp_path: Path) -> None:
    def chat(i: int, turns: int) -> dict[str, Any]:
        said = [{"role": r, "content": f"{r} {i} " + "w" * 50} for _ in range(turns) for r in ("user", "assistant")]
        return {"messages": said}

    dataset = write_jsonl(tmp_path / "x.jsonl", [chat(i, 1 + 9 * (i < 3)) for i in range(20)])
    limits = {"max_prompt_tokens": 400, "long_prompts": "drop_oldest"}
    made = run(job(tmp_path, dataset, data=limits))
    assert made.metrics["shortened_prompts"] == 3
    config = make_config(model="random:tiny", dataset=dataset, data=limits)
    assert inspect(config)[1]["train"]["shortened_prompts"] == 3


def test_prepare_splits_by_the_messages_that_stay(tmp_path: Path) -> None:
    """A question alone and the same at the end of a long conversation are the same prompt once turns are dropped."""
    lost = [{"role": r, "content": "w" * 60} for _ in range(6) for r in ("user", "assistant")]
    asked = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]
        for i in range(30)
    ]
    rows = [{"messages": question} for question in asked] + [{"messages": lost + question} for question in asked]
    other = [{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": "Three."}]
    limits = {"max_prompt_tokens": 130, "long_prompts": "drop_oldest", "heldout_rows": 10}
    made = run(job(tmp_path, write_jsonl(tmp_path / "x.jsonl", [*rows, {"messages": lost + other}]), data=limits))
    store = FolderStore(tmp_path / "store")
    train, heldout = (table(store, made.object_id, part).to_pylist() for part in ("train", "heldout"))
    assert not {row["messages"] for row in train} & {row["messages"] for row in heldout}
    assert (len(train) + len(heldout), made.metrics["alike_when_shortened"]) == (31, 30)
    names = [row["prompt_id"] for row in train + heldout if "What is 3?" in row["messages"]]
    assert sorted(names) == [min(names), f"{min(names)}-2"]


def test_data_id_covers_the_filtered_rows(tmp_path: Path) -> None:
    """Two configurations that leave the same rows for different reasons."""
    dataset = write_jsonl(tmp_path / "x.jsonl", [*ROWS, {"prompt": "Long?", "answer": "long " * 50}])
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"prompt": "one two three four five six", "answer": "x"}])
    made = {}
    for name, data in {
        "length": {"max_answer_characters": 99}, "pattern": {"drop_patterns": ["^long"]},
        "guarded": {"max_answer_characters": 99, "evaluation_sets": [bench]},
    }.items():  # fmt: skip
        made[name] = run(job(tmp_path, dataset, name, data=data))
    assert made["length"].metrics["left_out"] == {"answer_too_long": 1}
    assert made["pattern"].metrics["left_out"] == {"pattern ^long": 1}
    assert made["guarded"].metrics["guarded"] == {bench: {"prompts": 1, "too_short": 0}}
    assert len({m.object_id for m in made.values()}) == 3


def test_prepare_with_heldout_data_drops_its_openings(tmp_path: Path) -> None:
    other = write_jsonl(
        tmp_path / "heldout.jsonl", [*ROWS[:10], *[{"prompt": f"New {i}?", "answer": "Yes."} for i in range(10)]]
    )
    dataset = write_jsonl(tmp_path / "x.jsonl", ROWS)
    made = run(job(tmp_path, dataset, data={"heldout_dataset": other, "heldout_rows": 15}))
    store = FolderStore(tmp_path / "store")
    train, heldout = table(store, made.object_id, "train"), table(store, made.object_id, "heldout")
    assert heldout.num_rows == 15
    dropped = made.metrics["train_rows_dropped_as_heldout"]
    assert dropped >= 5  # ten of the twenty are training prompts, and fifteen are taken
    assert train.num_rows == 40 - dropped
    assert not set(train["messages"].to_pylist()) & set(heldout["messages"].to_pylist())


def test_prepare_with_bad_rows_raises_before_any_model(tmp_path: Path) -> None:
    dataset = write_jsonl(tmp_path / "x.jsonl", [*ROWS, {"prompt": "x", "answer": ""}])
    with pytest.raises(BadInput, match=r"2\.4% bad rows \(1 of 41: 1 empty_answer\)"):
        run(job(tmp_path, dataset, model="./nowhere"))
    with pytest.raises(BadInput, match=r"no folder '\./nowhere'"):
        run(job(tmp_path, dataset, "lenient", model="./nowhere", data={"max_bad_share": 0.03}))


def test_prepare_with_long_prompts_raises_before_any_weights(tmp_path: Path) -> None:
    words = shutil.copytree(model_source.resolve_model("random:tiny", prepare.cache_folder()), tmp_path / "words")
    (words / "model.safetensors").unlink()
    dataset = write_jsonl(tmp_path / "x.jsonl", [*ROWS, {"prompt": "x" * 600, "answer": "a"}])
    with pytest.raises(BadInput, match="1 prompt_too_long"):
        run(job(tmp_path, dataset, model=str(words)))
    assert not (tmp_path / "store").exists()
    with pytest.raises(BadInput, match=r"has no model\.safetensors"):
        run(job(tmp_path, dataset, "lenient", model=str(words), data={"max_bad_share": 0.03}))


def test_prepare_with_rows_beyond_the_model_raises(tmp_path: Path) -> None:
    dataset = write_jsonl(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(BadInput, match="data\\.max_length is 4096; expected at most 2048"):
        run(job(tmp_path, dataset, data={"max_length": 4096}))


def test_prepare_without_final_answers_raises(tmp_path: Path) -> None:
    dataset = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"{i}?", "answer": "yes"} for i in range(20)])
    with pytest.raises(BadInput, match=r"evaluation\.final_answer"):
        run(job(tmp_path, dataset, evaluation={"final_answer": "gsm8k"}))


def test_prepare_cuts_and_counts_long_answers(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "Long?", "answer": "x" * 2000}]
    made = run(job(tmp_path, write_jsonl(tmp_path / "x.jsonl", rows)))
    assert made.metrics["truncated_answers"] == 1
    store = FolderStore(tmp_path / "store")
    both = [r for part in ("train", "heldout") for r in table(store, made.object_id, part).to_pylist()]
    (cut,) = [r for r in both if r["answer_truncated"]]
    end = Renderer.from_folder(fetch_folder(store, made.base, "policy")).end_of_turn
    assert end not in cut["answer_ids"]
    assert len(cut["prompt_ids"]) + len(cut["answer_ids"]) == 1024


@pytest.mark.slow
def test_prepare_as_a_process_reports_by_exit_status(tmp_path: Path) -> None:
    good = job(tmp_path, write_jsonl(tmp_path / "x.jsonl", ROWS))
    good.save(tmp_path / "good.json")
    bad = job(tmp_path, str(tmp_path / "nowhere.jsonl"), "bad")
    bad.save(tmp_path / "bad.json")
    ended = {
        name: subprocess.run(
            [sys.executable, "-m", "spinreg_core.stages.prepare", str(tmp_path / f"{name}.json")],
            capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for name in ("good", "bad")
    }  # fmt: skip
    assert ended["good"].returncode == 0, ended["good"].stdout + ended["good"].stderr
    result = json.loads((good.workdir / "result.json").read_text())
    assert read_manifest(FolderStore(tmp_path / "store"), result["data"]) is not None
    assert ended["bad"].returncode == EXIT_BAD_INPUT
    assert ended["bad"].stdout.strip().splitlines()[-1].startswith("bad input: dataset: found no file or folder")


def test_base_id_covers_the_model_files(tmp_path: Path) -> None:
    made = run(job(tmp_path, write_jsonl(tmp_path / "x.jsonl", ROWS)))
    base = read_manifest(FolderStore(tmp_path / "store"), made.base)
    assert base is not None
    toy = model_source.resolve_model("random:tiny", prepare.cache_folder())
    assert base.key == {"model": model_source.model_fingerprint(toy)}
    assert base.metrics["source"] == "random:tiny"
