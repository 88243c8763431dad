"""Twenty steps of a tiny model, kept with full precision: a change that is not meant to change numbers must not.

python -m tests.spinreg_core.training.test_golden     writes it again (say in the changelog why), or adds this machine's

Other processors add up in another order: one trajectory is kept per machine, and all agree within a tolerance.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parent / "golden" / "trajectory.json"
KEPT = ("loss", "margin", "grad_norm", "real_logp", "generated_logp", "learning_rate")


def machine() -> dict[str, str]:
    """Return the properties of the machine that decide the last bits of sums."""
    names = re.findall(r"^(?:model name|vendor_id|cpu family|model)\s*:.*", Path("/proc/cpuinfo").read_text(), re.M)
    processor = ", ".join(sorted({re.sub(r"\s+", " ", name) for name in names}))
    kernels = torch.backends.cpu.get_cpu_capability()  # not all: the matrix library looks at the processor itself
    return {"torch": torch.__version__.partition("+")[0], "kernels": kernels, "processor": processor}


def trajectory() -> list[dict[str, float]]:
    from spinreg_core.config import ObjectiveConfig, TrainingConfig
    from spinreg_core.logprobs.scoring import score
    from spinreg_core.training.trainer import RoundTrainer
    from tests.support.tiny_models import random_pairs, tiny_model

    pairs = random_pairs(20, 3)
    for name, seed in (("previous", 0), ("base", 1)):
        for which in ("real", "generated"):
            answers = [p[f"{which}_ids"] for p in pairs]
            values = score(tiny_model("llama", seed), [p["prompt_ids"] for p in pairs], answers, precision="fp32",
                           tokens_per_pass=150)  # fmt: skip
            for pair, value in zip(pairs, values, strict=True):
                pair[f"{name}_{which}"] = value
    training = TrainingConfig(learning_rate=1e-3, batch_size=5, epochs=5, precision="fp32", optimizer="rmsprop")
    round_ = RoundTrainer(tiny_model("llama", 0), pairs, objective=ObjectiveConfig(alpha=0.5, beta=0.1),
    training=training,
                   seed=0, round_number=2, tokens_per_pass=120)  # fmt: skip
    return [{name: metrics[name] for name in KEPT} for metrics in (round_.step() for _ in range(round_.steps))]


def test_trajectory_equals_the_golden_one() -> None:
    kept: list[dict[str, Any]] = json.loads(FILE.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = trajectory()
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 20
    assert kept
    for trajectory_ in kept:
        if trajectory_["machine"] == machine():
            assert found == trajectory_["steps"], "bit for bit on the same machine"
        assert near(found, trajectory_["steps"])
    assert found[0]["loss"] > found[-1]["loss"]


def near(found: list[dict[str, float]], expected: list[dict[str, float]]) -> bool:
    return all(a == pytest.approx(b, rel=2e-4, abs=1e-6) for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = {"machine": machine(), "steps": trajectory()}
    others = [t for t in json.loads(FILE.read_text()) if t["machine"] != machine() and near(here["steps"], t["steps"])]
    FILE.write_text(json.dumps([*others, here], indent=1) + "\n")
