"""Small tasks of lm-eval for an include path, and a store with a tiny policy to evaluate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from spinreg_core.benchmarks import lm_eval
from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import validate
from spinreg_core.models.source import link_policy, resolve_model
from spinreg_core.runs.head import Head
from spinreg_core.runs.job import Job
from spinreg_core.runs.objects import fingerprint, publish
from spinreg_core.runs.plans import StagePlan
from spinreg_core.store.base import Store
from spinreg_core.store.cache import cache_folder
from tests.support.builders import make_head

COLOURS = ["red", "green", "blue", "black"]


def write_tasks(folder: Path) -> Path:
    """Write the task files and their data to a folder.

    `colours`: four choices, with a split of examples. `letters`: one-token choices. `sums`: free text, with two
    filters. `broken`: fails when it judges an answer. `gone`: its data is missing. The group `all_choices` has the
    first two, with equal weights of questions; the group `fair` has them with equal weights of subtasks.
    """
    folder.mkdir(parents=True)

    def rows(name: str, made: list[dict[str, Any]]) -> str:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        return str(folder / f"{name}.jsonl")

    def task(name: str, **fields: Any) -> None:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "dataset_path": "json"} | fields))

    def colour(i: int) -> dict[str, Any]:
        return {"question": f"What is the colour of thing {i * 7 % 11}?", "choices": COLOURS, "answer": i * 5 % 4}

    def metrics(*names: str) -> list[dict[str, Any]]:
        return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]

    colours = {"train": rows("colours-train", [colour(i) for i in range(20, 30)]),
               "test": rows("colours-test", [colour(i) for i in range(12)])}  # fmt: skip
    choices = {"doc_to_text": "{{question}}", "doc_to_target": "answer", "output_type": "multiple_choice",
               "dataset_kwargs": {"data_files": colours}, "test_split": "test", "training_split": "train"}  # fmt: skip
    task("colours", **choices, doc_to_choice="choices", metric_list=metrics("acc", "acc_norm"))
    task("letters", **choices, doc_to_choice=["A", "B", "C", "D"], metric_list=metrics("acc"))
    sums = rows("sums", [{"question": f"{i} + {i + 1} =", "answer": str(2 * i + 1)} for i in range(6)])
    written = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "output_type": "generate_until",
               "dataset_kwargs": {"data_files": {"test": sums}}, "test_split": "test",
               "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}}  # fmt: skip
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("strict", r"= (\d+)$"), ("any-letter", r"([a-z])"))
    ]
    task("sums", **written, filter_list=filters, metric_list=metrics("exact_match"))
    (folder / "judging.py").write_text("def fail(doc, results):\n    raise RuntimeError('this cannot be judged')\n")
    task("broken", **written, metric_list=metrics("acc"))
    with open(folder / "broken.yaml", "a") as file:
        file.write("process_results: !function judging.fail\n")
    task("gone", **written | {"dataset_kwargs": {"data_files": {"test": str(folder / "gone.jsonl")}}})
    for name, weighed in (("all_choices", True), ("fair", False)):
        group = {"group": name, "task": ["colours", "letters"],
                 "aggregate_metric_list": [{"metric": "acc", "weight_by_size": weighed}]}  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return folder


def configuration(store: Store, include: Path, tasks: list[str], **fields: Any) -> RunConfig:
    benchmarks = {"tasks": tasks, "include_path": str(include), "limit": 6, "backend": "hf"}
    return validate(
        {
            "model": "random:tiny", "store": store.url, "training": {"precision": "fp32"},
            "resources": {"device": "cpu"} | fields.pop("resources", {}),
            "benchmarks": benchmarks | fields.pop("benchmarks", {}),
        }
        | fields
    )  # fmt: skip


def publish_policy(store: Store, folder: Path) -> Head:
    """Publish the tiny policy as the base of a run; returns the run's head."""
    link_policy(resolve_model("random:tiny", cache_folder()), folder / "out" / "policy")
    key = {"model": "tiny"}
    job = Job("base", fingerprint("base", key), key, store.url, "e1-a", 0, {}, RunConfig(), folder)
    return make_head(run="toy", base=publish(store, job, folder / "out", metrics={}).object_id, stages={})


def jobs_of(config: RunConfig, head: dict[str, Any], folder: Path) -> list[Job]:
    def job(plan: StagePlan) -> Job:
        return replace(plan.job(config, config.store, "e1-b", folder), workdir=folder / plan.object_id)

    return [job(plan) for plan in lm_eval.plans(config, head, 0)]
