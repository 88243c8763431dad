"""The hf engine: transformers' own sampling, batched, with a KV cache. Runs wherever torch runs.

Decides: that no setting but ours takes part, how prompts form batches, where randomness comes from.
Leaves out: taking finished rows out of a batch (it runs until its longest answer ends), several GPUs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig as HfGenerationConfig
from transformers import PreTrainedModel

from spinreg_core.config import GenerationConfig, ResourcesConfig
from spinreg_core.engines import Answer, Sampling, check_prompts, cut
from spinreg_core.errors import BadInput
from spinreg_core.logprobs import load_policy
from spinreg_core.ranks import resolve_device


class HfEngine:
    """`model` is used in its own number format and on its own device."""

    def __init__(self, model: PreTrainedModel, *, batch_size: int, pad_id: int) -> None:
        self._model: PreTrainedModel | None = model
        self._batch_size, self._pad_id = batch_size, pad_id

    @classmethod
    def open(cls, policy: Path, generation: GenerationConfig, resources: ResourcesConfig, *, pad_id: int) -> HfEngine:
        device = resolve_device(resources.device)
        # auto is for runs, which know their scores' format (`config.sampling_dtype`); alone it is the exact one.
        model = load_policy(policy, "bf16" if generation.dtype == "bfloat16" else "fp32", device)
        return cls(model, batch_size=generation.batch_size, pad_id=pad_id)

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, on_done: Callable[[int], None] = lambda n: None
    ) -> list[Answer]:
        """As `Engine.generate`. Draws depend on the batch size too; the global random state is left alone."""
        assert self._model is not None, "the engine was closed"
        model = self._model
        check_prompts(prompts, sampling, model.config)
        # Neighbours in length share a batch; the longest come first, so that a lack of memory shows at once.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        answers: dict[int, Answer] = {}
        # `generate` fills what our settings leave open from the checkpoint's, so the checkpoint's must be empty.
        checkpoints_own, model.generation_config = model.generation_config, HfGenerationConfig()
        training = model.training
        model.eval()
        try:
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(seed)
                for start in range(0, len(order), self._batch_size):
                    batch = order[start : start + self._batch_size]
                    rows = self._answer(model, [prompts[i] for i in batch], sampling)
                    answers |= {i: cut(row, sampling) for i, row in zip(batch, rows, strict=True)}
                    on_done(len(batch))
        except torch.OutOfMemoryError as error:
            raise BadInput(
                "generation.batch_size",
                f"{self._batch_size}, for which memory does not suffice ({str(error).splitlines()[0]})",
                "a smaller one under another run name, because draws depend on it",
            ) from error
        finally:
            model.generation_config = checkpoints_own
            model.train(training)
        return [answers[i] for i in range(len(prompts))]

    def _answer(self, model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        """Sampled ids per prompt; rows that ended before the longest one are filled with pad_id."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        config = HfGenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,  # 0, not None: None would mean transformers' default of 50
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=self._pad_id,
            use_cache=True,
        )
        sample: Any = model.generate
        output: torch.Tensor = sample(ids, attention_mask=mask, generation_config=config)
        return output[:, width:].tolist()

    def close(self) -> None:
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
