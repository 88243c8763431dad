"""Keys and values of many answers that began at different times: a transformers cache with a slot for each.

Decides: where a token's keys and values lie, so that an answer that ends can be replaced by another one at once.
Leaves out: who is in which slot, and when (`decode.py`).

All slots write the same column at the same time, the newest, and each answer reaches back from there as far as it is
long; a mask says how far. Nothing is copied as answers grow: a layer is one buffer, written in place, and the model
sees the columns that somebody uses. For a compiled step (`fix`) it sees columns from the first one to a multiple of
128, and finds the newest in a tensor, so that one graph serves for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def has_slots(model: PreTrainedModel) -> bool:
    """Whether all that the model keeps between tokens are keys and values per position (no recurrent state, say).

    Sliding windows are welcome: here they are a matter of the mask. Chunks are not: they count from position 0, and
    columns do not.
    """
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def layers_of(model: PreTrainedModel) -> int:
    """Layers with keys and values of their own: some models share them between layers."""
    return len(DynamicCache(config=model.config).layers)


def prompt_cache(layers: int) -> Cache:
    """Where the keys and values of prompts are put before they get their slots."""
    return Cache(layers=[DynamicLayer() for _ in range(layers)])


_WINDOW = 128  # columns seen by a compiled step are a multiple of it
_SPARE = 1  # a column that is never seen: a compiler takes seeing all columns for another case than seeing some


class Slots(Cache):
    """`rows` slots of `columns` columns; columns `low` to `high` are in use."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.slot_layers = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))
        self.rows, self.columns = rows, columns
        self.low = self.high = 0
        self.mask: Tensor | None = None  # bool [rows, columns]: what belongs to the answer in each slot
        self.column: Tensor | None = None  # int64 [1], once shapes are fixed: the open column
        self.window = 0  # and how many columns, from the first, are seen

    def fill(self, slots: list[int], prompts: Cache, which: Tensor, lengths: Tensor) -> None:
        """Put left-padded prompts ([prompts, heads, width, head width] per layer) into slots, ending at `high`.

        which, lengths: int64 [len(slots)], the prompt of each slot and its tokens.
        """
        read: list[Any] = prompts.layers
        device, width = read[0].keys.device, read[0].keys.shape[2]
        if self.mask is None:
            self.mask = torch.zeros(self.rows, self.columns + _SPARE, dtype=torch.bool, device=device)
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
        """Make room for one more token of every slot; `longest`: tokens of the longest answer in them, prompt
        included, without it. Returns the mask [rows, columns seen] that goes with the forward pass."""
        assert self.mask is not None
        self.low = self.high - longest
        # All before the newest column is seen where shapes are fixed, so what nobody uses there is not let grow.
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
        """From the next step on, shapes seldom change and no number does, as a compiled step wants it."""
        assert self.mask is not None
        if self.column is None:
            self.column = torch.zeros(1, dtype=torch.int64, device=self.mask.device)

    def keep(self, slots: list[int]) -> None:
        """Only these slots, in this order."""
        assert self.mask is not None
        at = torch.tensor(slots, device=self.mask.device)
        for layer in self.slot_layers:
            layer.keys, layer.values = layer.both[0][at], layer.both[1][at]
        self.mask, self.rows = self.mask[at], len(slots)

    def resize(self, rows: int, columns: int, longest: int) -> None:
        """So many slots and columns. `longest`: tokens of the longest answer in them, no more than the columns."""
        assert self.mask is not None
        self.low = self.high - longest  # a longer one may have ended
        used = slice(self.low, self.high)
        for layer in self.slot_layers:
            layer.keys, layer.values = (_resized(x, rows, columns, used) for x in layer.both)
        self.mask = _resized(self.mask[:, None, :, None], rows, columns, used)[:, 0, :, 0]
        self.rows, self.columns = rows, columns
        self.low, self.high = 0, self.high - self.low

    def _move(self, by: int) -> None:
        """Shift everything in use by so many columns, to the right where positive."""
        low, high = self.low + by, self.high + by
        if not 0 <= low <= high <= self.columns:
            raise AssertionError(f"columns {low} to {high} of {self.columns}")
        assert self.mask is not None
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
            # Zeros, because what a mask hides is still multiplied, by zero.
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
        """Columns before the open one: what masks count from. A tensor where shapes are fixed, as transformers' own
        static caches have it."""
        return self._slots.high - self._slots.low - 1 if self._slots.column is None else self._slots.column[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self._slots.high - self._slots.low if self._slots.column is None else self._slots.window), 0


def _rounded(columns: int) -> int:
    return -(-columns // _WINDOW) * _WINDOW


def _resized(x: Tensor, rows: int, columns: int, used: slice) -> Tensor:
    """[slots, heads, columns, width], the used columns first."""
    found = x.new_zeros(rows, x.shape[1], columns + _SPARE, x.shape[3])
    found[: len(x), :, : used.stop - used.start] = x[:, :, used]
    return found
