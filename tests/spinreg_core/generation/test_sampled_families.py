"""The hf engine samples, in every causal family of transformers, from the policy that is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spinreg_core.generation.engine import Sampling
from spinreg_core.generation.hf import HfEngine
from spinreg_core.models.loading import load_policy
from tests.support.families import BIDIRECTIONAL, LEFT_OUT, families, tiny_family, without_warnings
from tests.support.plain_logprobs import plain

# transformers' own loop cannot generate with them, and the engine ends with its error.
NO_LOOP = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "kimi_linear", "marian", "mbart", "mvp", "openai-gpt",
    "pegasus", "plbart", "recurrent_gemma", "rwkv", "trocr", "whisper", "xlstm",
}  # fmt: skip
PROMPTS = [list(range(3, 23)), [9, 8, 7, 6, 5, 4, 3, 2, 9], [30, 31, 32]]


@torch.no_grad()
def distance(family: str) -> float:
    """Return how far the engine's log-probabilities are from those of plain forward passes, in nats."""
    model = tiny_family(family)
    answers = HfEngine([model], tokens=200, pad_id=2).generate(PROMPTS, Sampling(1.0, 1.0, 0, 12, (99,)), range(3))
    sampled = torch.tensor([sum(answer.logprobs) for answer in answers])
    return float((sampled - plain(model, PROMPTS, [answer.token_ids for answer in answers])).abs().max())


@pytest.mark.parametrize("family", ["llama", "minimax", "lfm2", "jamba"])
def test_answers_to_unlike_prompts_come_from_the_scored_policy(family: str) -> None:
    with without_warnings():
        assert distance(family) < 1e-3


@pytest.mark.slow
@pytest.mark.long
def test_all_families_answer_from_the_scored_policy() -> None:
    with without_warnings():
        wrong = {
            family: found
            for family, _, _ in families()
            if family not in LEFT_OUT | BIDIRECTIONAL | NO_LOOP and (found := distance(family)) > 3e-3
        }
    assert not wrong


def test_load_policy_turns_router_logits_off(tmp_path: Path) -> None:
    """transformers' balance loss fails on the engine's masks."""
    with without_warnings():
        model = tiny_family("mixtral", output_router_logits=True)
        model.save_pretrained(tmp_path)
        answers = HfEngine([load_policy(tmp_path, "fp32", "cpu")], tokens=200, pad_id=2).generate(
            PROMPTS, Sampling(1.0, 1.0, 0, 12, (99,)), range(3)
        )
    assert [len(answer.token_ids) for answer in answers] == [12, 12, 12]
