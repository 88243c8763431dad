"""Stage `prepare`: publishes the tokenised rows and the base model of a run, once per run.

Decides: the order of the checks (rows before any model, token lengths with the tokenizer alone, weights last), and the
fingerprints of `data` and `base`.
Leaves out: reading rows (`data`), rendering and the sources of models (`models`).

Only this stage sees the contents that name its two objects, so its job has no object id. It writes `result.json` to
the workdir: {"base": object id, "data": object id, "summary": counts of rows}.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from spinreg_core.config import RunConfig
from spinreg_core.data.encode import (
    EncodedRow,
    encode_row,
    length_distribution,
    prompt_ids_of,
    without_oldest_turns,
    write_chosen_rows,
    write_encoded,
)
from spinreg_core.data.filters import Selected, load_training
from spinreg_core.data.formats import Rejected, Row
from spinreg_core.data.load import Loaded, by_reason, exact_duplicates, load_heldout, require_usable
from spinreg_core.data.row_file import take_rows, write_rows
from spinreg_core.data.split import IntArray, any_share_openings, given_heldout, split_rows
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.final_answers import require_final_answers
from spinreg_core.models.chat_template import DEFAULT_TEMPLATE, Renderer
from spinreg_core.models.checks import require_finite, require_honest_ties, require_loadable
from spinreg_core.models.source import link_policy, model_fingerprint, require_fit, resolve_model, tokenizer_folder
from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import fingerprint, publish, read_manifest
from spinreg_core.runtime.main import main
from spinreg_core.runtime.progress import Progress
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.open import open_store
from spinreg_core.training.checkpoint_files import copy_rest


def run(job: Job) -> Manifest:
    """Publish both objects and return the manifest of `data` with both ids. Raises BadInput."""
    config = job.config
    selected = load_training(config.dataset, config.data)
    loaded = selected.loaded
    heldout = load_heldout(config.dataset, config.data)
    for part in (loaded, heldout):
        if part is not None:
            _print_counts(part)
            require_usable(part, part.rejected, config.data.max_bad_share)
    renderer = Renderer.from_folder(tokenizer_folder(config.model, cache_folder()), config.data.template_arguments)
    for name, guard in loaded.guards.items():
        print(f"{guard['prompts']} prompts of {name} are guarded, {guard['too_short']} are too short for that",
              flush=True)  # fmt: skip
    if selected.counts:
        print(f"left out of training: {', '.join(f'{n} {reason}' for reason, n in selected.counts.items())}",
              flush=True)  # fmt: skip
    if renderer.written_before:
        print(f"warning: {renderer.written_before_warning}", flush=True)
    if str(renderer.tokenizer.chat_template).endswith(DEFAULT_TEMPLATE):
        print("the model has no chat template, so spinreg's default is used (docs/data.md)", flush=True)
    data = prepare_data(job, selected, heldout, renderer)
    folder = resolve_model(config.model, cache_folder())
    largest = _largest_id(job, data.object_id)
    require_fit(folder, config.data.max_length, [*renderer.stop_ids, renderer.pad_id, largest])
    require_loadable(folder)
    if config.training.lora_rank is not None:
        require_adaptable(folder, config)
    base = prepare_base(job, folder)
    result = {"base": base.object_id, "data": data.object_id, "summary": data.metrics}
    (job.workdir / "result.json").write_text(json.dumps(result, indent=1))
    return data


def _largest_id(job: Job, data: str) -> int:
    """Return the largest token id in the rows of an object."""
    store, largest = open_store(job.store), 0
    for name in ("train", "heldout"):
        with pq.ParquetFile(fetch_file(store, data, f"{name}.parquet")) as file:
            for batch in file.iter_batches(1000, columns=["prompt_ids", "answer_ids"]):
                largest = max([largest, *(pc.max(column.flatten()).as_py() or 0 for column in batch.columns)])
    return largest


def _print_counts(loaded: Loaded) -> None:
    for note in loaded.notes:
        print(note)
    first = 1
    for name, last in loaded.last.items() if len(loaded.last) > 1 else ():
        print(f"records {first} to {last}: {name}")
        first = last + 1
    print(
        f"{loaded.dataset} ({loaded.format}): {loaded.records} records, {len(loaded.rows)} rows; "
        f"bad rows: {_format_reasons(loaded.rejected)}; {loaded.duplicates.exact} exact duplicates left out; "
        f"{loaded.duplicates.prompts} prompts with several answers",
        flush=True,
    )
    if loaded.unused:
        print(f"fields that rows do not use: {', '.join(loaded.unused)}", flush=True)


def _format_reasons(rejected: list[Rejected]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in by_reason(rejected).items()) or "none"


def data_key(config: RunConfig, selected: Selected, heldout: Loaded | None, renderer: Renderer) -> dict[str, Any]:
    """Return everything that decides the content of the `data` object.

    The hash of the rows covers format, split and turns; that of the rows left out covers the filters. Fields that the
    first objects did not have are present only where behaviour changed, so that other object ids stay as they were.
    """
    loaded, data = selected.loaded, config.data
    key: dict[str, Any] = {
        "rows": loaded.content_hash(),
        "heldout": None if heldout is None else heldout.content_hash(),
        "limits": {
            "max_prompt_tokens": data.max_prompt_tokens,
            "long_prompts": data.long_prompts,
            "max_length": data.max_length,
            "heldout_rows": data.heldout_rows,
        },
        "final_answer": config.evaluation.final_answer,
        "seed": config.seed,
        "rendering": renderer.fingerprint(),
    }
    if any_share_openings(loaded.rows if heldout is None else heldout.rows):
        # Earlier objects held out all rows of an opening, as if the turns of a conversation were independent.
        key["held"] = "one row of each opening"
    if selected.counts or loaded.guards:
        removed = [selected.counts, [asdict(row) for row in selected.left_out], loaded.guards]
        key["left_out"] = hashlib.sha256(json.dumps(removed).encode()).hexdigest()
    if data.long_prompts == "drop_oldest":
        # Earlier objects were split by the dropped messages too.
        key["split_by"] = "messages that stay"
    parts = [loaded.rows] if heldout is None else [loaded.rows, heldout.rows]
    if renderer.left_out and any(_holds(row, renderer.left_out) for rows in parts for row in rows):
        # Earlier objects have rows without the texts that the template leaves out.
        key["written"] = "whole texts"
    return key


def _holds(row: Row, parts: set[str]) -> bool:
    return ("thought" in parts and "</think>" in row.answer) or (
        "system" in parts and any(message["role"] == "system" for message in row.messages)
    )


def prepare_data(job: Job, selected: Selected, heldout: Loaded | None, renderer: Renderer) -> Manifest:
    """Split and tokenise the rows, publish the object `data`, and return its manifest. Raises BadInput.

    Rows are on disk. Memory holds a few hundred bytes of each row, whatever its length.
    """
    config, store, start = job.config, open_store(job.store), time.monotonic()
    loaded = selected.loaded
    key = data_key(config, selected, heldout, renderer)
    job = replace(job, stage="data", key=key, object_id=fingerprint("data", key))
    found = read_manifest(store, job.object_id)
    if found is not None:
        print(f"rows are in the store already: {job.object_id}", flush=True)
        return found
    folder, scratch = job.workdir / "data", job.workdir / "encoded"
    folder.mkdir()
    scratch.mkdir()
    train = _encode(loaded, renderer, config, scratch / "train.parquet")
    if heldout is None:
        held = train
        chosen = split_rows(train.rows, config.data.heldout_rows, config.seed)
    else:
        held = _encode(heldout, renderer, config, scratch / "heldout.parquet")
        chosen = given_heldout(train.rows, held.rows, config.data.heldout_rows, config.seed)
    for name, part, own in zip(("train", "heldout"), (train, held), chosen, strict=True):
        stems = np.fromiter((row.prompt_hash[:16] for row in take_rows(part.rows, own)), "S16", len(own))
        write_chosen_rows(part.path, part.places[own], prompt_ids_of(stems), folder / f"{name}.parquet")
    shutil.rmtree(scratch)
    dropped = len(train.rows) - len(chosen[0]) - (len(chosen[1]) if heldout is None else 0)
    bad = {"train": train.rejected, "heldout": [] if heldout is None else held.rejected}
    encoded = [train] if heldout is None else [train, held]
    summary = _summary(selected, folder, bad, encoded, dropped)
    answers = pq.read_table(folder / "heldout.parquet", columns=["final_answer"])["final_answer"]
    require_final_answers(config.evaluation.final_answer, answers.to_pylist())
    documents = {
        "rejected": [{"part": name} | asdict(row) for name, part in bad.items() for row in part],
        "left_out": [asdict(row) for row in selected.left_out],
        "summary": asdict(summary) | {"duplicates": asdict(loaded.duplicates)},
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False))
    print(
        f"{summary.train_rows} rows to train on, {summary.heldout_rows} held out, {dropped} dropped because they have "
        f"the same openings; {summary.truncated_answers} answers cut at {config.data.max_length} tokens, "
        f"{summary.shortened_prompts} prompts without their oldest turns; bad rows so far: "
        f"{_format_reasons(bad['train'] + bad['heldout'])}",
        flush=True,
    )
    return publish(store, job, folder, metrics=asdict(summary), seconds=time.monotonic() - start)


@dataclass(frozen=True)
class _Encoded:
    """Rows that fit, with the messages that stayed, and their places in the file `path`.

    `rejected`: rows refused so far; `shortened`: prompts that lost their oldest turns; `alike`: rows that were exact
    duplicates after that.
    """

    rows: Sequence[Row]
    places: IntArray
    path: Path
    rejected: list[Rejected]
    shortened: int
    alike: int


def _encode(loaded: Loaded, renderer: Renderer, config: RunConfig, path: Path) -> _Encoded:
    progress = Progress("prepare", len(loaded.rows), "rows")
    rejected, usable, dropped = list(loaded.rejected), array("q"), array("q")

    def encoded() -> Iterator[EncodedRow]:
        for index, row in enumerate(loaded.rows):
            progress.update()
            found = encode_row(row, renderer, config.data, config.evaluation.final_answer)
            if isinstance(found, Rejected):
                rejected.append(found)
                continue
            usable.append(index)
            dropped.append(found.dropped_turns)
            yield found

    write_encoded(path, encoded())
    require_usable(loaded, rejected, config.data.max_bad_share)
    rows, shortened = take_rows(loaded.rows, usable), int(np.count_nonzero(dropped))
    if not shortened:
        return _Encoded(rows, np.arange(len(rows)), path, rejected, 0, 0)
    changed = write_rows(
        replace(row, messages=tuple(without_oldest_turns(row.messages, turns)))
        for row, turns in zip(rows, dropped, strict=True)
    )
    places, duplicates = exact_duplicates(changed)
    return _Encoded(take_rows(changed, places), places, path, rejected, shortened, duplicates.exact)


@dataclass(frozen=True)
class DataSummary:
    """Counts of a `data` object: its metrics, and `summary.json` with the duplicates."""

    records: int
    last_records: dict[str, int]
    train_rows: int
    heldout_rows: int
    bad_rows: dict[str, int]
    exact_duplicates: int
    prompts_with_several_answers: int
    truncated_answers: int
    final_answers: int
    prompt_tokens: dict[str, float]
    answer_tokens: dict[str, float]
    train_rows_dropped_as_heldout: int
    shortened_prompts: int
    alike_when_shortened: int
    left_out: dict[str, int]
    guarded: dict[str, dict[str, int]]


def _summary(
    selected: Selected, folder: Path, bad: dict[str, list[Rejected]], encoded: list[_Encoded], dropped: int
) -> DataSummary:
    loaded = selected.loaded
    lengths: dict[str, list[Any]] = {"prompt_ids": [], "answer_ids": []}
    rows, truncated, final = dict.fromkeys(("train", "heldout"), 0), 0, 0
    for name in rows:
        with pq.ParquetFile(folder / f"{name}.parquet") as file:
            for batch in file.iter_batches(1000, columns=[*lengths, "answer_truncated", "final_answer"]):
                rows[name] += batch.num_rows
                truncated += pc.sum(batch["answer_truncated"]).as_py() or 0
                final += batch.num_rows - batch["final_answer"].null_count if name == "heldout" else 0
                for column, found in lengths.items():
                    found.append(pc.list_value_length(batch[column]).to_numpy())
    return DataSummary(
        records=loaded.records,
        last_records=loaded.last,
        train_rows=rows["train"],
        heldout_rows=rows["heldout"],
        bad_rows=by_reason(bad["train"] + bad["heldout"]),
        exact_duplicates=loaded.duplicates.exact,
        prompts_with_several_answers=loaded.duplicates.prompts,
        truncated_answers=truncated,
        final_answers=final,
        prompt_tokens=length_distribution(np.concatenate(lengths["prompt_ids"])),
        answer_tokens=length_distribution(np.concatenate(lengths["answer_ids"])),
        train_rows_dropped_as_heldout=dropped,
        shortened_prompts=sum(part.shortened for part in encoded),
        alike_when_shortened=sum(part.alike for part in encoded),
        left_out=selected.counts,
        guarded=loaded.guards,
    )


def require_adaptable(folder: Path, config: RunConfig) -> None:
    """Raise BadInput for a model or settings that training with an adapter would refuse.

    Training would notice it only after a round was generated and scored.
    """
    from spinreg_core.models.fsdp import empty_policy, require_weights
    from spinreg_core.models.lora import add_adapter
    from spinreg_core.models.quantization import require_library
    from spinreg_core.runtime.distributed import processes_here

    bits, resources = config.training.lora_quantize, config.resources
    model = empty_policy(folder, config.training.precision)
    require_weights(model, folder)
    add_adapter(model, config.training)
    if bits is not None:
        require_library(bits)
        ranks = processes_here(resources) * resources.nodes
        if ranks > 1:
            raise BadInput("resources.processes", f"is {ranks} in all, with training.lora_quantize {bits}", "1")


def prepare_base(job: Job, source: Path) -> Manifest:
    """Publish the object `base`, a model folder, and return its manifest. Raises BadInput."""
    store, start = open_store(job.store), time.monotonic()
    bits = job.config.training.lora_quantize
    key = {"model": model_fingerprint(source)} | ({} if bits is None else {"rounded_to": bits})
    job = replace(job, stage="base", key=key, object_id=fingerprint("base", key))
    found = read_manifest(store, job.object_id)
    if found is not None:
        print(f"the base model is in the store already: {job.object_id}", flush=True)
        return found
    require_finite(source)
    require_honest_ties(source)
    folder = job.workdir / "base"
    if bits is None:
        link_policy(source, folder / "policy", job.config.data.template_arguments)
    else:
        from spinreg_core.models.quantization import round_weights
        from spinreg_core.runtime.distributed import resolve_device

        print(f"rounding the base model to {bits}", flush=True)
        link_policy(source, job.workdir / "source", job.config.data.template_arguments)
        round_weights(source, folder / "policy", bits, torch.device(resolve_device(job.config.resources.device)))
        copy_rest(job.workdir / "source", folder / "policy", torch.float32)
    size = sum(path.stat().st_size for path in (folder / "policy").iterdir())
    metrics = {"bytes": size, "source": job.config.model}
    return publish(store, job, folder, metrics=metrics, seconds=time.monotonic() - start)


if __name__ == "__main__":
    main(run)
