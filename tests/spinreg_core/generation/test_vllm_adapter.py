"""vLLM's log-probabilities of answers under a LoRA policy, merged or as base plus adapter, equal the scorer's."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from spinreg_core.config import TrainingConfig
from spinreg_core.logprobs.scoring import score
from spinreg_core.models.loading import load_policy
from spinreg_core.models.lora import add_adapter, start_adapter
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.training.checkpoint_files import publish_adapted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


@pytest.mark.long
def test_vllm_agrees_with_the_scorer_on_both(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    base, training = tmp_path / "base", TrainingConfig(lora_rank=4, lora_alpha=8.0, precision="fp32")
    tiny_model.save_pretrained(base)
    model = load_policy(base, "fp32", "cpu")
    add_adapter(model, training)
    start_adapter(model, 1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    publish_adapted(model, base, tmp_path / "out", training, str(base), Ranks(torch.device("cpu")))

    numbers = random.Random(0)
    prompts = [[numbers.randrange(11) for _ in range(numbers.randint(1, 12))] for _ in range(24)]
    merged, adapter = tmp_path / "out" / "policy", tmp_path / "out" / "adapter"
    given = {"prompts": prompts, "base": str(base), "merged": str(merged), "adapter": str(adapter)}
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps(given))
    subprocess.run(
        [sys.executable, "-m", "tests.support.vllm_scores", str(request), str(result)], check=True, timeout=300
    )

    for which, sampled in json.loads(result.read_text()).items():
        answers, told = [ids for ids, _ in sampled], [value for _, value in sampled]
        ours, of_sum, of_base = (
            score(policy, prompts, answers, precision="fp32", tokens_per_pass=200)
            for policy in (model, load_policy(merged, "fp32", "cpu"), load_policy(base, "fp32", "cpu"))
        )
        assert told == pytest.approx(ours, abs=0.01), which
        assert told == pytest.approx(of_sum, abs=0.01), which
        assert told != pytest.approx(of_base, abs=0.5), "the adapter matters"
