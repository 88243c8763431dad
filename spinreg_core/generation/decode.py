"""Answers of one policy, or of a token-level mixture of several, decoded together with continuous refill.

Decides: which prompts are decoded at once, and that the next prompt takes the slot of an ended answer. Each policy has
its own keys and values and takes one batched step per token.
Leaves out: keys and values (`generation.kv_slots`), drawing a token (`generation.sampler`), models with other memory
(`generation.hf`).

Prompts begin in the given order, so sorting them by length saves padding. New prompts are read once an eighth of the
slots is free, because reading one prompt takes as long as reading several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spinreg_core.generation.compiled_step import Step, last_logits
from spinreg_core.generation.engine import Answer, Sampling, columns_for
from spinreg_core.generation.kv_slots import Slots, prompt_cache
from spinreg_core.generation.sampler import mixed_logits, sample, uniforms

# Answers at once. More make no step cheaper on any machine, and each has a row of logits.
_ROWS = 1024
# Logits that are sampled at once (elements).
_DRAWN_AT_ONCE = 2**25
# Prompt tokens (padding included) read in one forward pass.
_READ_AT_ONCE = 4096


@dataclass
class _Open:
    """An answer in progress. `prompt`: tokens of its prompt. `uniform`: draws its tokens."""

    index: int
    prompt: int
    uniform: Callable[[], float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Return the number of tokens with keys and values: all except the newest."""
        return self.prompt + len(self.tokens) - 1


@dataclass
class Decoding:
    """The slots of all policies, which are filled and emptied together, until all prompts are answered.

    Attributes:
        models, weights: the mixture (`sampler.mixed_logits`).
        seeds: one per prompt.
        tokens: keys and values at the same time, counting answers at their full length. A single answer may take more.
        on_answer: called with (index of the prompt, answer) as each answer ends.
        open: the answers in progress, by slot.
    """

    models: Sequence[PreTrainedModel]
    weights: Sequence[float]
    prompts: Sequence[list[int]]
    seeds: Sequence[int]
    sampling: Sampling
    tokens: int
    pad_id: int
    one_step: Step
    on_answer: Callable[[int, Answer], None]
    open: dict[int, _Open] = field(default_factory=dict)
    caches: list[Slots] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> None:
        """Answer all prompts.

        Raises:
            BadInput: logits are not finite.
            torch.OutOfMemoryError: memory is too small for this many tokens.
        """
        self.device = self.models[0].device
        begun = 0
        # For each prompt the length of the longest among it and all later ones.
        longest = list(accumulate(reversed([len(p) for p in self.prompts]), max))[::-1]
        while begun < len(self.prompts) or self.open:
            if begun < len(self.prompts):
                left = len(self.prompts) - begun
                most = max([longest[begun], *(row.prompt for row in self.open.values())])
                columns = columns_for(most + self.sampling.max_new_tokens)
                rows = self.rows_for(self.tokens // columns, left)
                free = min(rows - len(self.open), left)
                if free > 0 and (not self.open or free >= rows / 8 or free == left):
                    self.begin(range(begun, begun + free), rows, columns)
                    begun += free
                    continue
            self.step()

    def rows_for(self, room: int, left: int) -> int:
        """Return the number of slots, with memory for `room` answers and `left` prompts that have not begun."""
        wanted = max(1, min(room, len(self.open) + left, _ROWS))
        # Growing copies all keys and values, and shorter prompts make room for one more slot now and then.
        return self.caches[0].rows if self.open and wanted < 1.25 * self.caches[0].rows else wanted

    def begin(self, indices: Sequence[int], rows: int, columns: int) -> None:
        """Read prompts into slots and draw their first tokens."""
        if not self.open:
            self.caches = [Slots(model, rows, columns) for model in self.models]
        elif rows > self.caches[0].rows:
            for cache in self.caches:
                cache.resize(rows, columns, max(row.length for row in self.open.values()))
        free = [slot for slot in range(self.caches[0].rows) if slot not in self.open]
        order = sorted(indices, key=lambda i: -len(self.prompts[i]))
        at_once = max(1, _READ_AT_ONCE // len(self.prompts[order[0]]))
        for start in range(0, len(order), at_once):
            part = order[start : start + at_once]
            slots, free = free[: len(part)], free[len(part) :]
            logits = self._read(slots, [self.prompts[i] for i in part])
            for slot, index in zip(slots, part, strict=True):
                self.open[slot] = _Open(index, len(self.prompts[index]), uniforms(self.seeds[index]))
            self._draw(slots, logits)

    def step(self) -> None:
        """Sample one more token of every answer in progress."""
        # A single row would be compiled to a graph of its own.
        alone = len(self.open) == 1 and self.one_step.compiled
        if len(self.open) <= self.caches[0].rows // 2 and not alone:
            self._drop_free_slots()
        rows = self.caches[0].rows
        # Free slots take part with a padding token, because the step is one batch over all rows of the cache.
        last = [self.open[slot].tokens[-1] if slot in self.open else self.pad_id for slot in range(rows)]
        lengths = [self.open[slot].length if slot in self.open else 0 for slot in range(rows)]
        ids, positions = (torch.tensor(x, device=self.device)[:, None] for x in (last, lengths))
        self.one_step.begin(self.caches)
        logits = []
        for model, cache in zip(self.models, self.caches, strict=True):
            mask = cache.open_column(max(lengths))
            logits.append(self.one_step(model, ids, mask, positions, cache))
        slots = sorted(self.open)
        at = torch.tensor(slots, device=self.device)
        self._draw(slots, [x[at] for x in logits])

    def _read(self, slots: list[int], prompts: list[list[int]]) -> list[Tensor]:
        # Several answers to one prompt share its reading.
        numbers = {tuple(p): i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        of_slot = torch.tensor([numbers[tuple(p)] for p in prompts], device=self.device)
        width = max(map(len, numbers))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in numbers], device=self.device)
        lengths = torch.tensor([len(p) for p in numbers], device=self.device)
        own = torch.arange(width, device=self.device) >= width - lengths[:, None]
        positions = (own.long().cumsum(-1) - 1).clamp(min=0)
        logits = []
        for model, cache in zip(self.models, self.caches, strict=True):
            read = prompt_cache(model)
            logits.append(last_logits(model, ids, own, positions, read)[of_slot])
            cache.fill(slots, read, of_slot, lengths[of_slot])
        return logits

    def _draw(self, slots: list[int], logits: list[Tensor]) -> None:
        """Draw the next token of the answers in these slots. logits: one [slots, vocabulary] per policy."""
        mixed = mixed_logits(logits, self.weights)
        numbers = torch.tensor([self.open[slot].uniform() for slot in slots], dtype=torch.float64)
        size = max(1, _DRAWN_AT_ONCE // mixed.shape[1])
        drawn = [sample(x, self.sampling, u) for x, u in zip(mixed.split(size), numbers.split(size), strict=True)]
        tokens, logprobs = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        for slot, token, logprob in zip(slots, tokens.tolist(), logprobs.tolist(), strict=True):
            row = self.open[slot]
            row.tokens.append(token)
            row.logprobs.append(logprob)
            stopped = token in self.sampling.stop_ids
            if stopped or len(row.tokens) == self.sampling.max_new_tokens:
                del self.open[slot]
                self.on_answer(row.index, Answer(row.tokens, "stop" if stopped else "length", row.logprobs))

    def _drop_free_slots(self) -> None:
        slots = sorted(self.open)
        for cache in self.caches:
            cache.keep(slots)
        self.open = {i: self.open[slot] for i, slot in enumerate(slots)}
