"""Schedule values in closed form, the data order, and optimiser steps against loops written out by hand."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import nn

from spinreg_core.config import TrainingConfig
from spinreg_core.training.optimizer import batches, data_order, learning_rate, make_optimizer
from tests.support.families import tiny_family

PAIRS = [{"pair_id": f"1:{i:016x}", "prompt_id": f"{i:016x}"} for i in range(20)]


def rates(total: int, warmup: float, schedule: Literal["linear", "cosine", "constant"]) -> list[float]:
    return [learning_rate(s, total, peak=2.0, warmup=warmup, schedule=schedule) for s in range(total)]


def test_learning_rate_equals_its_closed_form() -> None:
    assert rates(6, 0.34, "linear") == pytest.approx([2 / 3, 4 / 3, 2, 2, 2 * 2 / 3, 2 / 3])  # ceil(2.04) = 3 rise
    assert rates(4, 0.0, "linear") == pytest.approx([2, 1.5, 1, 0.5])
    assert rates(5, 0.2, "cosine") == pytest.approx([2, *(1 + math.cos(math.pi * u / 4) for u in range(4))])
    assert rates(4, 0.5, "constant") == pytest.approx([1, 2, 2, 2])
    assert rates(4, 1.0, "cosine") == pytest.approx([0.5, 1, 1.5, 2])
    assert rates(1, 0.1, "linear") == [2.0]
    assert rates(30, 0.1, "constant")[:4] == pytest.approx([2 / 3, 4 / 3, 2, 2])  # 0.1 * 30 is three steps


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_are_positive_and_fall_after_the_peak(schedule: Literal["linear", "cosine"]) -> None:
    found = rates(50, 0.1, schedule)
    assert found[:5] == sorted(found[:5])
    assert found[5:] == sorted(found[5:], reverse=True)
    assert 0 < found[-1] < 0.1
    assert max(found) == pytest.approx(2.0)


def test_data_order_depends_on_names_seed_round_and_epoch() -> None:
    order = data_order(PAIRS, seed=1, round_number=2, epoch=0)
    assert sorted(order) == list(range(20))
    shuffled = [PAIRS[i] for i in reversed(range(20))]
    again = data_order(shuffled, seed=1, round_number=2, epoch=0)
    assert [shuffled[i] for i in again] == [PAIRS[i] for i in order]
    others = [data_order(PAIRS, seed=s, round_number=r, epoch=e) for s, r, e in [(2, 2, 0), (1, 3, 0), (1, 2, 1)]]
    assert len({tuple(o) for o in [order, *others]}) == 4
    # Fixed for good: a round continued by a later version must go on in the same order.
    assert order[:6] == [5, 14, 4, 11, 2, 19]


def test_pairs_of_one_prompt_follow_each_other() -> None:
    several = [{"pair_id": f"{r}:{i:016x}", "prompt_id": f"{i:016x}"} for r in (1, 2, 3) for i in range(20)]
    order = data_order(several, seed=1, round_number=2, epoch=0)
    prompts = [several[i]["prompt_id"] for i in order]
    assert all(len(set(prompts[3 * k : 3 * k + 3])) == 1 for k in range(20))
    assert sorted(order) == list(range(60))
    assert len({order[3 * k] // 20 for k in range(20)}) == 3, "which of its pairs comes first is drawn too"


def test_batches_cover_every_pair_once_per_epoch() -> None:
    found = batches(PAIRS, batch_size=8, epochs=3, seed=0, round_number=1)
    assert [(epoch, len(rows)) for epoch, rows in found] == [(e, n) for e in range(3) for n in (8, 8, 4)]
    for epoch in range(3):
        assert sorted(i for e, rows in found for i in rows if e == epoch) == list(range(20))


class Toy(nn.Module):
    """One matrix (decayed) and one vector (not)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.vector = nn.Parameter(torch.randn(4, generator=generator))


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_steps_equal_the_textbook(name: Literal["adamw", "rmsprop"]) -> None:
    toy = Toy()
    optimizer = make_optimizer(toy, TrainingConfig(optimizer=name, weight_decay=0.1))
    expected = {n: p.detach().double().clone() for n, p in toy.named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in expected.items()}
    second = {n: torch.zeros_like(p) for n, p in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 5):
        rate = 0.01 * step
        for group in optimizer.param_groups:
            group["lr"] = rate
        for n, p in toy.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            g, w = p.grad.double(), expected[n]
            decay = 0.1 if p.ndim == 2 else 0.0
            if name == "adamw":  # arXiv 1711.05101
                w -= rate * decay * w
                first[n] = 0.9 * first[n] + 0.1 * g
                second[n] = 0.999 * second[n] + 0.001 * g**2
                m, v = first[n] / (1 - 0.9**step), second[n] / (1 - 0.999**step)
                w -= rate * m / (v.sqrt() + 1e-8)
            else:
                g = g + decay * w
                second[n] = 0.99 * second[n] + 0.01 * g**2
                w -= rate * g / (second[n].sqrt() + 1e-8)
        optimizer.step()
    for n, p in toy.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "kept"), [("gpt_oss", "experts.gate_up_proj_bias"), ("mamba", "mixer.A_log")])
def test_weight_decay_leaves_biases_and_decay_rates_alone(family: str, kept: str) -> None:
    """They have two dimensions, like a matrix."""
    model = tiny_family(family)
    decayed, others = make_optimizer(model, TrainingConfig(weight_decay=0.1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert any(names[id(p)].endswith(kept) for p in others["params"])
    assert all(p.ndim < 2 or names[id(p)].endswith(kept.rsplit("_", 1)[-1]) for p in others["params"])
    assert all(p.ndim >= 2 for p in decayed["params"])
