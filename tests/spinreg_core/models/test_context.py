"""The longest sequence of a model, with rotary factors that depend on the longest position of a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, MambaConfig, Phi3Config, Phi3ForCausalLM

from spinreg_core.logprobs.sequence import answer_logprobs
from spinreg_core.models.context import context_of
from tests.support.plain_logprobs import plain
from tests.support.tiny_models import VOCABULARY

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
LONGROPE: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0} | FACTORS


def phi3(**changes: Any) -> Phi3Config:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 2,
             "max_position_embeddings": 128}  # fmt: skip
    return Phi3Config(**sizes | {"original_max_position_embeddings": 32, "rope_parameters": dict(LONGROPE)} | changes)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (LlamaConfig(max_position_embeddings=77, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), 77),
        (LlamaConfig(max_position_embeddings=77, rope_parameters={"rope_type": "linear", "factor": 2.0}), 77),
        (phi3(), 32),
        (phi3(original_max_position_embeddings=40), 40),
        (Gemma3Config(text_config=Gemma3TextConfig(max_position_embeddings=128)), 128),
        (MambaConfig(), None),
    ],
    ids=["window", "dynamic", "linear", "longrope", "longrope-40", "nested", "no-limit"],
)
def test_context_of_is_the_length_of_independent_sequences(config: Any, longest: int | None) -> None:
    assert context_of(config)[0] == longest


@torch.no_grad()
def test_longrope_sequences_are_independent_up_to_the_context_only() -> None:
    torch.manual_seed(0)
    model = Phi3ForCausalLM(phi3(initializer_range=0.5)).eval()
    longest, _ = context_of(model.config)
    assert longest is not None
    short = ([3, 4, 5], [6, 7, 8, 9, 10, 11])

    def log_probability_with(tokens: int) -> float:
        other = [(7 * i) % VOCABULARY for i in range(tokens)]
        prompts, answers = [short[0], other[:5]], [short[1], other[5:]]
        return float(answer_logprobs(model, prompts, answers, precision="fp32")[0])

    alone = float(plain(model, [short[0]], [short[1]])[0])
    # The last token is predicted and takes no position.
    assert log_probability_with(longest + 1) == pytest.approx(alone, abs=1e-4)
    assert abs(log_probability_with(longest + 2) - alone) > 0.01
