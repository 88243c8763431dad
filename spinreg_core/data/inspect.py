"""What a data set looks like to spinreg, before a run: counts, lengths, examples, bad rows.

Decides: what `spinreg data inspect` shows. Leaves out: judging it; the stage `prepare` applies the limits.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import asdict
from typing import Any

from spinreg_core.config import RunConfig
from spinreg_core.data.encode import encode_row, length_distribution
from spinreg_core.data.filters import load_training
from spinreg_core.data.formats import REASONS, Rejected
from spinreg_core.data.load import Loaded, bad_share, by_reason, load_heldout, shorten
from spinreg_core.errors import BadInput
from spinreg_core.store.cache import cache_folder

EXAMPLES = 2
LISTED = 10  # rejected rows that the text names; the JSON has all of them


def inspect(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """A text for people and the same as a JSON-able mapping, for `config.dataset` and its held-out data set.

    Token counts and rendered examples need the tokenizer of `config.model`; where it cannot be had, lengths
    are in characters only and the text says why. Raises BadInput for a data set that cannot be read.
    """
    renderer, reason = _renderer(config)
    # Too many bad rows are to be shown, and not refused, in a mixture as well.
    selected = load_training(config.dataset, config.data.model_copy(update={"max_bad_share": 1.0}))
    parts = {"train": selected.loaded}
    heldout = load_heldout(config.dataset, config.data)
    if heldout is not None:
        parts["heldout"] = heldout
    document: dict[str, Any] = {name: _describe(part, config, renderer) for name, part in parts.items()}
    lines = [line for name, part in document.items() for line in _lines(name, part, config.data.max_bad_share)]
    told = selected.left_out
    document |= {"left_out": {"counts": selected.counts, "rows": [asdict(row) for row in told]}}
    document |= {"guarded": selected.loaded.guards}
    lines += [f"{guard['prompts']} prompts of {name} looked for, {guard['too_short']} too short for that"
              for name, guard in selected.loaded.guards.items()]  # fmt: skip
    lines += [f"left out of training: {count} {reason}" for reason, count in selected.counts.items()]
    lines += [f"  row {row.row}: {row.reason} ({shorten(row.detail, 120)})" for row in told[:LISTED]]
    if len(told) > LISTED:
        lines.append(f"  ... and {len(told) - LISTED} more (--json lists all)")
    if reason:
        lines.append(f"no token counts: {reason}")
    elif renderer.written_before:
        lines.append(f"warning: {renderer.written_before_warning}")
    return "\n".join(lines), document | {"tokenizer": None if reason else config.model}


def _renderer(config: RunConfig) -> tuple[Any, str]:
    from spinreg_core.models.chat_template import Renderer
    from spinreg_core.models.source import tokenizer_folder

    try:
        folder = tokenizer_folder(config.model, cache_folder())
        return Renderer.from_folder(folder, config.data.template_arguments), ""
    except BadInput as error:
        return None, str(error)


def _describe(loaded: Loaded, config: RunConfig, renderer: Any) -> dict[str, Any]:
    rows, rejected = loaded.rows, list(loaded.rejected)
    lengths = {
        "prompt_characters": length_distribution([sum(len(m["content"]) for m in row.messages) for row in rows]),
        "answer_characters": length_distribution([len(row.answer) for row in rows]),
    }
    document: dict[str, Any] = {
        "dataset": loaded.dataset,
        "format": loaded.format,
        "records": loaded.records,
        "last_records": loaded.last,
        "rows": len(rows),
        "duplicates": asdict(loaded.duplicates) | {"examples": list(loaded.duplicates.examples)},
    }
    if renderer is not None:
        counts = Counter[str]()
        tokens: dict[str, array[int]] = {"prompt_ids": array("q"), "answer_ids": array("q")}
        examples: list[dict[str, Any]] = []
        for row in rows:
            record = encode_row(row, renderer, config.data, config.evaluation.final_answer)
            if isinstance(record, Rejected):
                rejected.append(record)
                continue
            counts["rows"] += 1
            counts["truncated_answers"] += record.answer_truncated
            counts["final_answers"] += record.final_answer is not None
            counts["shortened_prompts"] += record.dropped_turns > 0
            for name, found in tokens.items():
                found.append(len(getattr(record, name)))
            if len(examples) < EXAMPLES:
                examples.append({
                    "row": row.source_row,
                    "prompt": renderer.text(record.prompt_ids),
                    "answer": renderer.text(record.answer_ids),
                })  # fmt: skip
        lengths |= {
            "prompt_tokens": length_distribution(tokens["prompt_ids"]),
            "answer_tokens": length_distribution(tokens["answer_ids"]),
        }
        names = ("rows", "truncated_answers", "final_answers", "shortened_prompts")
        document |= {name: counts[name] for name in names} | {"examples": examples}
        document |= {"written_before_answers": renderer.written_before}
    else:
        document["examples"] = [
            {"row": row.source_row, "prompt": row.messages[-1]["content"], "answer": row.answer}
            for row in rows[:EXAMPLES]
        ]
    return document | {
        "lengths": lengths,
        "bad_share": bad_share(loaded.records, rejected),
        "bad_rows": by_reason(rejected),
        "rejected": [asdict(bad) for bad in rejected],
    }


def _lines(name: str, part: dict[str, Any], max_bad_share: float) -> list[str]:
    duplicates = part["duplicates"]
    lines = [
        f"{name}: {part['dataset']} ({part['format']})",
        f"  records {part['records']}, usable rows {part['rows']}",
        *(f"    up to {last}: {name}" for name, last in part["last_records"].items() if len(part["last_records"]) > 1),
        f"  duplicates: {duplicates['exact']} exact, left out; {duplicates['prompts']} prompts with several answers",
        *(f"    {example}" for example in duplicates["examples"]),
    ]
    if "truncated_answers" in part:
        lines.append(f"  answers cut at data.max_length: {part['truncated_answers']}")
        lines.append(f"  answers with a final answer (####): {part['final_answers']}")
        lines.append(f"  prompts that lost their oldest turns (data.long_prompts): {part['shortened_prompts']}")
    for what, found in part["lengths"].items():
        values = ", ".join(f"{key} {value:g}" for key, value in found.items())
        lines.append(f"  {what.replace('_', ' in ')}: {values}")
    verdict = "within" if part["bad_share"] <= max_bad_share else "ABOVE"
    lines.append(f"  bad rows: {part['bad_share']:.2%}, {verdict} data.max_bad_share ({max_bad_share:.2%})")
    lines += [f"    {count} {reason}: {REASONS[reason]}" for reason, count in part["bad_rows"].items()]
    shown = part["rejected"][:LISTED]
    lines += [f"    row {bad['row']}: {bad['reason']} ({shorten(bad['detail'], 120)})" for bad in shown]
    if len(part["rejected"]) > LISTED:
        lines.append(f"    ... and {len(part['rejected']) - LISTED} more (--json lists all)")
    for example in part["examples"]:
        lines.append(f"  example, row {example['row']}; what is trained on follows the bar")
        text = f"{example['prompt']}|{example['answer']}"
        lines += [f"    {line}" for line in text.splitlines()]
    return lines
