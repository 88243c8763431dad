"""Report on a data set before a run: counts, lengths, examples and bad rows.

Decides: the content of `spinreg data inspect`. Leaves out: enforcing limits; the stage `prepare` does that.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spinreg_core.config import RunConfig
from spinreg_core.data.encode import encode_row, length_distribution
from spinreg_core.data.filters import load_training
from spinreg_core.data.formats import REASONS, Rejected
from spinreg_core.data.load import Duplicates, Loaded, bad_share, by_reason, load_heldout, shorten
from spinreg_core.errors import BadInput
from spinreg_core.models.chat_template import Renderer
from spinreg_core.models.source import tokenizer_folder
from spinreg_core.store.cache import cache_folder

_EXAMPLES = 2
# Rows that the text lists; the JSON document lists all of them.
_LISTED = 10


@dataclass(frozen=True)
class Example:
    """A row as the model sees it, or its plain texts without a tokenizer."""

    row: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class PartReport:
    """Report on the training or the held-out rows. Fields that need a tokenizer are None without one."""

    dataset: str
    format: str
    records: int
    last_records: dict[str, int]
    rows: int
    duplicates: Duplicates
    examples: list[Example]
    lengths: dict[str, dict[str, float]]
    bad_share: float
    bad_rows: dict[str, int]
    rejected: list[Rejected]
    unused_fields: list[str]
    files: list[str]
    written_before_answers: str | None = None
    truncated_answers: int | None = None
    final_answers: int | None = None
    shortened_prompts: int | None = None


def inspect(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """Return a text for people and the same as JSON, for `config.dataset` and its held-out data set.

    Token counts and rendered examples need the tokenizer of `config.model`. Without it, lengths are in characters and
    the text gives the reason. Raises BadInput for a data set that cannot be read.
    """
    renderer, reason = _renderer(config)
    # Too many bad rows are shown, not refused, in a mixture as well.
    selected = load_training(config.dataset, config.data.model_copy(update={"max_bad_share": 1.0}))
    heldout = load_heldout(config.dataset, config.data)
    parts = {"train": selected.loaded} | ({} if heldout is None else {"heldout": heldout})
    reports = {name: _report(part, config, renderer) for name, part in parts.items()}
    left_out, guards = selected.left_out, selected.loaded.guards
    lines = [line for name, report in reports.items() for line in _lines(name, report, config.data.max_bad_share)]
    lines += [f"{guard['prompts']} prompts of {name} are guarded, {guard['too_short']} are too short for that"
              for name, guard in guards.items()]  # fmt: skip
    lines += [f"left out of training: {count} {reason}" for reason, count in selected.counts.items()]
    lines += _listed(left_out, "  ")
    if renderer is None:
        lines.append(f"no token counts: {reason}")
    elif renderer.written_before:
        lines.append(f"warning: {renderer.written_before_warning}")
    document: dict[str, Any] = {
        name: {field: value for field, value in asdict(report).items() if value is not None}
        for name, report in reports.items()
    }
    document["left_out"] = {"counts": selected.counts, "rows": [asdict(row) for row in left_out]}
    document |= {"guarded": guards, "tokenizer": None if renderer is None else config.model}
    return "\n".join(lines), document


def _renderer(config: RunConfig) -> tuple[Renderer | None, str]:
    """Return the renderer of the model, or None and the reason."""
    try:
        folder = tokenizer_folder(config.model, cache_folder())
        return Renderer.from_folder(folder, config.data.template_arguments), ""
    except BadInput as error:
        return None, str(error)


def _report(loaded: Loaded, config: RunConfig, renderer: Renderer | None) -> PartReport:
    rows, rejected = loaded.rows, list(loaded.rejected)
    lengths = {
        "prompt_characters": length_distribution([sum(len(m["content"]) for m in row.messages) for row in rows]),
        "answer_characters": length_distribution([len(row.answer) for row in rows]),
    }
    counts = Counter[str]()
    if renderer is None:
        counts["rows"] = len(rows)
        examples = [Example(row.source_row, row.messages[-1]["content"], row.answer) for row in rows[:_EXAMPLES]]
    else:
        # The names are those of the report's fields; a count of zero is one too.
        counts.update({"truncated_answers": 0, "final_answers": 0, "shortened_prompts": 0, "rows": 0})
        examples, prompts, answers = [], array("q"), array("q")
        for row in rows:
            encoded = encode_row(row, renderer, config.data, config.evaluation.final_answer)
            if isinstance(encoded, Rejected):
                rejected.append(encoded)
                continue
            counts["rows"] += 1
            counts["truncated_answers"] += encoded.answer_truncated
            counts["final_answers"] += encoded.final_answer is not None
            counts["shortened_prompts"] += encoded.dropped_turns > 0
            prompts.append(len(encoded.prompt_ids))
            answers.append(len(encoded.answer_ids))
            if len(examples) < _EXAMPLES:
                prompt, answer = renderer.text(encoded.prompt_ids), renderer.text(encoded.answer_ids)
                examples.append(Example(row.source_row, prompt, answer))
        lengths |= {"prompt_tokens": length_distribution(prompts), "answer_tokens": length_distribution(answers)}
    return PartReport(
        dataset=loaded.dataset,
        format=loaded.format,
        records=loaded.records,
        last_records=loaded.last,
        duplicates=loaded.duplicates,
        examples=examples,
        lengths=lengths,
        bad_share=bad_share(loaded.records, rejected),
        bad_rows=by_reason(rejected),
        rejected=rejected,
        unused_fields=loaded.unused,
        files=loaded.notes,
        written_before_answers=None if renderer is None else renderer.written_before,
        **counts,
    )


def _lines(name: str, report: PartReport, max_bad_share: float) -> Iterator[str]:
    duplicates = report.duplicates
    yield f"{name}: {report.dataset} ({report.format})"
    yield from (f"  {note}" for note in report.files)
    yield f"  records {report.records}, usable rows {report.rows}"
    if report.unused_fields:
        yield f"  fields that rows do not use: {', '.join(report.unused_fields)}"
    if len(report.last_records) > 1:
        yield from (f"    up to {last}: {dataset}" for dataset, last in report.last_records.items())
    yield f"  duplicates: {duplicates.exact} exact, left out; {duplicates.prompts} prompts with several answers"
    yield from (f"    {example}" for example in duplicates.examples)
    if report.truncated_answers is not None:
        yield f"  answers cut at data.max_length: {report.truncated_answers}"
        yield f"  answers with a final answer (####): {report.final_answers}"
        yield f"  prompts that lost their oldest turns (data.long_prompts): {report.shortened_prompts}"
    for measure, found in report.lengths.items():
        values = ", ".join(f"{key} {value:g}" for key, value in found.items())
        yield f"  {measure.replace('_', ' in ')}: {values}"
    verdict = "within" if report.bad_share <= max_bad_share else "ABOVE"
    yield f"  bad rows: {report.bad_share:.2%}, {verdict} data.max_bad_share ({max_bad_share:.2%})"
    yield from (f"    {count} {reason}: {REASONS[reason]}" for reason, count in report.bad_rows.items())
    yield from _listed(report.rejected, "    ")
    for example in report.examples:
        yield f"  example, row {example.row}; the part after the bar is trained on"
        yield from (f"    {line}" for line in f"{example.prompt}|{example.answer}".splitlines())


def _listed(rows: Sequence[Rejected], indent: str) -> Iterator[str]:
    for bad in rows[:_LISTED]:
        yield f"{indent}row {bad.row}: {bad.reason} ({shorten(bad.detail, 120)})"
    if len(rows) > _LISTED:
        yield f"{indent}... and {len(rows) - _LISTED} more (--json lists all)"
