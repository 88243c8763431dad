"""What a configuration will need before it is started: memory per device, tokens, FLOPs, time, disk.

Decides: where the numbers come from (the model's own config, the data where they can be read, a short measurement of
this machine), the utilisation assumed per kind of work, what is warned of, and how it reads.
Leaves out: the formulas (`cost_model.py`). Counts from round 1, whatever an existing run has done.

torch and transformers are imported inside the functions, so that the flow process can import this file.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spinreg_core.config import RunConfig, resolve_engine
from spinreg_core.errors import BadInput
from spinreg_core.formatting import first_line
from spinreg_core.planning.cost_model import (
    Shape,
    Sizes,
    checkpoints_bytes,
    pairs,
    prompts,
    round_store,
    round_work,
    stage_memory,
)
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.open import open_store

# Share of the rate of plain matrix products that each kind of work is assumed to reach. Training and scoring: between
# 0.2 (small models, short rows) and 0.4. Answering is bound by memory, not by arithmetic: vLLM keeps many answers in
# flight, transformers' own loop one batch until its longest answer ends.
UTILISATION = {"train": 0.30, "score": 0.30, "generate with vllm": 0.15, "generate with hf": 0.05}
SAMPLED_ROWS = 512  # rows tokenised to learn the lengths
# torch, transformers and their libraries, loaded and idle; on a GPU the CUDA context.
PROCESS_BYTES = 2**30
MIB, GIB = 2**20, 2**30


def plan(config: RunConfig, *, tflops: float | None = None) -> tuple[str, dict[str, Any]]:
    """The needs of a run as text for people, and the same numbers as a JSON document (bytes, seconds, FLOPs).

    tflops: rate of the device in TFLOP/s for bfloat16 matrix products (float32 for precision fp32); unset: measured
        here, which takes a second or two.

    Raises BadInput for a model that is not there, a device that is not there, or a rate that is not positive.
    """
    if tflops is not None and not 0 < tflops < float("inf"):
        raise BadInput("--tflops", tflops, "a positive number of TFLOP/s")
    folder, shape = read_shape(config.model)
    sizes, source = read_sizes(config, folder)
    machine = read_machine(config, tflops)
    engine = resolve_engine(config.generation.engine)
    last = config.until_round if config.until_round is not None else config.rounds or 1
    rounds = [_round(config, shape, sizes, number, machine, engine) for number in range(last + 1)]
    memory = {
        stage: parts | {"process": PROCESS_BYTES, "total": sum(parts.values()) + PROCESS_BYTES}
        for stage, parts in stage_memory(
            config, shape, sizes, engine=engine, device=machine["device"], shards=machine["shards"]
        ).items()
    }
    document: dict[str, Any] = {
        "run": config.run,
        "model": {"source": config.model} | asdict(shape),
        "data": {"dataset": config.dataset, "source": source} | asdict(sizes),
        "machine": machine,
        "engine": engine,
        "utilisation": UTILISATION,
        "memory": memory,
        "rounds": rounds,
        "total": {name: sum(entry[name] for entry in rounds) for name in ("tokens", "flops", "seconds", "store_bytes")},
    }
    document["checkpoints_bytes"] = max(checkpoints_bytes(config, shape, sizes, n) for n in range(1, last + 2))
    document["warnings"] = warnings(config, document)
    return describe(document), document


def read_shape(model: str) -> tuple[Path, Shape]:
    """The folder with the model's configuration and tokenizer, and its sizes. Raises BadInput.

    Of a model on the hub only the small files are fetched; a package is converted, as the run would do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from spinreg_core.models.source import resolve_model, tokenizer_folder

    folder = (resolve_model if model.startswith("package:") else tokenizer_folder)(model, cache_folder())
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        stored = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):  # shapes without memory
            shapes: Any = AutoModelForCausalLM.from_config(config, dtype=stored, trust_remote_code=False)
            parameters = shapes.num_parameters()
    except Exception as error:  # of many kinds, and whatever it is, it is about this model
        raise BadInput(
            "model", f"{model!r}, whose shape cannot be read ({first_line(error)})", "a causal language model"
        ) from None
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return folder, Shape(
        parameters=parameters,
        layers=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        mlp_width=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        heads=heads,
        kv_width=int(getattr(text, "num_key_value_heads", None) or heads) * int(size),
        vocabulary=int(text.vocab_size),
        stored_bytes=stored.itemsize,
    )


def _from_limits(config: RunConfig, error: BadInput | OSError) -> tuple[Sizes, str]:
    """What `read_sizes` returns where the data cannot be read, and why. Raises `error` where nothing says how many rows
    there are."""
    data = config.data
    if data.prompts_per_round is None:
        raise error
    sizes = Sizes(
        train_rows=data.prompts_per_round, heldout_rows=data.heldout_rows, prompt=data.max_prompt_tokens,
        answer=data.max_length - data.max_prompt_tokens, generated=config.generation.max_new_tokens,
        longest_prompt=data.max_prompt_tokens, longest_answer=data.max_length - data.max_prompt_tokens,
    )  # fmt: skip
    return sizes, f"the configured limits, because the data could not be read: {error}"


def read_sizes(config: RunConfig, folder: Path) -> tuple[Sizes, str]:
    """Rows and lengths, and where they come from: the data, or the configured limits where those cannot be read.

    Generated answers are taken to be as long as they may be.
    """
    from spinreg_core.data.filters import load_training
    from spinreg_core.data.load import load_heldout, require_usable
    from spinreg_core.data.row_file import take_rows
    from spinreg_core.data.split import given_heldout, split_rows
    from spinreg_core.models.chat_template import Renderer

    data, new = config.data, config.generation.max_new_tokens
    try:
        loaded = load_training(config.dataset, data).loaded
        require_usable(loaded, loaded.rejected, data.max_bad_share)
        given = load_heldout(config.dataset, data)
    except (BadInput, OSError) as error:
        return _from_limits(config, error)
    train, held = (  # refused here as by `prepare`
        split_rows(loaded.rows, data.heldout_rows, config.seed)
        if given is None
        else given_heldout(loaded.rows, given.rows, data.heldout_rows, config.seed)
    )
    rows, heldout = take_rows(loaded.rows, train), len(held)
    try:
        renderer = Renderer.from_folder(folder, config.data.template_arguments)
        chosen = rows[:: -(-len(rows) // SAMPLED_ROWS)]
        lengths = []
        for row in chosen:
            try:
                prompt = len(renderer.prompt_ids(row.messages, row.tools))
                answer = len(renderer.answer_ids(row.messages, row.reply, row.tools))
            except BadInput:  # a bad row for the run too, which goes on without it
                continue
            if prompt <= data.max_prompt_tokens:
                lengths.append((prompt, min(answer, data.max_length - prompt)))
        if not lengths:
            raise BadInput("data.max_prompt_tokens", f"{data.max_prompt_tokens}, below every prompt", "a larger one")
    except (BadInput, OSError) as error:
        return _from_limits(config, error)
    whole = len(chosen) == len(rows)
    longest = max(prompt for prompt, _ in lengths), max(max(answer, new) for _, answer in lengths)
    if not whole:  # a longer row may be among those not looked at
        longest = data.max_prompt_tokens, data.max_length - data.max_prompt_tokens
    sizes = Sizes(
        train_rows=round(len(rows) * len(lengths) / len(chosen)),
        heldout_rows=heldout,
        prompt=sum(prompt for prompt, _ in lengths) / len(lengths),
        answer=sum(answer for _, answer in lengths) / len(lengths),
        generated=float(new),
        longest_prompt=longest[0],
        longest_answer=longest[1],
    )
    return sizes, f"measured on {len(chosen)} of {len(rows)} training rows"


def read_machine(config: RunConfig, tflops: float | None) -> dict[str, Any]:
    """Device, its memory and rate. Raises BadInput for a GPU that is not there."""
    import torch

    from spinreg_core.runtime.distributed import processes_here, resolve_device

    device = resolve_device(config.resources.device)
    here = processes_here(config.resources)
    shards = here if config.resources.shard_over == "auto" else config.resources.shard_over
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else _main_memory() // here
    source = "stated"
    if tflops is None:
        dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
        tflops = measured_tflops(device, dtype)
        source = (
            f"measured in a second, {str(dtype).removeprefix('torch.')} matrix product: work beside it lowers it, "
            "--tflops states it"
        )
    # The ranks of a CPU share the cores that were measured.
    devices = here * config.resources.nodes if device == "cuda" else config.resources.nodes
    return {"device": device, "ranks": here * config.resources.nodes, "shards": shards, "devices": devices,
            "memory_bytes": memory, "tflops": tflops, "tflops_source": source}  # fmt: skip


def measured_tflops(device: str, dtype: Any, seconds: float = 1.0) -> float:
    """TFLOP/s of matrix products on a device, the best of what `seconds` allow (2 n^3 operations each)."""
    import torch

    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.monotonic() + seconds
    while best == float("inf") or time.monotonic() < end:
        start = time.perf_counter()
        _ = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12


def _main_memory() -> int:
    """Bytes of memory this process may use: the machine's, or what its control group leaves it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup", name)
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            found = min(found, int(text))
    return found


def _round(
    config: RunConfig, shape: Shape, sizes: Sizes, number: int, machine: dict[str, Any], engine: str
) -> dict[str, Any]:
    stages = {}
    for stage, works in round_work(config, shape, sizes, number).items():
        seconds = 0.0
        for work in works:
            kind = f"generate with {engine}" if work.kind == "generate" else work.kind
            devices = machine["devices"]
            if work.kind == "generate" and stage == "evaluate":  # held-out prompts are one machine's
                devices = max(1, devices // config.resources.nodes)
            seconds += work.flops / (devices * machine["tflops"] * 1e12 * UTILISATION[kind])
        stages[stage] = {
            "tokens": sum(work.tokens for work in works),
            "flops": sum(work.flops for work in works),
            "seconds": seconds,
        }
    store = round_store(config, shape, sizes, number)
    return {
        "round": number,
        "prompts": prompts(config, sizes) if number else 0,
        "pairs": pairs(config, sizes, number) if number else 0,
        "stages": stages,
        **{name: sum(stage[name] for stage in stages.values()) for name in ("tokens", "flops", "seconds")},
        "store": store,
        "store_bytes": sum(store.values()),
    }


def warnings(config: RunConfig, document: dict[str, Any]) -> list[str]:
    """What will not fit: stages in memory, the run on the disk of a local store."""
    found = []
    machine = document["machine"]
    room = machine["memory_bytes"]
    for stage, parts in document["memory"].items():
        if parts["total"] > room:
            largest = max((name for name in parts if name != "total"), key=parts.__getitem__)
            found.append(
                f"{stage} needs about {_bytes(parts['total'])} and the {machine['device']} has {_bytes(room)}; "
                f"the largest part is {largest} ({_bytes(parts[largest])})"
            )
    place = open_store(config.store).local_path(f"runs/{config.run}")
    if place is not None:
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        growth = document["total"]["store_bytes"] + document["checkpoints_bytes"]
        if growth > free:
            found.append(f"the store will grow by up to {_bytes(growth)} and {place} has {_bytes(free)} free")
    return found


def _bytes(count: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def _count(value: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _table(rows: list[list[str]]) -> list[str]:
    """Lines of columns; the first is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]


def describe(document: dict[str, Any]) -> str:
    """The document as text."""
    model, data, machine = document["model"], document["data"], document["machine"]
    lines = [
        f"run      {document['run']}",
        f"model    {model['source']}: {_count(model['parameters'])} parameters, {model['layers']} layers of width "
        f"{model['width']}, vocabulary of {model['vocabulary']}",
        f"data     {data['dataset']}: {data['train_rows']} training and {data['heldout_rows']} held-out rows",
        f"tokens   on average {data['prompt']:.0f} in a prompt and {data['answer']:.0f} in a human answer "
        f"({data['source']}); {data['generated']:.0f} in a generated answer (as long as allowed)",
        f"machine  {machine['device']}, {_bytes(machine['memory_bytes'])}, {machine['tflops']:.3g} TFLOP/s "
        f"({machine['tflops_source']})",
        *(
            [f"ranks    {machine['ranks']}, the weights spread over {machine['shards']}"]
            if machine["ranks"] > 1
            else []
        ),
        "",
        f"memory of one {'device' if machine['ranks'] == 1 else 'rank'}, at the longest rows",
    ]
    names = list(dict.fromkeys(name for parts in document["memory"].values() for name in parts if name != "total"))
    names.append("total")
    rows = [["", *names]]
    for stage, parts in document["memory"].items():
        rows.append([stage, *(_bytes(parts[name]) if parts.get(name) else "-" for name in names)])
    lines += [*_table(rows), "", "work"]
    rows = [["round", "prompts", "pairs", "tokens", "FLOP", "time", "of which train", "store"]]
    for entry in [*document["rounds"], document["total"]]:
        number = entry.get("round", "all")
        train = entry.get("stages", {}).get("train", {}).get("seconds")
        rows.append(
            [
                "0 (base)" if number == 0 else str(number), str(entry.get("prompts") or "-"),
                str(entry.get("pairs") or "-"), _count(entry["tokens"]), _count(entry["flops"]),
                _duration(entry["seconds"]), _duration(train) if train is not None else "-",
                _bytes(entry["store_bytes"]),
            ]
        )  # fmt: skip
    lines += _table(rows)
    used = {kind: share for kind, share in document["utilisation"].items() if kind != _other(document["engine"])}
    lines += [
        "",
        "Time assumes these shares of the machine's rate, and no waiting: "
        + ", ".join(f"{kind} {share:.0%}" for kind, share in used.items()) + ".",
        f"While a round is trained, its checkpoints take up to {_bytes(document['checkpoints_bytes'])} of the store "
        "more; they are deleted after it. Only `spinreg gc --delete` deletes more.",
    ]  # fmt: skip
    lines += [f"WARNING: {text}" for text in document["warnings"]]
    return "\n".join(lines)


def _other(engine: str) -> str:
    return "generate with hf" if engine == "vllm" else "generate with vllm"
