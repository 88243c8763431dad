"""Causal attention in bfloat16 on CPUs, forward and backward, block by block of queries.

Decides: the size of a block, float32 scores and softmax, and that the weights are kept for the backward pass.
Leaves out: which tokens form a sequence, and every other kind of attention (`logprobs.packed_attention`).

PyTorch's own kernel (2.13, `_scaled_dot_product_flash_attention_for_cpu`) reaches a twentieth of the matrix rate of a
processor with bfloat16 units. Most of its time goes into the backward pass. Here oneDNN multiplies, which takes half
the time in all and is as close to float64. Keeping the weights makes the difference: computing them again, as
FlashAttention does, loses all of the gain. LONGEST bounds their memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Keys at most. A query then keeps up to 2 KiB for every head, about as much as the other activations of its layer.
LONGEST = 1024
# Queries at once. Larger blocks do not fit the caches and cost page faults: 128 took 1.5 times as long.
_BLOCK = 64
# The number format of products is a setting of the whole process.
_lock = threading.RLock()


class CausalAttention(torch.autograd.Function):
    """query [1, heads, n, width], key and value [1, kv heads, m, width], all bfloat16, -> [1, heads, n, width].

    Query i is position m - n + i of the keys and sees those up to itself; consecutive heads share a kv head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = _by_kv_head(query, key), key[0], value[0]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept = []
        for begin, end, seen in _blocks(q.shape[2], k.shape[1]):
            scores = _float32_product(_rows(q, begin, end), k[:, :seen])
            size = end - begin
            later = torch.ones(size, size, dtype=torch.bool).triu_(1)
            scores.view(len(k), -1, size, seen)[..., seen - size :].masked_fill_(later, -torch.inf)
            weights = scores.mul_(scaling).softmax(-1).to(q.dtype)
            out[:, :, begin:end] = torch.bmm(weights, v[:, :seen]).view_as(out[:, :, begin:end])
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.scaling = scaling
        return out.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, *kept = ctx.saved_tensors
        q, k, v, d_out = _by_kv_head(query, key), key[0], value[0], _by_kv_head(gradients[0], key)
        # d loss / d score = weight * (d loss / d weight - mean of d loss / d weight under the weights)
        means = (d_out.float() * out).sum(-1)
        dq = torch.empty_like(out)
        dk, dv = (torch.zeros(k.shape, dtype=torch.float32) for _ in range(2))
        for weights, (begin, end, seen) in zip(kept, _blocks(q.shape[2], k.shape[1]), strict=True):
            rows, d_rows = (_rows(x, begin, end) for x in (q, d_out))
            dv[:, :seen] += torch.bmm(weights.transpose(1, 2), d_rows)
            d_scores = _float32_product(d_rows, v[:, :seen])
            d_scores.sub_(means[:, :, begin:end].reshape(len(k), -1, 1)).mul_(weights).mul_(ctx.scaling)
            d_scores = d_scores.to(q.dtype)
            dq[:, :, begin:end] = torch.bmm(d_scores, k[:, :seen]).view_as(dq[:, :, begin:end])
            dk[:, :seen] += torch.bmm(d_scores.transpose(1, 2), rows)
        return dq.view(query.shape), dk[None].to(key.dtype), dv[None].to(key.dtype), None


def _by_kv_head(x: Tensor, key: Tensor) -> Tensor:
    """[1, heads, n, width] -> [kv heads, heads of each, n, width]."""
    return x[0].unflatten(0, (key.shape[1], -1))


def _blocks(queries: int, keys: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first query, the last query + 1, and the number of keys that the last query sees."""
    for begin in range(0, queries, _BLOCK):
        end = min(queries, begin + _BLOCK)
        yield begin, end, keys - queries + end


def _rows(x: Tensor, begin: int, end: int) -> Tensor:
    """Return a block of queries as one matrix for each kv head."""
    return x[:, :, begin:end].reshape(len(x), -1, x.shape[-1])


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T of bfloat16 matrices, summed and kept in float32."""
    with _bfloat16_products():
        return torch.bmm(a.float(), b.float().transpose(1, 2))


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices as bfloat16, which is exact for matrices that hold bfloat16 numbers."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _lock:
        before = setting.fp32_precision
        setting.fp32_precision = "bf16"
        try:
            yield
        finally:
            setting.fp32_precision = before
