"""One decoding step of a model, compiled once that pays off.

Decides: when the engine changes to a compiled step, which sizes may change without compiling again, and that a model
without a compiled step is decoded eagerly, with a message.
Leaves out: the rest of decoding (`generation.decode`), keys and values of fixed shape (`generation.kv_slots`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spinreg_core.generation.kv_slots import Slots

# Compiling takes about a minute, which an engine with so many steps behind it saves in as many further steps.
AFTER_STEPS = 2000
Forward = Callable[[PreTrainedModel, Tensor, Tensor, Tensor, Slots], Tensor]


def last_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: object) -> Tensor:
    """Return logits [rows, vocabulary] after the last of `ids` [rows, tokens]; keys and values go into the cache."""
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    logits: Tensor = output.logits[:, -1]
    return logits


class Step:
    """The step `last_logits`, compiled once more than `after` steps were taken. Lives as long as its engine."""

    def __init__(
        self, *, compile: bool, after: int = AFTER_STEPS, compiler: Callable[..., Forward] = torch.compile
    ) -> None:
        self._compile, self._after, self._compiler = compile, after, compiler
        self._compiled: Forward | None = None
        self._taken = 0

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    def begin(self, caches: list[Slots]) -> None:
        """Prepare a step. Call it before each one, with all caches of the step."""
        self._taken += 1
        if self._compile and self._compiled is None and self._taken > self._after:
            # torch compiles one graph per model, and again for sizes that happened to be equal, or 1. Beyond the limit
            # it falls back to eager steps without a word.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            self._compiled = self._compiler(last_logits, dynamic=True)
        if self._compiled is not None:
            for cache in caches:
                cache.fix()

    def __call__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Slots) -> Tensor:
        if self._compiled is not None:
            try:
                return self._compiled(model, ids, mask, positions, cache)
            except torch._dynamo.exc.TorchDynamoException as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = " ".join(lines[:2]) or type(error).__name__
                print(f"the decoding step of {type(model).__name__} cannot be compiled: {reason}", flush=True)
                self._compile, self._compiled = False, None
        return last_logits(model, ids, mask, positions, cache)
