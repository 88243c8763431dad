"""Run by test_vllm_adapter.py in a process of its own: python vllm_scores.py REQUEST.json RESULT.json

Answers sampled by vLLM with their log-probabilities: from a merged policy, and from the base with the adapter. (vLLM
0.32 on CPUs fails when it is asked for the log-probabilities of given tokens under an adapter.)
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
    from vllm.lora.request import LoRARequest

    asked: dict[str, Any] = json.loads(request.read_text())

    def sampled(policy: str, adapter: str | None) -> list[Any]:
        settings: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
        llm = LLM(model=policy, skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True,
                  kv_cache_memory_bytes=2**28, use_tqdm_on_load=False, **settings)  # fmt: skip
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in asked["prompts"]],
            SamplingParams(temperature=1.0, max_tokens=8, logprobs=0, ignore_eos=True, detokenize=False),
            lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        return [[list(answer.token_ids), answer.cumulative_logprob] for answer in answers]

    found = {"merged": sampled(asked["merged"], None), "adapter": sampled(asked["base"], asked["adapter"])}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
