"""Which objects tasks of lm-eval go into, and what is refused before lm-eval is loaded."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from questions import write_tasks

from spinreg_core.benchmarks import lm_eval, parts_of, plan_benchmark
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput

HEAD: dict[str, Any] = {"run": "r", "base": "base-1", "rounds": [{"round": 1, "stages": {"train": "train-1"}}]}


def config(**benchmarks: Any) -> RunConfig:
    return RunConfig.model_validate({"benchmarks": {"tasks": ["gsm8k"], "backend": "hf"} | benchmarks})


def ids(configuration: RunConfig, iterate: int = 0) -> list[str]:
    return [plan.object_id for plan in lm_eval.plans(configuration, HEAD, iterate)]


def test_the_leaderboard() -> None:
    plans = lm_eval.plans(config(tasks=["leaderboard", "ifeval"], limit={"mmlu": 3}, fewshot={"gsm8k": 8}), HEAD, 0)
    assert {plan.key["name"]: (plan.key["fewshot"], plan.key["limit"]) for plan in plans} == {
        "arc_challenge": (25, None), "hellaswag": (10, None), "mmlu": (5, 3), "truthfulqa_mc2": (0, None),
        "winogrande": (5, None), "gsm8k": (8, None), "ifeval": (None, None),
    }  # fmt: skip
    by_itself = lm_eval.plans(config(tasks=["arc_challenge"]), HEAD, 0)[0]
    assert by_itself.key["fewshot"] is None


def test_adding_a_task_leaves_the_others_where_they_are() -> None:
    assert ids(config(tasks=["piqa", "gsm8k"]))[1:] == ids(config())


@pytest.mark.parametrize(
    "fields",
    [{"limit": 5}, {"fewshot": {"gsm8k": 3}}, {"questions_as": "chat"}, {"backend": "vllm"}],
)
def test_what_can_change_a_number_changes_the_object(fields: dict[str, Any]) -> None:
    assert ids(config(**fields)) != ids(config())


def test_so_do_precision_and_policy() -> None:
    other = config().model_copy(update={"training": RunConfig().training.model_copy(update={"precision": "bf16"})})
    assert ids(other) != ids(config())
    assert ids(config(), 1) != ids(config(), 0)


def test_what_cannot_does_not() -> None:
    """Runs of another seed share what their base was measured with."""
    assert ids(config().model_copy(update={"seed": 5})) == ids(config())
    assert ids(config(batch_size=2)) == ids(config())


def test_the_include_path_counts_by_its_content(tmp_path: Path) -> None:
    one, two = write_tasks(tmp_path / "one"), tmp_path / "two"
    two.mkdir()
    for path in one.iterdir():
        (two / path.name).write_bytes(path.read_bytes())
    (two / "__pycache__").mkdir()
    (two / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert ids(config(include_path=str(one))) == ids(config(include_path=str(two)))
    (two / "judging.py").write_text("# another one")
    assert ids(config(include_path=str(one))) != ids(config(include_path=str(two)))


def test_only_the_rounds_that_are_asked_for() -> None:
    assert parts_of(config(rounds=[1]), HEAD, 0) == []
    assert len(parts_of(config(rounds=[1]), HEAD, 1)) == 1
    assert plan_benchmark(config(tasks=[]), HEAD, 0) is None
    assert lm_eval.plan_check(config(rounds=[])) is None
    assert lm_eval.plan_check(config(tasks=[])) is None


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(BadInput, match=r"benchmarks.tasks: found tasks of lm-eval, which is not installed here"):
        lm_eval.plan_check(config())
    with pytest.raises(BadInput, match=r"benchmarks.backend: found vllm, which is not installed here"):
        lm_eval.plan_check(config(backend="vllm"))


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_an_include_path_without_tasks(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    if content:
        folder.mkdir()
        (folder / content).write_text("")
    with pytest.raises(BadInput, match=r"benchmarks.include_path: found .*tasks: "):
        lm_eval.plan_check(config(include_path=str(folder)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["leaderboard", "gsm8k"]}, "tasks lists something twice"),
        ({"fewshot": {"gms8k": 5}}, "fewshot names gms8k, but tasks has gsm8k"),
        ({"limit": {"mmlu": 5}}, "limit names mmlu, but tasks has gsm8k"),
    ],
)
def test_fields_that_do_not_fit_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_planning_loads_nothing_heavy() -> None:
    import subprocess

    code = """
import sys
from spinreg_core.benchmarks import lm_eval, plan_benchmark
from spinreg_core.config import RunConfig
config = RunConfig.model_validate({"benchmarks": {"tasks": ["leaderboard"]}})
assert lm_eval.plan_check(config) and plan_benchmark(config, {"run": "r", "base": "base-1", "rounds": []}, 0)
print([name for name in ("torch", "transformers", "datasets", "lm_eval", "vllm") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
