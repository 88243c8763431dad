"""Fixtures of generation: a store with policies, and a model with a distribution that can be written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.generation_fixtures import House


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    return House(tmp_path)


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """Random weights, wide enough spread that the distribution is far from uniform. head_dim suits vLLM."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()
