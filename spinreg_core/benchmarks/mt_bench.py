"""MT-Bench (arXiv 2306.05685): questions of two turns, each answer graded 1 to 10 by a judge.

Decides: the keys of answers and grades, the prompt of each grade, and the metrics. Leaves out: the answers
(`mt_bench_answers`), asking the judge (`judge`), parsing a grade (`judge_prompts`).

The first turn is graded on its own, the second with the whole conversation. Questions of mathematics, reasoning and
coding with a reference answer are graded against it. A question without any grade is left out of the means. Intervals
are over questions: both turns of a question are drawn together. The metrics:

    score                         mean over questions of the mean of their turns
    score/turn_1, score/turn_2    the same for one turn
    score/CATEGORY                the same for one category
    malformed                     share of grades that no answer of the judge held
    truncated                     share of the policy's answers that were cut off at the length limit
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pyarrow.parquet as pq

from spinreg_core.benchmarks.judge import JudgeQuestion, ask_judge, settings_of, shown_settings
from spinreg_core.benchmarks.judge_client import Messages
from spinreg_core.benchmarks.judge_prompts import SINGLE, Prompts, load_prompts, parse_rating
from spinreg_core.benchmarks.mt_bench_questions import (
    TEMPERATURES,
    Question,
    content_hash,
    load_questions,
    references_hash,
)
from spinreg_core.benchmarks.results import BenchmarkResults, Item, write_part
from spinreg_core.config import RunConfig, resolve_engine, sampling_dtype
from spinreg_core.errors import BadInput, Damaged
from spinreg_core.evaluation.intervals import Estimate, bootstrap_mean, grouped_share
from spinreg_core.runs.fetch import fetch_files
from spinreg_core.runs.head import Head
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import publish, read_manifest, require_manifest, versions
from spinreg_core.runs.plans import StagePlan, policy_object
from spinreg_core.runtime.child import run_in_process
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store


def require_mt_bench_files(config: RunConfig) -> None:
    """Raise BadInput for questions, references or prompts that cannot be used. The hub is not asked yet."""
    if config.benchmarks.mt_bench is None:
        return
    load_prompts(config.judge, SINGLE)
    if config.benchmarks.mt_bench != "hub":
        load_questions(config.benchmarks)


def plans(config: RunConfig, head: Head, iterate: int) -> list[StagePlan]:
    """Return the part that grades iterate n's answers; its `extra` holds the job that answers.

    Raises BadInput as `require_mt_bench_files`.
    """
    benchmarks = config.benchmarks
    if benchmarks.mt_bench is None:
        return []
    of_hub = benchmarks.mt_bench == "hub"
    questions = [] if of_hub else load_questions(benchmarks)
    policy = policy_object(head, iterate)
    answers_key = {
        "questions": "hub" if of_hub else content_hash(questions),
        "policy": policy, "seed": config.seed, "max_tokens": benchmarks.mt_bench_max_tokens,
        "temperatures": TEMPERATURES, "template_arguments": config.data.template_arguments,
        # As configured: the meaning of auto differs between machines, and all of them should find the answers.
        "engine": config.generation.engine, "dtype": sampling_dtype(config),
    }  # fmt: skip
    answers = StagePlan("mt-bench-answers", iterate, answers_key, {"policy": policy}, {})
    key = {
        "answers": answers.object_id, "judge": settings_of(config.judge),
        "prompts": load_prompts(config.judge, SINGLE).sha256,
        "references": "hub" if of_hub else references_hash(questions),
        "seed": config.seed, "bootstrap": config.evaluation.bootstrap,
    }  # fmt: skip
    part = {"object_id": answers.object_id, "key": answers.key, "inputs": answers.inputs}
    inputs = {"policy": policy, "answers": answers.object_id}
    return [StagePlan("mt-bench", iterate, key, inputs, {"answers": part})]


def run(job: Job) -> Manifest:
    """Have the questions answered and the answers graded. Returns the manifest.

    Raises as `ask_judge`; BadInput where the judge gave no grade at all, or a file changed since the job was planned.
    """
    store, config = open_store(job.store), job.config
    prompts, questions = load_prompts(config.judge, SINGLE), load_questions(config.benchmarks)
    if job.key["prompts"] != prompts.sha256 or job.key["references"] not in (references_hash(questions), "hub"):
        raise BadInput("judge.prompts, benchmarks.mt_bench_references", "files that changed after this job was planned",
                       "start again to use the new files")  # fmt: skip
    answers = _answers(store, job)
    table = [row for path in fetch_files(store, answers.object_id, "answers").values()
             for row in pq.read_table(path, columns=["question_id", "turn", "text", "finish"]).to_pylist()]  # fmt: skip
    texts = {(row["question_id"], row["turn"]): row["text"] for row in table}
    wanted = [(q, turn) for q in questions for turn in (1, 2)]
    if texts.keys() != {(q.question_id, turn) for q, turn in wanted}:
        raise Damaged(f"{answers.object_id}: found answers to other questions; expected those of this benchmark")
    asked = [
        JudgeQuestion(f"question {q.question_id}, turn {turn}", graded_with(prompts, q, turn, texts))
        for q, turn in wanted
    ]
    found = ask_judge(
        store, config.judge, asked, partial(parse_rating, parsing=config.judge.parsing), payer=job.object_id
    )
    grades = {(q.question_id, turn): value for (q, turn), value in zip(wanted, found.values, strict=True)}
    if not any(value is not None for value in grades.values()):
        raise BadInput("judge.model", f"names {config.judge.model!r}, which gave no rating in {len(asked)} answers",
                       "use a judge that writes its rating as the prompt asks, such as [[7]]")  # fmt: skip
    resamples = config.evaluation.bootstrap
    metrics, items = scores(questions, grades, resamples=resamples, seed=config.seed)
    cut = {(row["question_id"], row["turn"]): row["finish"] == "length" for row in table}
    for name, of in (("malformed", {turn: grade is None for turn, grade in grades.items()}), ("truncated", cut)):
        both = [float(of[q.question_id, 1] + of[q.question_id, 2]) for q in questions]
        metrics[name] = grouped_share(both, [2.0] * len(questions), resamples=resamples, seed=config.seed)
    document: BenchmarkResults = {
        "kind": "mt-bench", "name": "mt-bench", "primary": "score", "better": "higher", "metrics": metrics,
        "settings": {
            "judge": shown_settings(config.judge), "questions": len(questions),
            "with_reference": sum(q.reference is not None for q in questions),
            "max_tokens": config.benchmarks.mt_bench_max_tokens, "temperatures": TEMPERATURES,
            "engine": answers.metrics["engine"], "bootstrap": resamples, "seed": config.seed,
        },
        "fingerprints": {
            "policy": job.inputs["policy"], "data": content_hash(questions), "prompts": prompts.sha256,
            "references": references_hash(questions), "answers": answers.object_id,
        },
        "versions": versions(),
        "cost": found.cost | {
            "seconds": round(found.cost["seconds"] + answers.seconds, 3), "tokens": answers.metrics["tokens"],
        },
    }  # fmt: skip
    folder = job.workdir / "out"
    flat = write_part(folder, document, items)
    return publish(store, job, folder, metrics=flat, seconds=document["cost"]["seconds"])


def _answers(store: Store, job: Job) -> Manifest:
    """Return the manifest of the answers, after answering where they are missing.

    The engine vllm runs in a separate process, because only the end of that process reliably frees the GPU's memory.
    """
    own = replace(job, stage="mt-bench-answers", extra={}, workdir=job.workdir / "answers", **job.extra["answers"])
    found = read_manifest(store, own.object_id)
    if found is None:
        own.workdir.mkdir(parents=True, exist_ok=True)
        if resolve_engine(job.config.generation.engine) == "hf":
            from spinreg_core.benchmarks.mt_bench_answers import run as answer

            return answer(own)
        run_in_process(own, "spinreg_core.benchmarks.mt_bench_answers")
        found = require_manifest(store, own.object_id)
    return found


def graded_with(prompts: Prompts, question: Question, turn: int, texts: dict[tuple[str, int], str]) -> Messages:
    """Return the messages to the judge about one turn. texts: the policy's answers by (question_id, turn)."""
    against, values = question.reference is not None, {}
    if question.reference is not None:
        values = {"ref_answer_1": question.reference[0]} | (
            {"ref_answer_2": question.reference[1]} if turn == 2 else {}
        )
    first = texts[question.question_id, 1]
    if turn == 1:
        name = "single-math-v1" if against else "single-v1"
        return prompts.messages(name, question=question.turns[0], answer=first, **values)
    name = "single-math-v1-multi-turn" if against else "single-v1-multi-turn"
    return prompts.messages(
        name, question_1=question.turns[0], answer_1=first, question_2=question.turns[1],
        answer_2=texts[question.question_id, 2], **values,
    )  # fmt: skip


def scores(
    questions: list[Question], grades: dict[tuple[str, int], float | None], *, resamples: int, seed: int
) -> tuple[dict[str, Estimate], list[Item]]:
    """Return metrics and items of grades by (question_id, turn). None is malformed; at least one grade is not."""
    values: dict[str, dict[str, float]] = {"score": {}, "score/turn_1": {}, "score/turn_2": {}}
    for question in questions:
        own = {turn: grade for turn in (1, 2) if (grade := grades[question.question_id, turn]) is not None}
        for turn, grade in own.items():
            values[f"score/turn_{turn}"][question.question_id] = grade
        if own:
            mean = sum(own.values()) / len(own)
            values["score"][question.question_id] = mean
            values.setdefault(f"score/{question.category}", {})[question.question_id] = mean
    metrics = {
        name: bootstrap_mean(list(of.values()), "of 10", resamples=resamples, seed=seed)
        for name, of in values.items() if of
    }  # fmt: skip
    return metrics, [(item, name, value) for name, of in values.items() for item, value in of.items()]
