"""The stage `prepare`: checked, split, tokenised rows and the base model go into the store, once per run.

Decides: the order of the checks (rows before any model, token lengths with the tokenizer alone, weights last),
and what the fingerprints of `data` and `base` cover. Leaves out: reading (`data/`), rendering, model sources.

Its two objects are named by contents that only this stage sees, so the job carries no object id. It leaves
`result.json` in the workdir: {"base": object id, "data": object id}.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spinreg_core.cache import cache_folder
from spinreg_core.config import RunConfig
from spinreg_core.data.encode import encode_rows, rows_table
from spinreg_core.data.formats import Rejected
from spinreg_core.data.load import Loaded, by_reason, load_heldout, load_rows, require_usable
from spinreg_core.data.split import given_heldout, split_rows
from spinreg_core.model_source import link_policy, model_fingerprint, resolve_model, tokenizer_folder
from spinreg_core.objects import fingerprint, publish, read_manifest, sha256_file
from spinreg_core.render import Renderer
from spinreg_core.stages.job import Job, main
from spinreg_core.store import open_store

SHARED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def run(job: Job) -> dict[str, Any]:
    """Publish both objects. Returns the manifest of `data`. Raises BadInput."""
    config = job.config
    loaded, heldout = load_rows(config.dataset, config.data), load_heldout(config.dataset, config.data)
    for part in (loaded, heldout):
        if part is not None:
            _tell(part, part.rejected)
            require_usable(part, part.rejected, config.data.max_bad_share)
    tokenizer = tokenizer_folder(config.model, cache_folder())
    data = _prepare_data(job, loaded, heldout, tokenizer)
    base = _prepare_base(job, resolve_model(config.model, cache_folder()))
    result = {"base": base["object_id"], "data": data["object_id"]}
    (job.workdir / "result.json").write_text(json.dumps(result))
    return data


def _tell(loaded: Loaded, rejected: list[Rejected]) -> None:
    counts = ", ".join(f"{count} {reason}" for reason, count in by_reason(rejected).items()) or "none"
    print(
        f"{loaded.dataset} ({loaded.format}): {loaded.records} records, {len(loaded.rows)} rows; bad rows: {counts}; "
        f"{loaded.duplicates.exact} exact duplicates left out; "
        f"{loaded.duplicates.prompts} prompts with several answers",
        flush=True,
    )


def _rendering(folder: Path) -> dict[str, str]:
    """What decides token ids, by file: equal for models that share tokenizer, template and ends of turn."""
    return {name: sha256_file(folder / name) for name in SHARED if (folder / name).is_file()}


def data_key(config: RunConfig, loaded: Loaded, heldout: Loaded | None, rendering: dict[str, str]) -> dict[str, Any]:
    """What the `data` object is fingerprinted by."""
    return {
        "rows": loaded.content_hash(),
        "heldout": None if heldout is None else heldout.content_hash(),
        "limits": config.data.model_dump(
            mode="json", include={"turns", "max_prompt_tokens", "max_length", "heldout_rows"}
        ),
        "final_answer": config.evaluation.final_answer,
        "seed": config.seed,
        "rendering": rendering,
    }


def _prepare_data(job: Job, loaded: Loaded, heldout: Loaded | None, tokenizer: Path) -> dict[str, Any]:
    config, store = job.config, open_store(job.store)
    start = time.monotonic()
    key = data_key(config, loaded, heldout, _rendering(tokenizer))
    job = replace(job, stage="data", key=key, object_id=fingerprint("data", key))
    found = read_manifest(store, job.object_id)
    if found is not None:
        print(f"rows are in the store already: {job.object_id}", flush=True)
        return found
    renderer = Renderer.from_folder(tokenizer)
    encoded, refused = encode_rows(loaded.rows, renderer, config.data, config.evaluation.final_answer)
    rejected = loaded.rejected + refused
    require_usable(loaded, rejected, config.data.max_bad_share)
    rows, dropped = [row for row, _ in encoded], 0
    if heldout is None:
        train, held = split_rows(rows, config.data.heldout_rows, config.seed)
    else:
        more, refused = encode_rows(heldout.rows, renderer, config.data, config.evaluation.final_answer)
        require_usable(heldout, heldout.rejected + refused, config.data.max_bad_share)
        encoded += more
        train, held, dropped = given_heldout(rows, [row for row, _ in more], config.data.heldout_rows, config.seed)
        rejected += heldout.rejected + refused
    folder = job.workdir / "data"
    folder.mkdir()
    tables = {"train": rows_table(train, encoded), "heldout": rows_table(held, encoded)}
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    summary: dict[str, Any] = {
        "records": loaded.records,
        "train_rows": len(train),
        "heldout_rows": len(held),
        "bad_rows": by_reason(rejected),
        "exact_duplicates": loaded.duplicates.exact,
        "prompts_with_several_answers": loaded.duplicates.prompts,
        "train_rows_dropped_as_heldout": dropped,
        "truncated_answers": sum(table["answer_truncated"].to_pylist().count(True) for table in tables.values()),
    }
    (folder / "rejected.json").write_text(json.dumps([asdict(bad) for bad in rejected], indent=1))
    (folder / "summary.json").write_text(json.dumps(summary | {"duplicates": asdict(loaded.duplicates)}, indent=1))
    print(
        f"{len(train)} rows to train on, {len(held)} held out, {summary['truncated_answers']} answers cut", flush=True
    )
    return publish(store, job, folder, metrics=summary, seconds=time.monotonic() - start)


def _prepare_base(job: Job, source: Path) -> dict[str, Any]:
    store, start = open_store(job.store), time.monotonic()
    key = {"model": model_fingerprint(source)}
    job = replace(job, stage="base", key=key, object_id=fingerprint("base", key))
    found = read_manifest(store, job.object_id)
    if found is not None:
        print(f"the base model is in the store already: {job.object_id}", flush=True)
        return found
    folder = job.workdir / "base"
    link_policy(source, folder / "policy")
    size = sum(path.stat().st_size for path in (folder / "policy").iterdir())
    return publish(store, job, folder, metrics={"bytes": size, "source": job.config.model},
                   seconds=time.monotonic() - start)  # fmt: skip


if __name__ == "__main__":
    main(run)
