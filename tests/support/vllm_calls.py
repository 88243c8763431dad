"""Run by test_vllm.py in a process of its own: python vllm_calls.py REQUEST.json ANSWERS.json

A vLLM in the test process would keep its threads, environment and memory to the end of the session.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil

from spinreg_core.config import GenerationConfig, ResourcesConfig
from spinreg_core.errors import BadInput
from spinreg_core.generation.engine import Sampling
from spinreg_core.generation.open import open_engine


def main(request: Path, result: Path) -> None:
    given = json.loads(request.read_text())
    generation = GenerationConfig(engine="vllm", dtype="float32")
    resources = ResourcesConfig(cpu_kv_cache_gib=0.25)
    engine = open_engine("vllm", [Path(given["policy"])], generation, resources, pad_id=0, longest=given["longest"])
    answers: list[object] = []
    for call in given["calls"]:
        sampling = Sampling(**call["sampling"] | {"stop_ids": tuple(call["sampling"]["stop_ids"])})
        try:
            found = engine.generate(call["prompts"], sampling, call["seeds"])
            answers.append([[a.token_ids, a.finish, a.logprobs] for a in found])
        except BadInput as error:
            answers.append(str(error))
    children = [process.name() for process in psutil.Process().children(recursive=True)]
    engine.close()
    result.write_text(json.dumps({"answers": answers, "children": children}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
