"""The engine interface: names, refusals, and where an answer ends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
from transformers import LlamaConfig

from spinreg_core.config import GenerationConfig, ResourcesConfig, resolve_engine
from spinreg_core.errors import BadInput, SpinregError
from spinreg_core.generation.engine import Answer, Sampling, check_prompts, cut
from spinreg_core.generation.open import open_engine

SAMPLING = Sampling(1.0, 1.0, 0, max_new_tokens=4, stop_ids=(7, 9))


@pytest.mark.parametrize(
    ("sampled", "answer", "finish"),
    [
        ([1, 7, 0, 0], [1, 7], "stop"),
        ([7, 7, 7, 7], [7], "stop"),  # an empty answer; only the first stop token is kept
        ([1, 2, 3, 9], [1, 2, 3, 9], "stop"),  # finished with the very last token
        ([1, 2, 3, 4], [1, 2, 3, 4], "length"),
        ([1, 9, 7, 4], [1, 9], "stop"),
    ],
)
def test_cut_ends_an_answer_at_its_first_stop_id(sampled: list[int], answer: list[int], finish: Any) -> None:
    logprobs = [-float(i) for i in range(4)]
    assert cut(sampled, SAMPLING, logprobs) == Answer(answer, finish, logprobs[: len(answer)])


def test_cut_short_row_without_stop_id_is_an_error() -> None:
    with pytest.raises(SpinregError, match="after 2 tokens"):
        cut([1, 2], SAMPLING, [0.0, 0.0])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 13, r"prompt 1 has 13 tokens plus max_new_tokens 4; expected at most 16"),
        ([], r"prompt 1 has no tokens"),
        ([3, 20], r"prompt 1 has token ids 3 to 20; expected ids from 0 to 19"),
        ([-1], r"token ids -1 to -1"),
    ],
)
def test_unanswerable_prompts_are_named(prompt: list[int], message: str) -> None:
    config = LlamaConfig(vocab_size=20, max_position_embeddings=16)
    check_prompts([[1] * 12, [19]], SAMPLING, config)
    with pytest.raises(BadInput, match=message):
        check_prompts([[1], prompt], SAMPLING, config)


def test_only_the_neutral_sampler_is_the_policy() -> None:
    assert Sampling.of(GenerationConfig(), [2]).is_the_policy
    for change in ({"temperature": 0.9}, {"top_p": 0.99}, {"top_k": 50}):
        assert not Sampling.of(GenerationConfig(**change), [2]).is_the_policy


def test_auto_is_vllm_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    assert [resolve_engine("hf"), resolve_engine("vllm")] == ["hf", "vllm"]
    assert resolve_engine("auto") == ("vllm" if importlib.util.find_spec("vllm") else "hf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_engine("auto") == "hf"
    with pytest.raises(BadInput, match="not installed"):
        open_engine("vllm", [tmp_path], GenerationConfig(), ResourcesConfig(), pad_id=0)


def test_resolve_engine_loads_no_heavy_module() -> None:
    code = (
        "import sys, spinreg_core.runs.plans; from spinreg_core.config import resolve_engine\n"
        "resolve_engine('auto')\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
