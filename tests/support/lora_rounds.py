"""Rounds of training with a LoRA adapter on tiny policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spinreg_core.config import ObjectiveConfig, TrainingConfig
from spinreg_core.logprobs.scoring import score
from spinreg_core.models.loading import load_policy
from spinreg_core.models.lora import add_adapter, start_adapter
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.training.checkpoint_files import publish_adapted
from spinreg_core.training.trainer import RoundTrainer
from tests.support.tiny_models import random_pairs

LORA = {"lora_rank": 3, "lora_alpha": 12.0, "precision": "fp32", "learning_rate": 1e-2, "batch_size": 4, "epochs": 2}


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(LORA | changes)


def adapted(base: Path, training: TrainingConfig, seed: int = 5) -> PreTrainedModel:
    model = load_policy(base, training.precision, "cpu")
    add_adapter(model, training)
    start_adapter(model, seed)
    return model


def scored(policy: Path | PreTrainedModel, pairs: list[dict[str, Any]], which: str) -> list[float]:
    model = load_policy(policy, "fp32", "cpu") if isinstance(policy, Path) else policy
    answers = [p[f"{which}_ids"] for p in pairs]
    return score(model, [p["prompt_ids"] for p in pairs], answers, precision="fp32", tokens_per_pass=200)


def a_round(model: PreTrainedModel, previous: Path, base: Path, training: TrainingConfig, number: int) -> RoundTrainer:
    """Its pairs scored under the policies that were published, as mix-opponent does."""
    pairs = random_pairs(12, number, number)
    for name, policy in (("previous", previous), ("base", base)):
        for which in ("real", "generated"):
            for pair, value in zip(pairs, scored(policy, pairs, which), strict=True):
                pair[f"{name}_{which}"] = value
    return RoundTrainer(model, pairs, objective=ObjectiveConfig(alpha=1.0, beta=0.1), training=training, seed=1,
                 round_number=number, tokens_per_pass=120)  # fmt: skip


def finished(round_: RoundTrainer) -> RoundTrainer:
    while round_.state.done < round_.steps:
        round_.step()
    return round_


def publish(model: PreTrainedModel, base: Path, folder: Path, training: TrainingConfig) -> Path:
    publish_adapted(model, base, folder, training, "the/base", Ranks(torch.device("cpu")))
    return folder
