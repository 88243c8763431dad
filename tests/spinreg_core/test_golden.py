"""Twenty steps of a tiny model, kept with full precision: a change that is not meant to change numbers must not.

python tests/spinreg_core/test_golden.py     writes the trajectory anew (say in the changelog why)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parent / "golden" / "trajectory.json"
sys.path.insert(0, str(Path(__file__).parents[1]))
KEPT = ("loss", "margin", "grad_norm", "real_logp", "generated_logp", "learning_rate")


def machine() -> dict[str, str]:
    """What decides the last bits of sums."""
    return {"torch": torch.__version__.partition("+")[0], "kernels": torch.backends.cpu.get_cpu_capability()}


def trajectory() -> list[dict[str, float]]:
    from tiny import random_pairs, tiny_model

    from spinreg_core.config import ObjectiveConfig, TrainingConfig
    from spinreg_core.scoring import score
    from spinreg_core.training import Round

    pairs = random_pairs(20, 3)
    for name, seed in (("previous", 0), ("base", 1)):
        for which in ("real", "generated"):
            answers = [p[f"{which}_ids"] for p in pairs]
            values = score(tiny_model("llama", seed), [p["prompt_ids"] for p in pairs], answers, precision="fp32",
                           tokens_per_pass=150)  # fmt: skip
            for pair, value in zip(pairs, values, strict=True):
                pair[f"{name}_{which}"] = value
    training = TrainingConfig(learning_rate=1e-3, batch_size=5, epochs=5, precision="fp32", optimizer="rmsprop")
    round_ = Round(tiny_model("llama", 0), pairs, objective=ObjectiveConfig(alpha=0.5, beta=0.1), training=training,
                   seed=0, round_number=2, tokens_per_pass=120)  # fmt: skip
    return [{name: metrics[name] for name in KEPT} for metrics in (round_.step() for _ in range(round_.steps))]


def test_the_trajectory_is_the_one_that_was_kept() -> None:
    kept: dict[str, Any] = json.loads(FILE.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = trajectory()
    finally:
        torch.set_num_threads(threads)
    assert len(found) == len(kept["steps"]) == 20
    if kept["machine"] == machine():
        assert found == kept["steps"], "bit for bit on the same kernels"
    for step, expected in zip(found, kept["steps"], strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=1e-6)
    assert found[0]["loss"] > found[-1]["loss"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({"machine": machine(), "steps": trajectory()}, indent=1) + "\n")
