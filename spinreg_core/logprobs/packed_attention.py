"""Attention of a packed row (`packing.PackedLayout`), registered through transformers' attention interface.

Decides: how a token is limited to its own prompt and answer. On CPUs attention runs over the pieces, so that nothing
masked is computed; on GPUs a FlexAttention block mask does it. Sliding windows and capped logits are supported.
Leaves out: the layout (`logprobs.packing`), and the test of models for packing (`logprobs.sequence`).

A model opts in with `attn_implementation = NAME`, and its forward pass gets `packed=PackedRow` as a keyword, which
transformers passes on to every attention layer. Without the keyword the attention is transformers' own SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spinreg_core.logprobs.cpu_attention import LONGEST, CausalAttention
from spinreg_core.logprobs.packing import PackedLayout

NAME = "spinreg"
# Keywords that change nothing here: dropout is 0 in every loaded policy, and the layout has the positions.
_NEUTRAL = {"cache_position", "dropout", "is_causal", "output_attentions", "position_ids", "use_cache"}


class PackedRow:
    """A packed row during one forward pass: its layout, and the state that all layers share.

    Not a dataclass: FSDP2 copies dataclasses among a layer's arguments, so that every layer would have its own state.

    layout    the row's tokens.
    windows   the sliding windows of the layers that have attended to the row.
    masks     FlexAttention's block masks made so far, by sliding window.
    pieces    True to attend piece by piece on every device.
    """

    def __init__(self, layout: PackedLayout, *, pieces: bool = False) -> None:
        self.layout = layout
        self.pieces = pieces or layout.tokens.device.type != "cuda"
        self.windows: set[int | None] = set()
        self.masks: dict[int | None, Any] = {}


# Outside of compiled layers, which would be compiled again for every layout. FlexAttention compiles itself.
@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packed: PackedRow | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Implement transformers' attention contract; `attention_mask` is ignored where `packed` is given.

    query [batch, heads, T, width], key and value [batch, kv heads, T, width] -> [batch, T, heads, width] and None in
    place of attention weights.

    Raises:
        NotImplementedError: the model asks for a feature that a packed row does not have, sinks for example.
    """
    if packed is None:
        if softcap is not None:
            mask = _causal(query, key, sliding_window) if attention_mask is None else attention_mask
            return _capped(query, key, value, mask, scaling, softcap).transpose(1, 2), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _NEUTRAL)
    if unknown:
        raise NotImplementedError(f"its attention has {', '.join(unknown)}, which packed rows do not have")
    packed.windows.add(sliding_window)
    if sliding_window is not None and packed.layout.longest <= sliding_window:
        # No sequence is longer than the window.
        sliding_window = None
    if packed.pieces:
        found = by_pieces(query, key, value, packed.layout.sizes, scaling, sliding_window, softcap)
        return found.transpose(1, 2).contiguous(), None
    mask = block_mask(packed, sliding_window)
    return flex_attention_forward(module, query, key, value, mask, scaling=scaling, softcap=softcap)[0], None


def by_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: list[list[int]],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return attention over a packed row, [1, heads, T, width], piece by piece.

    In every group the prompt and its first answer are one causal sequence; each further answer attends to the prompt
    and to itself.
    """
    outputs = []
    # The backward of `split` writes the gradient once; every slice would write a gradient of full size.
    totals = [sum(group) for group in sizes]
    for q, k, v, group in zip(*(x.split(totals, dim=2) for x in (query, key, value)), sizes, strict=True):
        prompt, first, *others = group
        parts = [prompt + first, *others]
        (q0, *qs), (k0, *ks), (v0, *vs) = (x.split(parts, dim=2) for x in (q, k, v))
        outputs.append(_attend(q0, k0, v0, scaling, window, softcap))
        for q1, k1, v1 in zip(qs, ks, vs, strict=True):
            if q1.shape[2]:
                k1, v1 = (torch.cat([a[:, :, :prompt], b], dim=2) for a, b in ((k0, k1), (v0, v1)))
                outputs.append(_attend(q1, k1, v1, scaling, window, softcap))
    return torch.cat(outputs, dim=2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Return causal attention of the last q.shape[2] positions of k."""
    gqa = q.shape[1] != k.shape[1]
    whole = q.shape[2] == k.shape[2]
    if window is None and softcap is None:
        autocast = torch.is_autocast_enabled(q.device.type)
        dtype = torch.get_autocast_dtype(q.device.type) if autocast else q.dtype
        one_width = q.shape[-1] == v.shape[-1]  # DeepSeek's latent attention has narrower values.
        if dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[2] <= LONGEST and one_width:
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            found: Tensor = CausalAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), scale)
            return found
        mask = None if whole else _causal(q, k, None)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=whole, scale=scaling, enable_gqa=gqa)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, _causal(q, k, window), scale=scaling, enable_gqa=gqa)
    return _capped(q, k, v, _causal(q, k, window), scaling, softcap)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    """Return attention with capped logits (Gemma 2), which SDPA does not support. mask: bool, True where visible."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    # With -inf a row of padding, which sees nothing, would become nan.
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _causal(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """Return bool [queries, keys], aligned at the end. With a window a token sees itself and window - 1 before it."""
    n, m = q.shape[2], k.shape[2]
    at = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
    return at >= 0 if window is None else (at >= 0) & (at < window)


def block_mask(row: PackedRow, window: int | None) -> Any:
    """Return the same rule as a FlexAttention BlockMask, which all layers share."""
    if window in row.masks:
        return row.masks[window]
    groups, segments, positions = row.layout.groups, row.layout.segments, row.layout.positions[0]

    def allowed(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine = (groups[q] == groups[k]) & ((segments[k] == 0) | (segments[k] == segments[q])) & (q >= k)
        return mine if window is None else mine & (positions[q] - positions[k] < window)

    length = len(groups)
    row.masks[window] = create_block_mask(allowed, None, None, length, length, device=str(groups.device))
    return row.masks[window]


AttentionInterface.register(NAME, packed_attention)

AttentionMaskInterface.register(NAME, sdpa_mask)
