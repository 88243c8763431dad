"""Compiled layers compute what plain ones do, on one rank and on two, and really are compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from spinreg_core.config import ResourcesConfig
from spinreg_core.logprobs.policy import load_for
from spinreg_core.logprobs.scoring import score
from spinreg_core.logprobs.sequence import answer_logprobs, packs
from spinreg_core.runtime.distributed import Ranks, init_ranks
from tests.support.rank_processes import ranked
from tests.support.tiny_models import _SHAPE, ALONE, random_pairs, random_rows, tiny_model, write_policy


@pytest.mark.slow
@pytest.mark.long
def test_compiled_model_keeps_logprobs_and_gradients(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    torch.manual_seed(0)
    # Six layers: a graph for each would be many more than one for all.
    LlamaForCausalLM(LlamaConfig(**_SHAPE | {"num_hidden_layers": 6})).save_pretrained(folder)
    plain = load_for(ALONE, folder, "fp32")
    torch._dynamo.utils.counters.clear()
    compiled = load_for(Ranks(torch.device("cpu"), compile=True), folder, "fp32")
    assert packs(compiled)
    for seed in (1, 2, 3):  # other lengths are no other graph
        prompts, answers = random_rows(4 + seed, seed)
        sums = [answer_logprobs(model, prompts, answers, precision="fp32") for model in (plain, compiled)]
        torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-4)
        for model, values in zip((plain, compiled), sums, strict=True):
            model.zero_grad()
            (values * torch.linspace(-1, 2, len(values))).sum().backward()
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert float((b.grad - a.grad).norm()) < 1e-4 * float(a.grad.norm()), name
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 10, f"{graphs} graphs, not one set for all layers and lengths"


@pytest.mark.long
@pytest.mark.slow
def test_compiled_model_on_two_ranks_keeps_logprobs(tmp_path: Path) -> None:
    pairs = random_pairs(8, 2)
    for name, seed in (("previous", 1), ("base", 2)):
        for which in ("real", "generated"):
            answers = [p[f"{which}_ids"] for p in pairs]
            values = score(tiny_model(seed=seed), [p["prompt_ids"] for p in pairs], answers, precision="fp32",
                           tokens_per_pass=100)  # fmt: skip
            for pair, value in zip(pairs, values, strict=True):
                pair[f"{name}_{which}"] = value
    write_policy(tmp_path / "llama", 0, "llama")
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    found = {}
    for compiled, checkpointing in (("off", "none"), ("on", "full")):
        ranked(2, "gradient", tmp_path / compiled, kind="llama", tokens=60, compile=compiled,
               activation_checkpointing=checkpointing)  # fmt: skip
        found[compiled] = load_file(tmp_path / compiled / "gradient.safetensors")
    assert found["on"].keys() == found["off"].keys()
    for name, value in found["off"].items():
        torch.testing.assert_close(found["on"][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("setting", "expected"), [("auto", torch.cuda.is_available()), ("on", True), ("off", False)])
def test_compiles_auto_means_gpus(setting: str, expected: bool) -> None:
    assert init_ranks(ResourcesConfig.model_validate({"compile": setting})).compile == expected
