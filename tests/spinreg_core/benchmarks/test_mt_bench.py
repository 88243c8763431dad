"""Two turns by a tiny policy, graded by a scripted judge; scores against hand-computed ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from spinreg_core.benchmarks import mt_bench, mt_bench_answers
from spinreg_core.benchmarks.mt_bench import scores
from spinreg_core.benchmarks.mt_bench_questions import Question, load_questions
from spinreg_core.benchmarks.registry import require_benchmark_files
from spinreg_core.config import BenchmarksConfig, RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.generation.open import open_engine
from spinreg_core.generation.shards import answer_seed
from spinreg_core.runs.fetch import fetch_file, fetch_files
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Part
from spinreg_core.runs.objects import manifest_key
from spinreg_core.store import documents
from tests.support.builders import make_head
from tests.support.generation_fixtures import House
from tests.support.judge_server import Does, JudgeServer, judge_server

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["a poem", "shorter"]},
    {"question_id": 2, "category": "math", "turns": ["1+1", "2+2"], "reference": ["a hint", "a hint"]},
    {"question_id": 3, "category": "coding", "turns": ["loop", "again"]},
    {"question_id": 4, "category": "stem", "turns": ["atoms", "why"]},
    {"question_id": 5, "category": "math", "turns": ["3*3", "4*4"]},
]
REFERENCES = [{"question_id": 2, "choices": [{"index": 0, "turns": ["it is two", "it is four"]}]}]
HEAD = make_head(base="policy-0", data="data", stages={1: {"train": "policy-1"}})


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(house: House, server: JudgeServer | None, **judge: Any) -> RunConfig:
    return RunConfig.model_validate({
        "store": house.store.url, "seed": 3, "evaluation": {"bootstrap": 200},
        "generation": {"engine": "hf", "dtype": "float32", "temperature": 5.0, "top_k": 1},  # no part of this
        "resources": {"device": "cpu", "kv_cache_tokens": 150},
        "benchmarks": {"mt_bench": lines(house.root / "question.jsonl", QUESTIONS), "mt_bench_max_tokens": 9,
                       "mt_bench_references": lines(house.root / "gpt-4.jsonl", REFERENCES)},
        "judge": {"base_url": server.url if server else "http://127.0.0.1:1/v1", "model": "judge"} | judge,
    })  # fmt: skip


def job_of(house: House, config: RunConfig, iterate: int = 1) -> Job:
    (plan,) = mt_bench.plans(config, HEAD, iterate)
    return plan.job(config, house.store.url, "e1-a", house._workdir())


def answers_of(house: House, job: Job) -> dict[tuple[str, int], dict[str, Any]]:
    paths = fetch_files(house.store, job.inputs["answers"], "answers").values()
    return {(row["question_id"], row["turn"]): row for path in paths for row in pq.read_table(path).to_pylist()}


def grade(body: dict[str, Any], _number: int) -> Does:
    """8 for a first turn, 4 for a second, 10 where a reference is shown, nothing for question 4's second turn."""
    said = "".join(message["content"] for message in body["messages"])
    if "atoms" in said and "why" in said:
        return Does("I cannot say")
    return Does(f"[[{10 if 'it is two' in said else 4 if 'conversation' in said else 8}]]")


def test_run_with_another_judge_keeps_the_policys_answers(house: House) -> None:
    with judge_server(grade) as server:
        job = job_of(house, config(house, server))
        manifest = mt_bench.run(job)
        answers = answers_of(house, job)
        assert len(answers) == 10
        policy = house.root / "iterate-1" / "policy"
        engine = open_engine("hf", [policy], job.config.generation, job.config.resources, pad_id=0)
        for (question_id, turn), row in answers.items():
            question = QUESTIONS[int(question_id) - 1]
            messages = [{"role": "user", "content": question["turns"][0]}]
            if turn == 2:
                messages += [{"role": "assistant", "content": answers[question_id, 1]["text"]},
                             {"role": "user", "content": question["turns"][1]}]  # fmt: skip
            assert row["prompt_ids"] == house.renderer.prompt_ids(messages)
            assert row["text"] == house.renderer.decode(row["answer_ids"])
            temperature = {"writing": 0.7, "stem": 0.1}.get(question["category"], 0.0)
            seed = answer_seed(seed=3, round_number=0, kind="mt-bench", prompt_id=question_id, answer=turn)
            assert (row["temperature"], row["seed"]) == (temperature, seed)
            sampling = mt_bench_answers.sampler(temperature, 9, house.renderer.stop_ids)
            if temperature == 0:  # whatever the seed
                sampling, seed = replace(sampling, temperature=0.3), 99
            (alone,) = engine.generate([row["prompt_ids"]], sampling, [seed])
            assert (alone.token_ids, alone.finish) == (row["answer_ids"], row["finish"])
        asked = len(server.bodies)
        other = job_of(house, config(house, server, temperature=0.5))
        assert other.object_id != job.object_id
        assert other.inputs["answers"] == job.inputs["answers"]
        house.store.delete(f"objects/policy-1/{manifest_key('policy-1').rpartition('/')[2]}")  # nobody answers anew
        again = mt_bench.run(other)
        assert again.metrics["score"] == manifest.metrics["score"]
        assert len(server.bodies) == 2 * asked


def test_run_grades_equal_hand_computation(house: House) -> None:
    with judge_server(grade) as server:
        job = job_of(house, config(house, server, tries=2, price_answer=1e6))
        manifest = mt_bench.run(job)
        assert len(server.bodies) == 11  # the malformed one twice
        answers = answers_of(house, job)
        for body in server.bodies:
            said = body["messages"][-1]["content"]
            question = next(q for q in QUESTIONS if q["turns"][0] in said)
            own, second = (
                [answers[str(question["question_id"]), turn]["text"] for turn in (1, 2)],
                "onversation" in said,
            )
            assert own[0] in said
            assert (own[1] in said) >= second
            assert (question["turns"][1] in said) == second
            reference = question["question_id"] == 2  # 5 has none, and hints are not shown
            assert ("it is two" in said) == reference
            assert ("it is four" in said) == (reference and second)
            assert "a hint" not in said
    results = json.loads(fetch_file(house.store, job.object_id, "results.json").read_bytes())
    values = {name: estimate["value"] for name, estimate in results["metrics"].items()}
    # Means of turns: 1: (8+4)/2, 2: 10, 3: (8+4)/2, 4: 8 alone, 5: (8+4)/2.
    truncated = sum(row["finish"] == "length" for row in answers.values()) / 10
    assert values == pytest.approx(
        {"score": 7.2, "score/turn_1": 8.4, "score/turn_2": 5.5, "score/writing": 6.0, "score/math": 8.0,
         "score/coding": 6.0, "score/stem": 8.0, "malformed": 0.1, "truncated": truncated}
    )  # fmt: skip
    assert {name: results["metrics"][name]["n"] for name in ("score", "score/turn_2", "malformed")} == {
        "score": 5, "score/turn_2": 4, "malformed": 10
    }  # fmt: skip
    assert results["metrics"]["malformed"]["low"] == 0.0, "over questions: without the fourth there is none"
    assert manifest.metrics["score"] == values["score"]
    assert (results["kind"], results["primary"], results["better"]) == ("mt-bench", "score", "higher")
    assert (results["cost"]["requests"], results["cost"]["answer_tokens"], results["cost"]["paid"]) == (11, 110, 110.0)
    assert results["cost"]["tokens"] == sum(len(row["answer_ids"]) for row in answers.values())
    assert results["settings"]["with_reference"] == 1
    assert results["fingerprints"].keys() == {"policy", "data", "prompts", "references", "answers"}
    items = pq.read_table(fetch_file(house.store, job.object_id, "items.parquet")).to_pylist()
    for name in ("score", "score/turn_1", "score/turn_2", "score/math"):
        own = [row["value"] for row in items if row["metric"] == name]
        assert np.mean(own) == pytest.approx(values[name])
    assert {row["item"] for row in items if row["metric"] == "score/turn_2"} == {"1", "2", "3", "5"}


def test_answers_after_a_kill_resume_to_the_same_rows(house: House) -> None:
    """Killed when two groups of six were committed, or with one whose document cannot be read: the rest is answered, to
    the same."""
    with judge_server(grade) as server:
        job = job_of(house, config(house, server))
        whole = mt_bench_answers.run(answers_job(house, job))
    paths = fetch_files(house.store, whole.object_id, "answers")
    before = {name: pq.read_table(path) for name, path in paths.items()}
    house.store.delete(manifest_key(whole.object_id))
    for name in ("1-0.7", "2-0", "2-0.1", "2-0.7"):
        part = documents.read(house.store, f"objects/{whole.object_id}/parts/{name}.json", Part)
        assert part is not None
        house.store.delete(f"objects/{whole.object_id}/parts/{name}.json")
    house.store.create(f"objects/{whole.object_id}/parts/2-0.7.json", b"torn")
    asked: list[int] = []

    class Counting:
        def __init__(self, *arguments: Any, **more: Any) -> None:
            self.engine = open_engine(*arguments, **more)

        def generate(self, prompts: Sequence[Any], *rest: Any) -> Any:
            asked.append(len(prompts))
            return self.engine.generate(prompts, *rest)

        def close(self) -> None:
            self.engine.close()

    again = mt_bench_answers.run(replace(answers_job(house, job), writer="e2-b"), open_engine=Counting)
    assert asked == [1, 3, 1, 1]
    assert {n: pq.read_table(p) for n, p in fetch_files(house.store, again.object_id, "answers").items()} == before


def answers_job(house: House, job: Job) -> Job:
    return replace(job, stage="mt-bench-answers", workdir=house._workdir(), **job.extra["answers"])


def test_plans_changed_field_changes_answers_or_only_grades(house: House) -> None:
    base = config(house, None)
    (plan,) = mt_bench.plans(base, HEAD, 1)
    only_grades: list[tuple[str, dict[str, Any]]] = [
        ("judge", {"model": "other"}),
        ("judge", {"tries": 1}),
        ("benchmarks", {"mt_bench_references": None}),
        ("evaluation", {"bootstrap": 300}),
    ]
    for group, fields in only_grades:
        own = getattr(base, group).model_copy(update=fields)
        (other,) = mt_bench.plans(base.model_copy(update={group: own}), HEAD, 1)
        assert (other.object_id == plan.object_id, other.inputs["answers"]) == (False, plan.inputs["answers"])
    for change in ({"seed": 4}, {"benchmarks": base.benchmarks.model_copy(update={"mt_bench_max_tokens": 8})}):
        assert mt_bench.plans(base.model_copy(update=change), HEAD, 1)[0].inputs["answers"] != plan.inputs["answers"]
    nothing: list[tuple[str, dict[str, Any]]] = [
        ("judge", {"max_cost": 1.0, "price_answer": 1.0, "at_once": 1, "max_requests": 3}),
        ("generation", {"temperature": 1.0}),
    ]
    for group, fields in nothing:
        own = getattr(base, group).model_copy(update=fields)
        assert mt_bench.plans(base.model_copy(update={group: own}), HEAD, 1)[0].object_id == plan.object_id
    assert mt_bench.plans(base, HEAD, 0)[0].inputs["answers"] != plan.inputs["answers"]
    lines(house.root / "question.jsonl", QUESTIONS[:4])
    assert mt_bench.plans(base, HEAD, 1)[0].inputs["answers"] != plan.inputs["answers"]


def test_run_without_grades_or_with_changed_files_is_bad_input(house: House) -> None:
    with judge_server(lambda _b, _n: Does("fine")) as server:
        job = job_of(house, config(house, server))
        with pytest.raises(BadInput, match=r"judge.model names 'judge', which gave no rating in 10 answers; use"):
            mt_bench.run(job)
        lines(house.root / "gpt-4.jsonl", [])
        with pytest.raises(BadInput, match="changed after this job was planned; start again"):
            mt_bench.run(job)
    lines(house.root / "question.jsonl", [QUESTIONS[0] | {"turns": ["an ode", "shorter"]}])
    with pytest.raises(BadInput, match="changed after this job was planned; start again"):
        mt_bench_answers.run(replace(answers_job(house, job)))


def test_answers_short_context_is_refused_before_sampling(house: House) -> None:
    def never(*_arguments: Any, **_more: Any) -> Any:
        raise AssertionError("an engine was opened")

    wanted = config(house, None)
    wanted = wanted.model_copy(update={"benchmarks": wanted.benchmarks.model_copy(update={"mt_bench_max_tokens": 40})})
    with pytest.raises(BadInput, match=r"mt_bench_max_tokens: found 40, twice, after the \d+ tokens of question 1; "
                       "expected at most 96 tokens in all"):  # fmt: skip
        mt_bench_answers.run(answers_job(house, job_of(house, wanted)), open_engine=never)


def test_scores_leave_out_ungraded_turns() -> None:
    questions = [Question(name, category, ("", ""), None) for name, category in (("a", "stem"), ("b", "stem"),
                                                                                  ("c", "math"))]  # fmt: skip
    grades = {("a", 1): 9.0, ("a", 2): 6.0, ("b", 1): None, ("b", 2): 3.0, ("c", 1): None, ("c", 2): None}
    metrics, items = scores(questions, grades, resamples=1000, seed=0)
    assert {name: (m["value"], m["n"]) for name, m in metrics.items()} == {
        "score": (5.25, 2), "score/turn_1": (9.0, 1), "score/turn_2": (4.5, 2), "score/stem": (5.25, 2)
    }  # fmt: skip
    assert ("a", "score", 7.5) in items
    assert ("b", "score", 3.0) in items
    assert len(items) == 2 + 1 + 2 + 2
    # Two questions: a resample is both, or one twice, so that the interval spans from one to the other.
    assert (metrics["score"]["low"], metrics["score"]["high"]) == (3.0, 7.5)
    assert metrics["score/turn_1"]["low"] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [QUESTIONS[0] | {"turns": ["one"]}],
            r"question.jsonl, line 1, turns: found \['one'\]; expected a list of two",
        ),
        ([{"question_id": 1, "category": "math"}], "line 1, turns: found None"),
        (
            [QUESTIONS[0], QUESTIONS[1] | {"category": "cooking"}],
            "line 2, category: found 'cooking'; expected one of wri",
        ),
        ([QUESTIONS[0], QUESTIONS[0]], "line 2, question_id: found 1; expected .* no other"),
        ([[1]], "line 1: found list; expected a JSON object"),
        ([], "found no question in"),
    ],
)
def test_load_questions_bad_file_is_bad_input(tmp_path: Path, rows: list[Any], message: str) -> None:
    benchmarks = {"mt_bench": lines(tmp_path / "question.jsonl", rows)}
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    with pytest.raises(BadInput, match=message):
        require_benchmark_files(RunConfig.model_validate({"benchmarks": benchmarks, "judge": judge}))


def test_load_questions_published_file_has_80_questions() -> None:
    folder = Path(__file__).parents[4] / "shared/data/mt_bench"
    folder = folder if folder.exists() else Path("/work/shared/data/mt_bench")
    if not folder.exists():
        pytest.skip("the published files are not here")
    benchmarks = BenchmarksConfig(
        mt_bench=str(folder / "question.jsonl"), mt_bench_references=str(folder / "reference_answer_gpt-4.jsonl")
    )
    found = load_questions(benchmarks)
    assert len(found) == 80
    assert sum(q.reference is not None for q in found) == 30


def test_load_questions_of_the_home_folder_with_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    row = {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8-sig")
    (question,) = load_questions(BenchmarksConfig(mt_bench="~/q.jsonl"))
    assert question.question_id == "1"
