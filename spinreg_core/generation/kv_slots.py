"""Keys and values of answers that began at different times: a transformers cache with one slot per answer.

Decides: the place of each token's keys and values, so that another answer can take a slot as soon as one ends.
Leaves out: the assignment of answers to slots (`generation.decode`).

All slots write the same column at the same time, the newest. Each answer reaches back from there by its length, which
a mask shows. Nothing is copied as answers grow: a layer is one buffer, written in place, and the model sees the columns
in use. A compiled step (`fix`) sees the columns from the first one to a multiple of 128, and finds the newest in a
tensor, so that one graph serves all steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def has_slots(model: PreTrainedModel) -> bool:
    """Return True where a model's memory is keys and values per position only, without a recurrent state, say.

    Sliding windows are possible, because the mask applies them. Chunked attention is not: chunks count from position 0,
    and columns do not.
    """
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def layers_of(model: PreTrainedModel) -> int:
    """Return the number of layers with their own keys and values; some models share them between layers."""
    return len(DynamicCache(config=model.config).layers)


def prompt_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache for the keys and values of prompts, before they are copied into slots."""
    # The model's own cache would drop what lies outside of a sliding window, and the mask counts all columns.
    return Cache(layers=[DynamicLayer() for _ in range(layers_of(model))])


# A compiled step sees a multiple of this many columns.
_WINDOW = 128
# A column that is never seen. Without it, a step that sees all columns would be another case for the compiler.
_SPARE = 1


class Slots(Cache):
    """`rows` slots of `columns` columns; columns `low` to `high` are in use."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int) -> None:
        self.slot_layers = [_Layer(self) for _ in range(layers_of(model))]
        super().__init__(layers=list(self.slot_layers))
        self.rows, self.columns = rows, columns
        self.low = self.high = 0
        # bool [rows, columns]: the columns of the answer in each slot.
        self.mask = torch.zeros(rows, columns + _SPARE, dtype=torch.bool, device=model.device)
        # int64 [1]: the newest column, and the number of visible columns; both only after `fix`.
        self.column: Tensor | None = None
        self.window = 0

    def fill(self, slots: list[int], prompts: Cache, which: Tensor, lengths: Tensor) -> None:
        """Copy left-padded prompts ([prompts, heads, width, head width] per layer) into slots, ending at `high`.

        which, lengths: int64 [len(slots)], the prompt of each slot and its number of tokens.
        """
        read: list[Any] = prompts.layers
        device, width = self.mask.device, read[0].keys.shape[2]
        if self.high == self.low:
            self.low = self.high = width
        if width > self.high:
            self._move(width - self.high)
        self.low = min(self.low, self.high - width)
        at = torch.tensor(slots, device=device)
        for layer, source in zip(self.slot_layers, read, strict=True):
            layer.put(at, self.high - width, source.keys[which], source.values[which])
        own = torch.arange(self.columns + _SPARE, device=device) - self.high
        self.mask[at] = (own < 0) & (own >= -lengths[:, None])

    def open_column(self, longest: int) -> Tensor:
        """Make room for one more token in every slot. Returns the mask [rows, visible columns] of the forward pass.

        longest: tokens of the longest answer, prompt included, before the new token.
        """
        self.low = self.high - longest
        # With fixed shapes all columns before the newest are visible, so unused ones must not pile up there.
        end = self.columns if self.column is None else min(self.columns, _rounded(longest + longest // 4 + 1))
        if self.high >= end:
            self._move(-self.low)
        self.mask[:, self.high] = True
        self.high += 1
        if self.column is None:
            return self.mask[:, self.low : self.high]
        self.column.fill_(self.high - 1)
        self.window = min(self.columns, _rounded(self.high))
        return self.mask[:, : self.window]

    def fix(self) -> None:
        """Keep shapes fixed from the next step on, for a compiled step."""
        if self.column is None:
            self.column = torch.zeros(1, dtype=torch.int64, device=self.mask.device)

    def keep(self, slots: list[int]) -> None:
        """Drop all slots except these, in this order."""
        at = torch.tensor(slots, device=self.mask.device)
        for layer in self.slot_layers:
            layer.keys, layer.values = layer.both[0][at], layer.both[1][at]
        self.mask, self.rows = self.mask[at], len(slots)

    def resize(self, rows: int, columns: int, longest: int) -> None:
        """Change the number of slots and columns. longest: tokens of the longest answer, at most `columns`."""
        # An answer that was longer may have ended.
        self.low = self.high - longest
        used = slice(self.low, self.high)
        for layer in self.slot_layers:
            layer.keys, layer.values = (_resized(x, rows, columns, used) for x in layer.both)
        self.mask = _resized(self.mask[:, None, :, None], rows, columns, used)[:, 0, :, 0]
        self.rows, self.columns = rows, columns
        self.low, self.high = 0, self.high - self.low

    def _move(self, by: int) -> None:
        """Shift all columns in use, to the right for a positive `by`."""
        low, high = self.low + by, self.high + by
        if not 0 <= low <= high <= self.columns:
            raise AssertionError(f"columns {low} to {high} of {self.columns}")
        for x in [self.mask, *(x for layer in self.slot_layers if layer.is_initialized for x in layer.both)]:
            at = x.dim() - (1 if x is self.mask else 2)
            x.narrow(at, low, high - low).copy_(x.narrow(at, self.low, high - low).clone())
        self.mask[:, :low] = self.mask[:, high:] = False
        self.low, self.high = low, high


class _Layer(DynamicLayer):
    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def put(self, at: Tensor, column: int, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized:
            # Zeros, not uninitialised memory: attention multiplies masked values by 0, and 0 * nan is nan.
            self.keys, self.values = (
                x.new_zeros(self._slots.rows, x.shape[1], self._slots.columns + _SPARE, x.shape[3])
                for x in (keys, values)
            )
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        for own, given in zip(self.both, (keys, values), strict=True):
            own[at, :, column : column + given.shape[2]] = given

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.both
        if self._slots.column is not None:
            keys.index_copy_(2, self._slots.column, key_states)
            values.index_copy_(2, self._slots.column, value_states)
            return keys[:, :, : self._slots.window], values[:, :, : self._slots.window]
        low, high = self._slots.low, self._slots.high
        keys[:, :, high - 1 : high] = key_states
        values[:, :, high - 1 : high] = value_states
        return keys[:, :, low:high], values[:, :, low:high]

    def get_seq_length(self) -> Any:
        """Return the columns before the newest, which transformers' masks count from.

        With fixed shapes it is a tensor, as in transformers' static caches: an int would be a constant of the graph.
        """
        return self._slots.high - self._slots.low - 1 if self._slots.column is None else self._slots.column[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self._slots.high - self._slots.low if self._slots.column is None else self._slots.window), 0


def _rounded(columns: int) -> int:
    return -(-columns // _WINDOW) * _WINDOW


def _resized(x: Tensor, rows: int, columns: int, used: slice) -> Tensor:
    """Return a copy [rows, heads, columns, width] with the used columns first."""
    found = x.new_zeros(rows, x.shape[1], columns + _SPARE, x.shape[3])
    found[: len(x), :, : used.stop - used.start] = x[:, :, used]
    return found
