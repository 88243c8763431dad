"""Keys of lm-eval's tasks, and errors that are found before lm-eval is loaded."""

from __future__ import annotations

import importlib.metadata
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.benchmarks import lm_eval
from spinreg_core.benchmarks.registry import parts_of, plan_benchmark
from spinreg_core.config import DataConfig, RunConfig
from spinreg_core.errors import BadInput
from tests.support.benchmark_data import write_tasks
from tests.support.builders import make_config, make_head

LOCAL = Path(__file__).resolve().parents[3] / "deployments/lm_eval_local"
HEAD = make_head(base="base-1", stages={1: {"train": "train-1"}})


def config(**benchmarks: Any) -> RunConfig:
    return make_config(benchmarks={"tasks": ["gsm8k"], "backend": "hf"} | benchmarks)


def ids(configuration: RunConfig, iterate: int = 0) -> list[str]:
    return [plan.object_id for plan in lm_eval.plans(configuration, HEAD, iterate)]


def test_plans_leaderboard_has_its_tasks_and_examples() -> None:
    plans = lm_eval.plans(config(tasks=["leaderboard", "ifeval"], limit={"mmlu": 3}, fewshot={"gsm8k": 8}), HEAD, 0)
    assert {plan.key["name"]: (plan.key["fewshot"], plan.key["limit"]) for plan in plans} == {
        "arc_challenge": (25, None), "hellaswag": (10, None), "mmlu": (5, 3), "truthfulqa_mc2": (0, None),
        "winogrande": (5, None), "gsm8k": (8, None), "ifeval": (None, None),
    }  # fmt: skip
    by_itself = lm_eval.plans(config(tasks=["arc_challenge"]), HEAD, 0)[0]
    assert by_itself.key["fewshot"] is None


def test_plans_added_task_keeps_other_objects() -> None:
    assert ids(config(tasks=["piqa", "gsm8k"]))[1:] == ids(config())


@pytest.mark.parametrize(
    "fields",
    [{"limit": 5}, {"fewshot": {"gsm8k": 3}}, {"questions_as": "chat"}, {"backend": "vllm"}],
)
def test_plans_result_settings_change_the_object(fields: dict[str, Any]) -> None:
    assert ids(config(**fields)) != ids(config())


def test_plans_precision_and_policy_change_the_object() -> None:
    other = config().model_copy(update={"training": RunConfig().training.model_copy(update={"precision": "bf16"})})
    assert ids(other) != ids(config())
    assert ids(config(), 1) != ids(config(), 0)


def test_plans_seed_and_batch_size_keep_the_object() -> None:
    """Runs of another seed share what their base was measured with."""
    assert ids(config().model_copy(update={"seed": 5})) == ids(config())
    assert ids(config(batch_size=2)) == ids(config())


def test_plans_include_path_counts_by_content(tmp_path: Path) -> None:
    one, two = write_tasks(tmp_path / "one"), tmp_path / "two"
    two.mkdir()
    for path in one.iterdir():
        (two / path.name).write_bytes(path.read_bytes())
    (two / "__pycache__").mkdir()
    (two / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert ids(config(include_path=str(one))) == ids(config(include_path=str(two)))
    (two / "judging.py").write_text("# another one")
    assert ids(config(include_path=str(one))) != ids(config(include_path=str(two)))


def test_plans_large_file_of_include_path_counts(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    (folder / "large.bin").write_bytes(b"a" * 2_000_000)
    before = ids(config(include_path=str(folder)))
    assert ids(config(include_path=str(folder))) == before
    (folder / "large.bin").write_bytes(b"a" * 1_999_999 + b"b")
    assert ids(config(include_path=str(folder))) != before


FILES = ["gsm8k/train.jsonl", "gsm8k/test.jsonl", "truthfulqa/mc_task.json", "ifeval/input_data.jsonl"]


def data(folder: Path) -> Path:
    for name in [*FILES, "training/rows.jsonl"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_plans_local_data_counts_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that the task files of deployments/lm_eval_local read, in any folder."""
    monkeypatch.delenv(lm_eval.DATA_VARIABLE, raising=False)
    local = config(include_path=str(LOCAL))
    nowhere = ids(local)
    found = []
    for name in ("one", "two"):
        monkeypatch.setenv(lm_eval.DATA_VARIABLE, str(data(tmp_path / name)))
        found.append((ids(local), lm_eval.plan_check(local)))
    assert found[0] == found[1]
    assert found[0][0] != nowhere
    (tmp_path / "two/training/rows.jsonl").write_text("other rows")
    assert ids(local) == found[0][0], "what no task reads"
    for name in FILES:
        (tmp_path / "two" / name).write_text("{ }")
        assert ids(local) not in [before for before, _ in found], name
        found.append((ids(local), None))
    assert f'VARIABLE = "{lm_eval.DATA_VARIABLE}"' in (LOCAL / "local.py").read_text()


def test_plans_data_named_by_path_counts_by_content(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    (folder / "sums.jsonl").rename(tmp_path / "sums.jsonl")
    text = (folder / "sums.yaml").read_text()
    (folder / "sums.yaml").write_text(text.replace(str(folder / "sums.jsonl"), str(tmp_path / "sums.jsonl")))
    before = ids(config(include_path=str(folder)))
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1 =", "answer": "3"}')
    assert ids(config(include_path=str(folder))) != before


def test_plan_check_on_another_machine_is_another_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one that shares the store may not have the data."""
    here = lm_eval.plan_check(config())
    assert here is not None
    assert lm_eval.plan_check(config()) == here
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    there = lm_eval.plan_check(config())
    assert there is not None
    assert there.object_id != here.object_id


def test_plans_template_arguments_count_only_for_chat() -> None:
    given = {"data": DataConfig(template_arguments={"enable_thinking": False})}
    for questions_as, same in (("plain", True), ("chat", False)):
        wanted = config(questions_as=questions_as)
        assert (ids(wanted.model_copy(update=given)) == ids(wanted)) is same


def test_parts_of_unwanted_round_is_empty() -> None:
    assert parts_of(config(rounds=[1]), HEAD, 0) == []
    assert len(parts_of(config(rounds=[1]), HEAD, 1)) == 1
    assert plan_benchmark(config(tasks=[]), HEAD, 0) is None
    assert lm_eval.plan_check(config(rounds=[])) is None
    assert lm_eval.plan_check(config(tasks=[])) is None


def test_plan_check_missing_package_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(BadInput, match=r"benchmarks.tasks needs lm-eval, which is not installed here; run `pip"):
        lm_eval.plan_check(config())
    with pytest.raises(BadInput, match=r"benchmarks.backend is vllm, which is not installed here; use hf"):
        lm_eval.plan_check(config(backend="vllm"))


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_plan_check_include_path_without_tasks_is_bad_input(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    if content:
        folder.mkdir()
        (folder / content).write_text("")
    with pytest.raises(BadInput, match=r"benchmarks.include_path: found no (folder|\*.yaml in the folder) .*tasks; "):
        lm_eval.plan_check(config(include_path=str(folder)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["leaderboard", "gsm8k"]}, "tasks lists an entry twice"),
        ({"fewshot": {"gms8k": 5}}, "fewshot names gms8k, which tasks does not"),
        ({"limit": {"mmlu": 5}}, "limit names mmlu, which tasks does not"),
    ],
)
def test_benchmarks_config_inconsistent_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        config(**fields)


def test_plan_benchmark_loads_nothing_heavy() -> None:
    import subprocess

    code = """
import sys
from spinreg_core.benchmarks import lm_eval
from spinreg_core.benchmarks.registry import plan_benchmark
from spinreg_core.config import RunConfig
from spinreg_core.runs.head import Head, Lease
head = Head(run="r", lease=Lease(epoch=1, holder=None, beat=0), advances=[], rounds=[], base="base-1")
config = RunConfig.model_validate({"benchmarks": {"tasks": ["leaderboard"]}})
assert lm_eval.plan_check(config) and plan_benchmark(config, head, 0)
print([name for name in ("torch", "transformers", "datasets", "lm_eval", "vllm") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
