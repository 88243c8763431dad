"""Configurations that cannot be used, files without one, and malformed parameters."""

from __future__ import annotations

import os
from typing import Any

from spinreg_core.benchmarks.judge_agreement import load_votes
from spinreg_core.benchmarks.registry import require_benchmark_files
from spinreg_core.config.resolve import LARGEST_FILE, assignments, load_config_file, resolve
from spinreg_core.input_limits import LARGEST_QUESTIONS
from spinreg_core.store.open import open_store
from tests.bad_input.cases import Case, Place, table

CASES: list[Case] = []
case = table(CASES, "start")

FILES: dict[str, tuple[str, str | bytes]] = {
    "a file of more than a megabyte": ("run.yaml", b"#" * (LARGEST_FILE + 1)),
    "a file that is not UTF-8": ("run.yaml", "run: dömö".encode("latin-1")),
    "YAML that does not parse": ("run.yaml", "objective: {alpha: 0.5"),
    "JSON that does not parse": ("run.json", '{"objective": {"alpha": 0.5'),
    "YAML that names a Python object": ("run.yaml", "run: !!python/object/apply:os.getcwd []"),
    "a list": ("run.yaml", "- alpha\n- beta\n"),
    "a sentence": ("run.yaml", "please align my model"),
    "a field given twice in YAML": ("run.yaml", "objective:\n  beta: 0.1\n  alpha: 0.5\n  beta: 5.0\n"),
    "a field given twice in JSON": ("run.json", '{"rounds": 1, "rounds": 3}'),
    "YAML nested a thousand deep": ("run.yaml", "[" * 1000),
    "JSON nested a hundred thousand deep": ("run.json", "[" * 100_000),
    "a number as the name of a field": ("run.yaml", "1: 2\n"),
    "YAML that repeats itself to billions of words": (
        "run.yaml",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    ),
}

VALUES: dict[str, dict[str, Any]] = {
    "a field that does not exist": {"objective": {"lambda": 0.1}},
    "a group that does not exist": {"optimizer": {"learning_rate": 1e-6}},
    "a value in place of a group": {"objective": 0.5},
    "a number out of its range": {"objective": {"alpha": 1.5}},
    "a word in place of a number": {"objective": {"beta": "a lot"}},
    "NaN in place of a number": {"objective": {"alpha": float("nan")}},
    "an infinite time": {"resources": {"lease_seconds": float("inf")}},
    "a boolean in place of a number": {"keep": {"policies": True}},
    "booleans in place of names": {"data": {"mixed_datasets": True, "evaluation_sets": False}},
    "a number in place of names": {"data": {"evaluation_sets": 3}},
    "a signed address": {"dataset": "s3://bucket/rows.jsonl?X-Amz-Signature=0123456789abcdef"},
    "a data set on the web": {"dataset": "https://example.org/rows.jsonl"},
    "a key in a judge's address": {"judge": {"base_url": "https://example.org/v1?api-key=0123456789abcdef"}},
    "a value outside of the choices": {"objective": {"link": "sigmoid"}},
    "an empty schedule": {"training": {"learning_rate": []}},
    "several wrong fields at once": {"seed": -1, "training": {"epochs": 0, "optimizer": "sgd"}},
    "a run name that leaves its folder": {"run": "../other"},
    "rounds and until_round": {"rounds": 2, "until_round": 3},
    "several machines without a rendezvous": {"resources": {"nodes": 2}},
    "a port that does not exist": {"resources": {"nodes": 2, "rendezvous": "trainer:70000"}},
    "answers longer than the rows": {"generation": {"max_new_tokens": 600}},
    "prompts that leave no room for an answer": {"data": {"max_length": 512}},
    "more weights than history": {"opponent": {"history": 2, "weighting": [0.5, 0.3, 0.2]}},
    "weights without the newest iterate": {"opponent": {"weighting": [0.0, 1.0]}},
    "a share of replay with the source replay": {"opponent": {"replay_share": 0.5}},
    "reference iterate with a geometric opponent": {
        "objective": {"reference": "iterate"},
        "opponent": {"geometric_share": 0.5},
    },
    "reference iterate with an averaged opponent only": {
        "objective": {"reference": "iterate"},
        "training": {"average": "ema", "average_as": ["opponent"]},
    },
    "opponent.max_pairs with source regenerate": {"opponent": {"source": "regenerate", "max_pairs": 64}},
    "only one of two column names": {"data": {"prompt_column": "question"}},
    "column names with a format that has its own": {
        "data": {"prompt_column": "q", "response_column": "a", "format": "messages"}
    },
    "a number of records with a part of a split": {"data": {"max_records": 10, "split": "train[:5%]"}},
    "an argument of the template that spinreg sets": {"data": {"template_arguments": {"tokenize": True}}},
    "a broken regular expression": {"data": {"drop_patterns": ["(unclosed"]}},
    "LoRA's scale without LoRA": {"training": {"lora_alpha": 32}},
    "LoRA published in bfloat16": {"training": {"lora_rank": 8, "save_dtype": "bfloat16"}},
    "LoRA with averages of policies": {"training": {"lora_rank": 8, "average": "ema"}},
    "settings of averages without averages": {"training": {"average_weight": 0.9}},
    "MT-Bench without a judge": {"benchmarks": {"mt_bench": "hub"}},
    "a win rate without the judge's name": {"benchmarks": {"win_rate": ["base"]}, "judge": {"base_url": "http://h/v1"}},
    "a budget of money without prices": {"judge": {"max_cost": 5.0}},
    "reference answers without questions": {"benchmarks": {"mt_bench_references": "gpt-4.jsonl"}},
    "a tracker that spinreg does not know": {"tracking": {"to": ["neptune"]}},
    "a tracker twice": {"tracking": {"to": ["mlflow", "mlflow"]}},
    "an address as TensorBoard's folder": {"tracking": {"folder": "s3://bucket/tensorboard"}},
    "a password in the judge's address": {"judge": {"base_url": "https://user:secret@example.org/v1"}},
    "a password in the store's address": {"store": "s3://user:secret@bucket/runs"},
    "a data set's address with a password": {"dataset": "https://user:secret@example.org/rows.jsonl"},
}


for what, (name, content) in FILES.items():
    case(f"configuration file: {what}")(
        lambda place, name=name, content=content: resolve({}, place.write(name, content))
    )
for what, values in VALUES.items():
    case(what)(lambda place, values=values: resolve(values))


QUESTION = '{"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."]}\n'
JUDGED: dict[str, tuple[str, str]] = {  # the file, by the field it is given to
    "missing questions of MT-Bench": ("mt_bench", ""),
    "a question of MT-Bench without turns": ("mt_bench", QUESTION.replace("turns", "turn")),
    "a question of MT-Bench with one turn": ("mt_bench", QUESTION.replace(', "Shorter."', "")),
    "a question of a category that MT-Bench lacks": ("mt_bench", QUESTION.replace("writing", "cooking")),
    "a question of MT-Bench twice": ("mt_bench", QUESTION * 2),
    "questions of MT-Bench that are not JSON": ("mt_bench", "Write a poem.\n"),
    "a reference answer to no question": (
        "mt_bench_references",
        '{"question_id": 7, "choices": [{"turns": ["a", "b"]}]}\n',
    ),
    "a reference answer without its second turn": (
        "mt_bench_references",
        '{"question_id": 81, "choices": [{"turns": ["a"]}]}\n',
    ),
    "judge's prompts without a placeholder": ("prompts", "single-v1: {prompt_template: 'Rate {answer}'}"),
    "judge's prompts with one of them missing": ("prompts", "pair-v2: {prompt_template: x}"),
    "judge's prompts that are a list": ("prompts", "- single-v1"),
}


def judged(place: Place, field: str, content: str) -> object:
    """Check the files, as a flow does before it takes the lease."""
    files = {"mt_bench": place.write("question.jsonl", QUESTION)}
    name = "prompts.yaml" if field == "prompts" else f"{field}.jsonl"
    files[field] = place.write(name, content) if content else str(place.folder / "nowhere.jsonl")
    judge = {"base_url": "http://127.0.0.1:8000/v1", "model": "judge"}
    if field == "prompts":
        judge["prompts"] = files.pop("prompts")
    return require_benchmark_files(resolve({"benchmarks": files, "judge": judge}))


for what, (name, content) in JUDGED.items():
    case(what)(lambda place, name=name, content=content: judged(place, name, content))


@case("configuration file: missing")
def _(place: Place) -> object:
    place.patch.chdir(place.folder)
    return load_config_file("nowhere.yaml")


@case("configuration file: a folder")
def _(place: Place) -> object:
    return load_config_file(str(place.folder))


@case("configuration file: an address of an unknown kind")
def _(place: Place) -> object:
    return load_config_file("nfs://server/run.yaml")


@case("a parameter without a value")
def _(place: Place) -> object:
    return assignments(["objective.alpha"])


@case("a parameter without a name")
def _(place: Place) -> object:
    return resolve(assignments(["=1"]))


@case("a field of a group that was given as a value")
def _(place: Place) -> object:
    return assignments(["objective=1", "objective.alpha=1"])


@case("a store of an unknown kind")
def _(place: Place) -> object:
    return open_store("gs://bucket/runs")


@case("a store in the folder of a user who does not exist")
def _(place: Place) -> object:
    return open_store("~no-such-user/runs")


@case("a store with a NUL in its name")
def _(place: Place) -> object:
    return open_store("runs\0").check()


@case("a store with a name that is too long")
def _(place: Place) -> object:
    return open_store(str(place.folder / ("x" * 300))).check()


@case("a pipe as a configuration file")
def _(place: Place) -> object:
    os.mkfifo(place.folder / "run.yaml")
    return load_config_file(f"file://{place.folder}/run.yaml")


@case("a pipe with prompts for the judge")
def _(place: Place) -> object:
    os.mkfifo(place.folder / "prompts.yaml")
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "prompts": str(place.folder / "prompts.yaml")}
    return require_benchmark_files(resolve({"benchmarks": {"win_rate": ["base"]}, "judge": judge}))


@case("a pipe with votes of the judge's agreement")
def _(place: Place) -> object:
    os.mkfifo(place.folder / "votes.jsonl")
    return load_votes(str(place.folder / "votes.jsonl"))


@case("a file of questions that is too large")
def _(place: Place) -> object:
    with open(place.folder / "questions.jsonl", "wb") as file:
        file.truncate(LARGEST_QUESTIONS + 1)
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    return require_benchmark_files(
        resolve({"benchmarks": {"mt_bench": str(place.folder / "questions.jsonl")}, "judge": judge})
    )
