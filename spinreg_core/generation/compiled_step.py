"""One decoding step of a model, compiled once it is sure to pay.

Decides: when the engine goes over to a compiled step, what in it may change without compiling anew, and that a model
which cannot be compiled is decoded eagerly, with a message.
Leaves out: what a step computes and the keys and values of fixed shape that it needs (`decode.py`, `kv_slots.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spinreg_core.generation.kv_slots import Slots

# Compiling takes a minute: what so many steps may have saved by the time they are taken again.
_AFTER_STEPS = 2000
Forward = Callable[[PreTrainedModel, Tensor, Tensor, Tensor, Slots], Tensor]


class Step:
    """`forward`, a step of decoding, or a compiled version of it; kept as long as the engine."""

    def __init__(self, forward: Forward, *, compile: bool) -> None:
        self._forward, self._compile = forward, compile
        self._compiled: Forward | None = None
        self._taken = 0

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    def begin(self, caches: list[Slots]) -> None:
        """To be called before each step with all caches that take part in it."""
        self._taken += 1
        if self._compile and self._compiled is None and self._taken > _AFTER_STEPS:
            # One graph per model, and another one for sizes that happened to be equal, or 1.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            self._compiled = torch.compile(self._forward, dynamic=True)
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
                print(f"the decoding step of {type(model).__name__} is not compiled: {reason}", flush=True)
                self._compile, self._compiled = False, None
        return self._forward(model, ids, mask, positions, cache)
