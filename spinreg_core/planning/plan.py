"""The plan of a run: memory per device, tokens, FLOPs, time and disk, before it starts.

Decides: the utilisation assumed for each kind of work, the warnings, and the text. Leaves out: the formulas
(`cost_model`) and the model, data and machine that they are applied to (`inputs`). Counts from round 1, whatever an
existing run has done.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any, TypedDict

from spinreg_core.config import RunConfig, resolve_engine
from spinreg_core.errors import BadInput
from spinreg_core.formatting import format_bytes, format_count, format_duration, text_table
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
from spinreg_core.planning.inputs import Machine, read_machine, read_shape, read_sizes
from spinreg_core.store.open import open_store

# Share of the rate of plain matrix products that each kind of work is assumed to reach. Training and scoring: between
# 0.2 (small models, short rows) and 0.4. Memory bounds sampling, not arithmetic: vLLM decodes many answers at once, and
# the loop of transformers one batch until its longest answer ends.
UTILISATION = {"train": 0.30, "score": 0.30, "generate with vllm": 0.15, "generate with hf": 0.05}
# torch, transformers and their libraries, loaded and idle; on a GPU the CUDA context.
PROCESS_BYTES = 2**30


class Work(TypedDict):
    tokens: float
    flops: float
    seconds: float


class Total(Work):
    store_bytes: int


class RoundPlan(Total):
    """The work of a round by stage, and the bytes that it adds to the store by content."""

    round: int
    prompts: int
    pairs: int
    stages: dict[str, Work]
    store: dict[str, int]


class Plan(TypedDict):
    """The needs of a run in bytes, seconds, tokens and FLOPs. `memory` is per device and stage, by part."""

    run: str
    model: dict[str, Any]
    data: dict[str, Any]
    machine: Machine
    engine: str
    utilisation: dict[str, float]
    memory: dict[str, dict[str, int]]
    rounds: list[RoundPlan]
    total: Total
    checkpoints_bytes: int
    warnings: list[str]


def plan(config: RunConfig, *, tflops: float | None = None) -> tuple[str, Plan]:
    """Return the needs of a run as text, and the same numbers as a JSON document (bytes, seconds, FLOPs).

    tflops: rate of the device in TFLOP/s for bfloat16 matrix products (float32 for precision fp32); default a
        measurement of one to two seconds.

    Raises:
        BadInput: a missing model or device, data that the run would refuse, or a rate that is not positive.
    """
    if tflops is not None and not 0 < tflops < float("inf"):
        raise BadInput("--tflops", tflops, "a positive number of TFLOP/s")
    folder, shape = read_shape(config.model)
    sizes, source = read_sizes(config, folder)
    machine = read_machine(config, tflops)
    engine = resolve_engine(config.generation.engine)
    last = config.until_round if config.until_round is not None else config.rounds or 1
    rounds = [_round(config, shape, sizes, number, machine, engine) for number in range(last + 1)]
    memory = stage_memory(config, shape, sizes, engine=engine, device=machine["device"], shards=machine["shards"])
    document: Plan = {
        "run": config.run,
        "model": {"source": config.model} | asdict(shape),
        "data": {"dataset": config.dataset, "source": source} | asdict(sizes),
        "machine": machine,
        "engine": engine,
        "utilisation": UTILISATION,
        "memory": {
            stage: parts | {"process": PROCESS_BYTES, "total": sum(parts.values()) + PROCESS_BYTES}
            for stage, parts in memory.items()
        },
        "rounds": rounds,
        "total": {
            "tokens": sum(entry["tokens"] for entry in rounds),
            "flops": sum(entry["flops"] for entry in rounds),
            "seconds": sum(entry["seconds"] for entry in rounds),
            "store_bytes": sum(entry["store_bytes"] for entry in rounds),
        },
        "checkpoints_bytes": max(checkpoints_bytes(config, shape, sizes, n) for n in range(1, last + 2)),
        "warnings": [],
    }
    document["warnings"] = warnings(config, document)
    return describe(document), document


def _round(config: RunConfig, shape: Shape, sizes: Sizes, number: int, machine: Machine, engine: str) -> RoundPlan:
    stages: dict[str, Work] = {}
    for stage, works in round_work(config, shape, sizes, number).items():
        seconds = 0.0
        for work in works:
            kind = f"generate with {engine}" if work.kind == "generate" else work.kind
            devices = machine["devices"]
            # Held-out prompts are answered on one machine.
            if work.kind == "generate" and stage == "evaluate":
                devices = max(1, devices // config.resources.nodes)
            seconds += work.flops / (devices * machine["tflops"] * 1e12 * UTILISATION[kind])
        tokens, flops = sum(work.tokens for work in works), sum(work.flops for work in works)
        stages[stage] = {"tokens": tokens, "flops": flops, "seconds": seconds}
    store = round_store(config, shape, sizes, number)
    return {
        "round": number,
        "prompts": prompts(config, sizes) if number else 0,
        "pairs": pairs(config, sizes, number) if number else 0,
        "stages": stages,
        "tokens": sum(stage["tokens"] for stage in stages.values()),
        "flops": sum(stage["flops"] for stage in stages.values()),
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "store": store,
        "store_bytes": sum(store.values()),
    }


def warnings(config: RunConfig, document: Plan) -> list[str]:
    """Return warnings about stages that do not fit in memory, and a run that does not fit on a local store's disk."""
    found = []
    machine = document["machine"]
    room = machine["memory_bytes"]
    for stage, parts in document["memory"].items():
        if parts["total"] > room:
            largest = max((name for name in parts if name != "total"), key=parts.__getitem__)
            found.append(
                f"{stage} needs about {format_bytes(parts['total'])} and the {machine['device']} has "
                f"{format_bytes(room)}; the largest part is {largest} ({format_bytes(parts[largest])})"
            )
    place = open_store(config.store).local_path(f"runs/{config.run}")
    if place is not None:
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        growth = document["total"]["store_bytes"] + document["checkpoints_bytes"]
        if growth > free:
            found.append(
                f"the store will grow by up to {format_bytes(growth)} and {place} has {format_bytes(free)} free"
            )
    return found


def describe(document: Plan) -> str:
    """Return the plan as text."""
    model, data, machine = document["model"], document["data"], document["machine"]
    lines = [
        f"run      {document['run']}",
        f"model    {model['source']}: {format_count(model['parameters'])} parameters, {model['layers']} layers of "
        f"width {model['width']}, vocabulary of {model['vocabulary']}",
        f"data     {data['dataset']}: {data['train_rows']} training and {data['heldout_rows']} held-out rows",
        f"tokens   on average {data['prompt']:.0f} in a prompt and {data['answer']:.0f} in a human answer "
        f"({data['source']}); {data['generated']:.0f} in a generated answer (as long as allowed)",
        f"machine  {machine['device']}, {format_bytes(machine['memory_bytes'])}, {machine['tflops']:.3g} TFLOP/s "
        f"({machine['tflops_source']})",
    ]
    if machine["ranks"] > 1:
        lines.append(f"ranks    {machine['ranks']}, the weights spread over {machine['shards']}")
    lines += ["", f"memory of one {'device' if machine['ranks'] == 1 else 'rank'}, at the longest rows"]
    names = [name for parts in document["memory"].values() for name in parts if name != "total"]
    names = [*dict.fromkeys(names), "total"]
    rows = [["", *names]]
    for stage, parts in document["memory"].items():
        rows.append([stage, *(format_bytes(parts[name]) if parts.get(name) else "-" for name in names)])
    lines += [*_indented(rows), "", "work"]
    rows = [["round", "prompts", "pairs", "tokens", "FLOP", "time", "training", "store"]]
    for entry in document["rounds"]:
        name, train = str(entry["round"] or "0 (base)"), entry["stages"].get("train")
        rows.append(_row(name, entry["prompts"], entry["pairs"], entry, train and train["seconds"]))
    rows.append(_row("all", 0, 0, document["total"], None))
    used = [kind for kind in UTILISATION if kind in ("train", "score", f"generate with {document['engine']}")]
    lines += [
        *_indented(rows),
        "",
        "Time assumes these shares of the machine's rate, and no waiting: "
        + ", ".join(f"{kind} {document['utilisation'][kind]:.0%}" for kind in used) + ".",
        f"While a round is trained, its checkpoints take up to {format_bytes(document['checkpoints_bytes'])} more of "
        "the store; they are deleted after it. Only `spinreg gc --delete` deletes more.",
        *(f"WARNING: {text}" for text in document["warnings"]),
    ]  # fmt: skip
    return "\n".join(lines)


def _row(name: str, prompts: int, pairs: int, needs: Total, training: float | None) -> list[str]:
    return [
        name, str(prompts or "-"), str(pairs or "-"), format_count(needs["tokens"]), format_count(needs["flops"]),
        format_duration(needs["seconds"]), "-" if training is None else format_duration(training),
        format_bytes(needs["store_bytes"]),
    ]  # fmt: skip


def _indented(rows: list[list[str]]) -> list[str]:
    return [f"  {line}" for line in text_table(rows, right=True)]
