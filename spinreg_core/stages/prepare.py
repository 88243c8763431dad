"""The stage `prepare`: checked, split, tokenised rows and the base model go into the store, once per run.

Decides: the order of the checks (rows before any model, token lengths with the tokenizer alone, weights last),
and what the fingerprints of `data` and `base` cover. Leaves out: reading (`data/`), rendering, model sources.

Its two objects are named by contents that only this stage sees, so the job carries no object id. It leaves
`result.json` in the workdir: {"base": object id, "data": object id, "summary": counts of rows}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from spinreg_core.cache import cache_folder
from spinreg_core.checkpoints import copy_rest
from spinreg_core.config import RunConfig
from spinreg_core.data.encode import encode_rows, rows_table, spread
from spinreg_core.data.formats import Rejected, Row
from spinreg_core.data.load import Loaded, by_reason, load_heldout, require_usable
from spinreg_core.data.select import LeftOut, listed, load_training
from spinreg_core.data.select import by_reason as left_out_by
from spinreg_core.data.split import given_heldout, split_rows
from spinreg_core.errors import BadInput
from spinreg_core.evaluation import require_final_answers
from spinreg_core.model_source import (
    link_policy,
    model_fingerprint,
    require_fit,
    resolve_model,
    tokenizer_folder,
)
from spinreg_core.objects import fingerprint, publish, read_manifest
from spinreg_core.progress import Progress
from spinreg_core.render import Renderer
from spinreg_core.stages.job import Job, main
from spinreg_core.store import open_store


def run(job: Job) -> dict[str, Any]:
    """Publish both objects. Returns the manifest of `data` with both ids. Raises BadInput."""
    config = job.config
    loaded, left_out = load_training(config.dataset, config.data)
    heldout = load_heldout(config.dataset, config.data)
    for part in (loaded, heldout):
        if part is not None:
            _tell(part)
            require_usable(part, part.rejected, config.data.max_bad_share)
    renderer = Renderer.from_folder(tokenizer_folder(config.model, cache_folder()), config.data.template_arguments)
    for name, guard in loaded.guards.items():
        print(f"{guard['prompts']} prompts of {name} are looked for in the training rows, {guard['too_short']} are too "
              "short for that", flush=True)  # fmt: skip
    if left_out:
        print(f"left out of training: {', '.join(f'{n} {reason}' for reason, n in left_out_by(left_out).items())}",
              flush=True)  # fmt: skip
    data = prepare_data(job, loaded, heldout, renderer, left_out)
    folder = resolve_model(config.model, cache_folder())
    require_fit(folder, config.data.max_length, [*renderer.stop_ids, renderer.pad_id])
    if config.training.lora_rank is not None:
        require_adaptable(folder, config)
    base = prepare_base(job, folder)
    result = {"base": base["object_id"], "data": data["object_id"], "summary": data["metrics"]}
    (job.workdir / "result.json").write_text(json.dumps(result, indent=1))
    return data | {"base": base["object_id"]}


def _tell(loaded: Loaded) -> None:
    first = 1
    for name, last in loaded.last.items() if len(loaded.last) > 1 else ():
        print(f"records {first} to {last}: {name}")
        first = last + 1
    print(
        f"{loaded.dataset} ({loaded.format}): {loaded.records} records, {len(loaded.rows)} rows; "
        f"bad rows: {_counts(loaded.rejected)}; {loaded.duplicates.exact} exact duplicates left out; "
        f"{loaded.duplicates.prompts} prompts with several answers",
        flush=True,
    )


def _counts(rejected: list[Rejected]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in by_reason(rejected).items()) or "none"


def data_key(config: RunConfig, loaded: Loaded, heldout: Loaded | None, renderer: Renderer) -> dict[str, Any]:
    """What the `data` object is fingerprinted by. (Format, split and turns show in the rows.)"""
    return {
        "rows": loaded.content_hash(),
        "heldout": None if heldout is None else heldout.content_hash(),
        "limits": config.data.model_dump(
            mode="json", include={"max_prompt_tokens", "long_prompts", "max_length", "heldout_rows"}
        ),
        "final_answer": config.evaluation.final_answer,
        "seed": config.seed,
        "rendering": renderer.fingerprint(),
    }


def prepare_data(
    job: Job, loaded: Loaded, heldout: Loaded | None, renderer: Renderer, left_out: Sequence[LeftOut] = ()
) -> dict[str, Any]:
    """Split and tokenise the rows and publish the object `data`; returns its manifest. Raises BadInput."""
    config, store, start = job.config, open_store(job.store), time.monotonic()
    key = data_key(config, loaded, heldout, renderer)
    job = replace(job, stage="data", key=key, object_id=fingerprint("data", key))
    found = read_manifest(store, job.object_id)
    if found is not None:
        print(f"rows are in the store already: {job.object_id}", flush=True)
        return found
    encoded, rejected = _encode(loaded, renderer, config)
    dropped, bad = 0, {"train": rejected, "heldout": []}
    rows = [row for row, _ in encoded]
    if heldout is None:
        train, held = split_rows(rows, config.data.heldout_rows, config.seed)
    else:
        more, bad["heldout"] = _encode(heldout, renderer, config)
        train, held, dropped = given_heldout(rows, [row for row, _ in more], config.data.heldout_rows, config.seed)
        encoded += more
    tables = {"train": rows_table(train, encoded), "heldout": rows_table(held, encoded)}
    summary = _summary(loaded, tables, bad, dropped) | {
        "left_out": left_out_by(left_out), "guarded": loaded.guards,
    }  # fmt: skip
    require_final_answers(config.evaluation.final_answer, tables["heldout"]["final_answer"].to_pylist())
    folder = job.workdir / "data"
    folder.mkdir()
    for name, table in tables.items():
        # Small groups: stages read the rows of a shard, not the file.
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=1000)
    told = [asdict(row) for row in listed(left_out)]
    refused = [{"part": name} | asdict(row) for name, part in bad.items() for row in part]
    (folder / "rejected.json").write_text(json.dumps(refused, indent=1, ensure_ascii=False))
    (folder / "left_out.json").write_text(json.dumps(told, indent=1, ensure_ascii=False))
    (folder / "summary.json").write_text(
        json.dumps(summary | {"duplicates": asdict(loaded.duplicates)}, indent=1, ensure_ascii=False)
    )
    print(
        f"{len(train)} rows to train on, {len(held)} held out, {dropped} dropped because they are held out; "
        f"{summary['truncated_answers']} answers cut at {config.data.max_length} tokens; bad rows by now: "
        f"{_counts(bad['train'] + bad['heldout'])}",
        flush=True,
    )
    return publish(store, job, folder, metrics=summary, seconds=time.monotonic() - start)


def _encode(
    loaded: Loaded, renderer: Renderer, config: RunConfig
) -> tuple[list[tuple[Row, dict[str, Any]]], list[Rejected]]:
    """The rows that fit, tokenised, and all rows refused until now."""
    progress = Progress("prepare", len(loaded.rows), "rows")
    encoded, refused = encode_rows(loaded.rows, renderer, config.data, config.evaluation.final_answer, progress)
    rejected = loaded.rejected + refused
    require_usable(loaded, rejected, config.data.max_bad_share)
    return encoded, rejected


def _summary(
    loaded: Loaded, tables: dict[str, pa.Table], bad: dict[str, list[Rejected]], dropped: int
) -> dict[str, Any]:
    both = pa.concat_tables(tables.values())
    return {
        "records": loaded.records,
        "last_records": loaded.last,
        "train_rows": tables["train"].num_rows,
        "heldout_rows": tables["heldout"].num_rows,
        "bad_rows": by_reason(bad["train"] + bad["heldout"]),
        "exact_duplicates": loaded.duplicates.exact,
        "prompts_with_several_answers": loaded.duplicates.prompts,
        "train_rows_dropped_as_heldout": dropped,
        "truncated_answers": both["answer_truncated"].to_pylist().count(True),
        "final_answers": tables["heldout"].num_rows - tables["heldout"]["final_answer"].null_count,
        "prompt_tokens": spread([len(ids) for ids in both["prompt_ids"].to_pylist()]),
        "answer_tokens": spread([len(ids) for ids in both["answer_ids"].to_pylist()]),
    }


def require_adaptable(folder: Path, config: RunConfig) -> None:
    """Raise BadInput now for what training with an adapter would refuse after a round was generated and scored."""
    from spinreg_core.adapters import add_adapter
    from spinreg_core.quantize import require_library
    from spinreg_core.ranks import processes_here
    from spinreg_core.sharding import empty_policy, require_weights

    bits, resources = config.training.lora_quantize, config.resources
    model = empty_policy(folder, config.training.precision)
    require_weights(model, folder)
    add_adapter(model, config.training)
    if bits is not None:
        require_library(bits)
        ranks = processes_here(resources) * resources.nodes
        if ranks > 1:
            raise BadInput("resources.processes", f"{ranks} in all, with training.lora_quantize {bits}", "1")


def prepare_base(job: Job, source: Path) -> dict[str, Any]:
    """Publish the object `base`, a model folder; returns its manifest."""
    store, start = open_store(job.store), time.monotonic()
    bits = job.config.training.lora_quantize
    key = {"model": model_fingerprint(source)} | ({} if bits is None else {"rounded_to": bits})
    job = replace(job, stage="base", key=key, object_id=fingerprint("base", key))
    found = read_manifest(store, job.object_id)
    if found is not None:
        print(f"the base model is in the store already: {job.object_id}", flush=True)
        return found
    folder = job.workdir / "base"
    if bits is None:
        link_policy(source, folder / "policy")
    else:
        from spinreg_core.quantize import round_weights
        from spinreg_core.ranks import resolve_device

        print(f"rounding the base model to {bits}", flush=True)
        link_policy(source, job.workdir / "source")
        round_weights(source, folder / "policy", bits, torch.device(resolve_device(job.config.resources.device)))
        copy_rest(job.workdir / "source", folder / "policy", torch.float32)
    size = sum(path.stat().st_size for path in (folder / "policy").iterdir())
    metrics = {"bytes": size, "source": job.config.model}
    return publish(store, job, folder, metrics=metrics, seconds=time.monotonic() - start)


if __name__ == "__main__":
    main(run)
