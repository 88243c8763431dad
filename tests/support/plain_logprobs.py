"""Log-probabilities by plain forward passes, and gradients to compare."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def plain(model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Row by row, all logits of the row, no padding, no projection of our own."""
    sums = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        table = torch.log_softmax(logits.float(), -1)
        at = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        sums.append(sum((table[i, t] for i, t in zip(at, answer, strict=True)), torch.zeros(())))
    return torch.stack(sums)


def gradients(model: PreTrainedModel, sums: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(sums))  # every row counts differently, one of them near zero
    (sums * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
