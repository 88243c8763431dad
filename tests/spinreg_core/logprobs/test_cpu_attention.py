"""The block-wise attention of CPUs against float64, and against PyTorch's kernel for the same number format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spinreg_core.logprobs.cpu_attention import LONGEST, CausalAttention
from spinreg_core.logprobs.packed_attention import by_pieces
from tests.support.recorded_calls import recorded_calls


def outcome(attention: Any, *inputs: Tensor, weights: Tensor) -> list[Tensor]:
    """The result and the gradients of its weighted sum, in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = attention(*leaves)
    return [x.detach().double() for x in (result, *torch.autograd.grad((result * weights).sum(), leaves))]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool).tril_(m - n)
    return F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 90), (64, 64), (65, 200), (150, 150), (130, 131)])
def test_cpu_attention_is_as_close_to_float64_as_pytorch(heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    n, m = sizes
    # Laid out as a model hands them over: heads inside, positions outside.
    q, weights = (torch.randn(1, n, heads[0], 32, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(1, m, heads[1], 32, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    exact = outcome(sdpa, q.double(), k.double(), v.double(), weights=weights.double())
    found = outcome(lambda q, k, v: CausalAttention.apply(q, k, v, 0.3), q, k, v, weights=weights)
    theirs = outcome(sdpa, q, k, v, weights=weights)
    for a, b, c in zip(found, exact, theirs, strict=True):
        assert a.shape == b.shape
        scale = b.square().mean().sqrt() + 0.1  # one key: its gradient is zero
        assert (a - b).square().mean().sqrt() / scale < 2**-7
        assert (a - b).square().mean().sqrt() < 1.5 * (c - b).square().mean().sqrt() + 1e-3 * scale


def test_cpu_attention_serves_bfloat16_only_and_keeps_the_setting() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    q = torch.randn(1, 4, 70, 8)
    with recorded_calls(CausalAttention.forward) as calls:
        exact = by_pieces(q, q, q, [[60, 10]], None, None, None)
        assert not calls, "float32 is PyTorch's"
        with torch.autocast("cpu", torch.bfloat16):
            found = by_pieces(q, q, q, [[60, 10]], None, None, None)
        assert [given["query"].dtype for _, given in calls] == [torch.bfloat16]
        torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)
        longer = [torch.randn(1, 2, LONGEST + 1, 8, dtype=torch.bfloat16) for _ in range(3)]
        by_pieces(*longer, [[LONGEST, 1]], None, None, None)
        assert len(calls) == 1, "its memory is quadratic in length"
    assert torch.backends.mkldnn.matmul.fp32_precision == before
