"""The optimiser of a round, its learning rate at every step, and the order of its pairs.

Decides: optimiser and parameters, activation checkpointing, the schedule's closed form, the seeded order and batches.
Leaves out: gradients and the loop (`training.trainer`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from spinreg_core.config import TrainingConfig
from spinreg_core.selfplay.pairs import Pair


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Return torch's AdamW (betas 0.9, 0.999) or RMSprop (smoothing 0.99, no momentum, not centred), with eps 1e-8.

    Weight decay acts on matrices only, not on norms, biases and decay rates of states (`A_log`). It is decoupled in
    AdamW and an L2 term in RMSprop. The trainer sets the learning rate before every step (`learning_rate`).
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if _is_matrix(name, p)], "weight_decay": training.weight_decay},
        {"params": [p for name, p in trained if not _is_matrix(name, p)], "weight_decay": 0.0},
    ]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    # One parameter after another: the foreach version holds a temporary as large as the whole model.
    return torch.optim.RMSprop(groups, lr=0.0, alpha=0.99, eps=1e-8, foreach=False)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    # gpt-oss has a row of biases for each expert, Mamba a row of decay rates for each channel.
    return parameter.ndim >= 2 and not name.endswith(("bias", "A_log"))


class CheckpointOptions(TypedDict, total=False):
    """Options of `torch.utils.checkpoint.checkpoint`."""

    use_reentrant: bool
    context_fn: Callable[[], tuple[object, object]]


def recomputing(training: TrainingConfig) -> CheckpointOptions:
    """Return the options for `training.activation_checkpointing` selective or full."""
    if training.activation_checkpointing == "full":
        return {"use_reentrant": False}

    def policy(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
        name = str(operator).removeprefix("aten.").partition(".")[0]
        return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}


# Selective activation checkpointing keeps the results of these operators, which are expensive to repeat. bmm is not
# among them: where attention is not one operator, bmm makes tables of scores that grow with the square of the length.
_KEPT = frozenset(
    {
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "flex_attention",
    }
)


def learning_rate(
    step: int, total: int, *, peak: float, warmup: float, schedule: Literal["linear", "cosine", "constant"]
) -> float:
    """Return the learning rate of a step, counted from 0, of `total` steps.

    The first w = ceil(warmup * total) steps rise linearly, peak (step + 1) / w, so no step is taken with rate 0.
    Then, with u = (step - w) / (total - w): linear peak (1 - u), cosine peak (1 + cos(pi u)) / 2, constant peak.
    Zero is reached after the last step.
    """
    # Rounded first, because 0.1 * 30 is a little more than 3 in floats and would take four steps.
    rising = math.ceil(round(warmup * total, 9))
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    u = (step - rising) / (total - rising)
    return peak * (1 - u) if schedule == "linear" else peak * (1 + math.cos(math.pi * u)) / 2


def data_order(pairs: Sequence[Pair], *, seed: int, round_number: int, epoch: int) -> list[int]:
    """Return a permutation of the pairs, by SHA-256 of (seed, round, epoch, pair id).

    Pairs of one prompt stay together, so that a step computes their prompt and human answer once. The order depends
    neither on the given order nor on a library's random numbers.
    """

    def rank(i: int) -> bytes:
        name = pairs[i]["pair_id"]
        return hashlib.sha256(json.dumps(["spinreg order", seed, round_number, epoch, name]).encode()).digest()

    by_prompt: dict[str, list[int]] = {}
    for i in sorted(range(len(pairs)), key=rank):
        by_prompt.setdefault(pairs[i]["prompt_id"], []).append(i)
    return [i for members in by_prompt.values() for i in members]


def batches(
    pairs: Sequence[Pair], *, batch_size: int, epochs: int, seed: int, round_number: int
) -> list[tuple[int, list[int]]]:
    """Return (epoch from 0, indices of the pairs) for every step; the last batch of an epoch may be smaller."""
    found = []
    for epoch in range(epochs):
        order = data_order(pairs, seed=seed, round_number=round_number, epoch=epoch)
        found += [(epoch, order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    return found
