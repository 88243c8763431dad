"""The hf engine: decoding in this process, with transformers' models. Runs on every device of torch.

Decides: that only spinreg's settings have effect, how much is decoded at once, and the retry after running out of
memory. Leaves out: the decoding loop (`generation.decode`), several GPUs (`generation.pool`).

A model with another memory than keys and values per position (Mamba's states, say) is decoded by transformers' own
loop, one batch of equally long prompts at a time, which is forced to take our draws.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig as HfGenerationConfig
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from spinreg_core.config import ResourcesConfig
from spinreg_core.errors import BadInput
from spinreg_core.generation.compiled_step import Step
from spinreg_core.generation.decode import Decoding
from spinreg_core.generation.engine import Answer, Sampling, check_prompts, cut, kv_width
from spinreg_core.generation.kv_slots import has_slots
from spinreg_core.generation.sampler import sample, uniforms
from spinreg_core.runtime.failures import is_out_of_memory


class HfEngine:
    """Samples one policy, or the token-level mixture of several (`sampler.mixed_logits`).

    Args:
        models: used in their own number format and on their own device.
        tokens: see `Decoding`.
        step: the decoding step (None: never compiled).

    Raises:
        BadInput: the models of a mixture differ in vocabulary, or have other memory than keys and values.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        *,
        weights: Sequence[float] = (1.0,),
        tokens: int,
        pad_id: int,
        step: Step | None = None,
    ) -> None:
        self._models, self._weights = list(models), list(weights)
        self._step = step or Step(compile=False)
        self._tokens, self._pad_id = tokens, pad_id
        sizes = {model.config.get_text_config().vocab_size for model in models}
        if len(sizes) > 1:
            raise BadInput("policies of a mixture", f"have vocabularies of {sorted(sizes)} tokens", "one vocabulary")
        if len(models) > 1 and not all(map(has_slots, models)):
            names = ", ".join(type(model).__name__ for model in models)
            raise BadInput("policies of a mixture", f"are {names}, which keep more than keys and values",
                           "transformers with attention in all layers")  # fmt: skip

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
    ) -> list[Answer]:
        """See `Engine.generate`. After running out of memory, the rest is decoded with half as many tokens at once."""
        assert self._models, "the engine was closed"
        for model in self._models:
            check_prompts(prompts, sampling, model.config)
        answers: dict[int, Answer] = {}

        def note(asked: list[int], k: int, answer: Answer) -> None:
            answers[asked[k]] = answer
            on_answer(asked[k], answer)

        left = list(range(len(prompts)))
        while left:
            try:
                self._decode([prompts[i] for i in left], [seeds[i] for i in left], sampling, partial(note, left))
            except RuntimeError as error:
                self._take_less(error, prompts, sampling)
            left = [i for i in left if i not in answers]
        return [answers[i] for i in range(len(prompts))]

    def _decode(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, note: Callable[[int, Answer], None]
    ) -> None:
        if all(map(has_slots, self._models)):
            Decoding(self._models, self._weights, prompts, seeds, sampling, self._tokens, self._pad_id, self._step,
                     note).run()  # fmt: skip
            return
        # Prompts of one length only: some states (MiniMax) do not leave out the padding of shorter prompts.
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for length, same in groupby(by_length, key=lambda i: len(prompts[i])):
            size = max(1, self._tokens // (length + sampling.max_new_tokens))
            while batch := list(islice(same, size)):
                found = _batch(self._models[0], [prompts[i] for i in batch], [seeds[i] for i in batch], sampling,
                               self._pad_id)  # fmt: skip
                for i, answer in zip(batch, found, strict=True):
                    note(i, answer)

    def _take_less(self, error: RuntimeError, prompts: list[list[int]], sampling: Sampling) -> None:
        """Halve the tokens that are decoded at once. Raises the error again where that cannot help."""
        if not is_out_of_memory(error):
            raise error
        reason = str(error).splitlines()[0]
        if self._tokens <= max(map(len, prompts)) + sampling.max_new_tokens:
            raise BadInput(
                "resources.kv_cache_tokens",
                f"cannot be met: memory is too small for one answer ({reason})",
                "set a smaller generation.max_new_tokens, or use shorter prompts or more memory",
            ) from error
        self._tokens //= 2
        print(f"out of memory ({reason}); continuing with {self._tokens} tokens at once", flush=True)
        _free_memory()

    def close(self) -> None:
        self._models = []
        _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tokens_at_once(models: Sequence[PreTrainedModel], resources: ResourcesConfig) -> int:
    """Return `resources.kv_cache_tokens`; auto is 8192 on a CPU, and as many as half of a GPU's free memory holds."""
    if resources.kv_cache_tokens != "auto":
        return resources.kv_cache_tokens
    device = models[0].device
    if device.type != "cuda":
        return 8192
    size = 0
    for model in models:
        text = model.config.get_text_config()
        size += 2 * text.num_hidden_layers * kv_width(text) * model.dtype.itemsize
    # Growing copies the keys and values, and activations and logits need memory as well.
    free, _ = torch.cuda.mem_get_info(device)
    return max(8192, int(0.5 * free / size))


class _Forced(LogitsProcessor):
    """Makes transformers' greedy loop take the tokens that we draw, by giving all others probability 0."""

    def __init__(self, sampling: Sampling, seeds: list[int]) -> None:
        self._sampling, self._draws = sampling, [uniforms(seed) for seed in seeds]
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        numbers = torch.tensor([uniform() for uniform in self._draws], dtype=torch.float64)
        tokens, logprobs = sample(scores, self._sampling, numbers)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


@torch.no_grad()
def _batch(
    model: PreTrainedModel, prompts: list[list[int]], seeds: list[int], sampling: Sampling, pad_id: int
) -> list[Answer]:
    """Return answers to prompts of one length."""
    ids = torch.tensor(prompts, device=model.device)
    config = HfGenerationConfig(do_sample=False, max_new_tokens=sampling.max_new_tokens, use_cache=True,
                                eos_token_id=list(sampling.stop_ids), pad_token_id=pad_id)  # fmt: skip
    forced = _Forced(sampling, seeds)
    # `generate` takes unset fields from the model's own generation_config, so that is replaced by an empty one.
    checkpoints_own, model.generation_config = model.generation_config, HfGenerationConfig()
    try:
        generate: Any = model.generate
        output: Tensor = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([forced]),
        )
    finally:
        model.generation_config = checkpoints_own
    logprobs = torch.stack(forced.logprobs, dim=1).tolist()
    return [cut(row, sampling, own) for row, own in zip(output[:, ids.shape[1] :].tolist(), logprobs, strict=True)]
