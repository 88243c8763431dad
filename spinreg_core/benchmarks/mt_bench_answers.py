"""A policy's answers to both turns of MT-Bench's questions: an object of its own, independent of the judge.

Decides: the second turn's conversation, the sampler's settings, and when answers are committed. Leaves out: decoding
(`generation`), the questions (`mt_bench_questions`), grading (`mt_bench`).

    python -m spinreg_core.benchmarks.mt_bench_answers JOB.json

A job's `inputs` are {"policy": object id}. One engine answers everything. The questions of one turn and temperature are
answered together and then committed as a part. Leaves `answers/` with a Parquet file per part. Temperature 0 is greedy
decoding. The run's own top_p and top_k do not apply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from spinreg_core.benchmarks.mt_bench_questions import TEMPERATURES, Question, content_hash, load_questions
from spinreg_core.config import resolve_engine, sampling_dtype
from spinreg_core.errors import BadInput
from spinreg_core.generation import open as engines
from spinreg_core.generation.engine import Answer, Engine, Sampling
from spinreg_core.generation.shards import answer_seed
from spinreg_core.runs.fetch import fetch_folder, fetch_part
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import commit_part, publish, upload, usable_parts
from spinreg_core.runtime.main import main
from spinreg_core.runtime.progress import Progress
from spinreg_core.store.open import open_store

if TYPE_CHECKING:
    from spinreg_core.models.chat_template import Renderer
    from spinreg_core.models.messages import Message


ANSWERS_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("category", pa.string()),
        ("turn", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish", pa.string()),  # stop | length
        ("temperature", pa.float64()),
        ("seed", pa.int64()),
    ]
)


def run(job: Job, open_engine: Callable[..., Engine] = engines.open_engine) -> Manifest:
    """Answer the questions that are not committed yet, then publish. Returns the manifest.

    Its metrics are `answers`, `tokens` (sampled), `truncated` (share cut off by mt_bench_max_tokens) and `engine`.
    Raises BadInput (the questions changed, or are too long for the model), Damaged.
    """
    from spinreg_core.models.chat_template import Renderer

    start, store, config = time.monotonic(), open_store(job.store), job.config
    questions = the_questions(job)
    folder = fetch_folder(store, job.inputs["policy"], "policy")
    renderer = Renderer.from_folder(folder, config.data.template_arguments)
    longest = _longest(questions, renderer, folder, config.benchmarks.mt_bench_max_tokens)
    parts = usable_parts(store, job.object_id)
    texts = {q: text for part in parts.values() for q, text in _texts(fetch_part(store, part).values()).items()}
    progress = Progress("benchmark", 2 * len(questions), "answers", done=len(texts))
    engine: Engine | None = None
    names = []
    try:
        for turn in (1, 2):
            for temperature in sorted({TEMPERATURES[q.category] for q in questions}):
                name = f"{turn}-{temperature:g}"
                names.append(name)
                if name in parts:
                    continue
                engine = engine or _engine(open_engine, job, folder, renderer, longest)
                own = [q for q in questions if TEMPERATURES[q.category] == temperature]
                prompts = [renderer.prompt_ids(_messages(q, turn, texts)) for q in own]
                sampling = sampler(temperature, config.benchmarks.mt_bench_max_tokens, renderer.stop_ids)
                seeds = [
                    answer_seed(seed=config.seed, round_number=0, kind="mt-bench", prompt_id=q.question_id, answer=turn)
                    for q in own
                ]
                answers = engine.generate(prompts, sampling, seeds, lambda _i, _answer: progress.update(1))
                path = job.workdir / name / "answers" / f"{name}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(_table(own, turn, temperature, prompts, answers, seeds, renderer), path)
                part = commit_part(store, job, name, upload(store, job, job.workdir / name), _meta(answers))
                texts |= _texts(fetch_part(store, part).values())
                parts[name] = part
    finally:
        if engine is not None:
            engine.close()
    metas = [parts[name].meta for name in names]
    answered = sum(meta["answers"] for meta in metas)
    metrics = {
        "answers": answered,
        "tokens": sum(meta["tokens"] for meta in metas),
        "truncated": sum(meta["truncated"] for meta in metas) / answered,
        "engine": resolve_engine(config.generation.engine),
    }
    return publish(store, job, None, metrics=metrics, parts=names, seconds=time.monotonic() - start)


def the_questions(job: Job) -> list[Question]:
    """Return the questions of the job. Raises BadInput where the file changed after the job was planned."""
    questions, planned = load_questions(job.config.benchmarks), job.key["questions"]
    found = content_hash(questions)
    if planned not in (found, "hub"):
        raise BadInput("benchmarks.mt_bench",
                       f"names {job.config.benchmarks.mt_bench}, which changed after this job was planned",
                       "start again to have the new questions answered")  # fmt: skip
    return questions


def sampler(temperature: float, max_tokens: int, stop_ids: list[int]) -> Sampling:
    """Return the sampler's settings. Engines divide by the temperature, so 0 becomes top-k 1 at temperature 1."""
    greedy = temperature == 0
    return Sampling(1.0 if greedy else temperature, 1.0, 1 if greedy else 0, max_tokens, tuple(stop_ids))


def _messages(question: Question, turn: int, texts: dict[tuple[str, int], str]) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": question.turns[0]}]
    if turn == 2:
        messages.append({"role": "assistant", "content": texts[question.question_id, 1]})
        messages.append({"role": "user", "content": question.turns[1]})
    return messages


def _longest(questions: list[Question], renderer: Renderer, folder: Path, max_tokens: int) -> int:
    """Return the tokens of the longest possible conversation, both answers included.

    Raises BadInput where the model's context is too short for it. (The text of an answer has more tokens than were
    sampled only if it was not valid text.)
    """
    from transformers import AutoConfig

    from spinreg_core.models.context import context_of

    context, why = context_of(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    longest = 0
    for question in questions:
        prompt = len(renderer.prompt_ids(_messages(question, 2, {(question.question_id, 1): "x"})))
        longest = max(longest, prompt + 2 * max_tokens)
        if context is not None and prompt + 2 * max_tokens > context:
            raise BadInput(
                "benchmarks.mt_bench_max_tokens",
                f"{max_tokens}, twice, after the {prompt} tokens of question {question.question_id}",
                f"at most {context} tokens in all, {why}",
            )
    return longest if context is None else min(context, longest + max_tokens)


def _engine(open_engine: Callable[..., Engine], job: Job, folder: Path, renderer: Renderer, longest: int) -> Engine:
    config = job.config
    generation = config.generation.model_copy(update={"dtype": sampling_dtype(config)})
    name = resolve_engine(generation.engine)
    print(f"engine {name} ({generation.dtype}) for the questions of MT-Bench", flush=True)
    return open_engine(name, [folder], generation, config.resources, pad_id=renderer.pad_id, longest=longest)


def _table(
    questions: list[Question], turn: int, temperature: float, prompts: list[list[int]], answers: list[Answer],
    seeds: list[int], renderer: Renderer,
) -> pa.Table:  # fmt: skip
    count = len(questions)
    columns = {
        "question_id": [q.question_id for q in questions],
        "category": [q.category for q in questions],
        "turn": [turn] * count,
        "prompt_ids": prompts,
        "answer_ids": [a.token_ids for a in answers],
        "text": [renderer.decode(a.token_ids) for a in answers],
        "finish": [a.finish for a in answers],
        "temperature": [temperature] * count,
        "seed": seeds,
    }
    return pa.table(columns, schema=ANSWERS_SCHEMA)


def _texts(paths: Iterable[Path]) -> dict[tuple[str, int], str]:
    rows = [row for path in paths for row in pq.read_table(path, columns=["question_id", "turn", "text"]).to_pylist()]
    return {(row["question_id"], row["turn"]): row["text"] for row in rows}


def _meta(answers: list[Answer]) -> dict[str, int]:
    return {
        "answers": len(answers),
        "tokens": sum(len(a.token_ids) for a in answers),
        "truncated": sum(a.finish == "length" for a in answers),
    }


if __name__ == "__main__":
    main(run)
