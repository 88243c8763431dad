"""Run by test_published_base.py in a process of its own: python vllm_model.py REQUEST.json RESULT.json

A folder as vLLM alone reads it: answers with their log-probabilities, the ids of a rendered question, the end tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from spinreg_core.generation.vllm import ENVIRONMENT


def main(request: Path, result: Path) -> None:
    os.environ.update(ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"})
    from vllm import LLM, SamplingParams

    asked: dict[str, Any] = json.loads(request.read_text())
    llm = LLM(model=asked["policy"], dtype="float32", max_model_len=200, enforce_eager=True,
              kv_cache_memory_bytes=2**28, use_tqdm_on_load=False)  # fmt: skip
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in asked["prompts"]],
        SamplingParams(temperature=1.0, max_tokens=12, logprobs=0),
        use_tqdm=False,
    )
    answers = [[list(one.outputs[0].token_ids), one.outputs[0].cumulative_logprob] for one in outputs]
    (chat,) = llm.chat(asked["question"], SamplingParams(max_tokens=1), use_tqdm=False)
    # Every request gets the end tokens that vLLM read from the folder.
    parameters = SamplingParams(max_tokens=1)
    processor = llm.llm_engine.input_processor
    parameters.update_from_generation_config(processor.generation_config_fields, llm.get_tokenizer().eos_token_id)
    ends = sorted(parameters.all_stop_token_ids)
    result.write_text(json.dumps({"answers": answers, "question": list(chat.prompt_token_ids), "ends": ends}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
