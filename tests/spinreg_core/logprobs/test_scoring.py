"""Scoring gives every row its own value, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spinreg_core.logprobs.scoring import score
from spinreg_core.logprobs.sequence import answer_logprobs
from spinreg_core.models.loading import load_policy
from spinreg_core.runtime.distributed import resolve_device
from spinreg_core.runtime.progress import Progress, parse
from tests.support.tiny_models import random_rows, tiny_model, write_policy


@pytest.mark.parametrize("tokens", [1, 40, 5000])
def test_rows_keep_their_order_and_their_values(tmp_path: Path, tokens: int) -> None:
    folder = write_policy(tmp_path / "p", 2)
    prompts, answers = random_rows(11, 7)
    model = load_policy(folder, "fp32", "cpu")
    found = score(model, prompts, answers, precision="fp32", tokens_per_pass=tokens)
    with torch.no_grad():
        expected = [float(answer_logprobs(model, [p], [a], precision="fp32")) for p, a in zip(prompts, answers)]  # noqa: B905
    assert found == pytest.approx(expected, abs=2e-4)
    assert len({round(x, 3) for x in expected}) == 11


def test_a_loaded_model_is_used_as_it_is_and_progress_counts_rows(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    prompts, answers = random_rows(7, 1)
    progress = Progress("mix-opponent", 7, "answers", every=0.0)
    score(model, prompts, answers, precision="mixed", tokens_per_pass=60, progress=progress)
    lines = [parse(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.done for line in lines if line][-1] == 7
    assert len(lines) > 1
    assert all(p.grad is None for p in model.parameters())
    assert score(model, [], [], precision="fp32", tokens_per_pass=9) == []


def test_mixed_equals_mixed_one_by_one_up_to_bfloat16(tmp_path: Path) -> None:
    """The kept bfloat16 copies of the weights are those of a fresh call."""
    model = tiny_model()
    prompts, answers = random_rows(6, 4)
    with torch.no_grad():
        fresh = [float(answer_logprobs(model, [p], [a], precision="mixed")) for p, a in zip(prompts, answers)]  # noqa: B905
    assert score(model, prompts, answers, precision="mixed", tokens_per_pass=1) == pytest.approx(fresh, abs=1e-6)
    with torch.no_grad():  # and they are gone once the weights changed
        for parameter in model.parameters():
            parameter.mul_(1.5)
    changed = score(model, prompts, answers, precision="mixed", tokens_per_pass=1)
    assert max(abs(a - b) for a, b in zip(changed, fresh, strict=True)) > 1


def test_resolve_device_maps_auto_to_the_hardware() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
