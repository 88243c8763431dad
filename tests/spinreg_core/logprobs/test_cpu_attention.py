"""The block-wise attention of CPUs against float64, and against PyTorch's kernel for the same number format."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spinreg_core.logprobs import packed_attention
from spinreg_core.logprobs.cpu_attention import LONGEST, CausalAttention
from spinreg_core.logprobs.packed_attention import _attend


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
def test_it_is_attention_and_no_further_from_float64_than_pytorchs_kernel(
    heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
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


def test_a_model_takes_it_in_bfloat16_and_the_processs_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def noted(*arguments: Any) -> Any:
        taken.append(arguments[0].dtype)
        return CausalAttention.apply(*arguments)

    monkeypatch.setattr(packed_attention, "CausalAttention", SimpleNamespace(apply=noted))
    before = torch.backends.mkldnn.matmul.fp32_precision
    q = torch.randn(1, 4, 70, 8)
    exact = _attend(q, q, q, None, None, None)
    assert not taken, "float32 is PyTorch's"
    with torch.autocast("cpu", torch.bfloat16):
        found = _attend(q, q, q, None, None, None)
    assert taken == [torch.bfloat16]
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)
    _attend(*(torch.randn(1, 2, LONGEST + 1, 8, dtype=torch.bfloat16) for _ in range(3)), None, None, None)
    assert len(taken) == 1, "what it keeps is quadratic in length"
    assert torch.backends.mkldnn.matmul.fp32_precision == before
