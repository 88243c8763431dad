"""Checkpoints bring back every bit; a published policy differs from the one before in its weights only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinreg_core.config import TrainingConfig
from spinreg_core.errors import Damaged
from spinreg_core.models.loading import load_policy
from spinreg_core.training.checkpoint_files import load_checkpoint, own_files, publish_policy, start_checkpoint
from spinreg_core.training.optimizer import make_optimizer
from tests.support.tiny_models import ALONE, tiny_model, write_policy


def trained(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_resume_from_a_checkpoint_changes_no_bit(tmp_path: Path, name: Literal["adamw", "rmsprop"], kind: str) -> None:
    model = tiny_model(kind)
    optimizer = make_optimizer(model, TrainingConfig(optimizer=name))
    trained(model, optimizer, 3, seed=1)
    torch.manual_seed(77)
    kept = json.dumps({"metrics": [{"loss": 0.1 + 0.2}], "watched_start": None})
    writing = start_checkpoint(tmp_path, model, optimizer, kept, ALONE)
    drawn = torch.rand(3)
    trained(model, optimizer, 2, seed=2)  # while it is being written
    writing.result()

    other = tiny_model(kind, seed=9)
    fresh = make_optimizer(other, TrainingConfig(optimizer=name))
    assert [path.name for path in own_files(tmp_path, ALONE)] == sorted(path.name for path in tmp_path.iterdir())
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}  # no pickle
    assert load_checkpoint(tmp_path, other, fresh, ALONE) == kept
    assert torch.equal(torch.rand(3), drawn)
    trained(other, fresh, 2, seed=2)
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_a_checkpoint_before_the_first_update_has_no_optimizer_state(tmp_path: Path) -> None:
    """Every step so far was skipped, say."""
    model = tiny_model()
    start_checkpoint(tmp_path, model, make_optimizer(model, TrainingConfig()), "{}", ALONE).result()
    fresh = make_optimizer(model, TrainingConfig())
    load_checkpoint(tmp_path, model, fresh, ALONE)
    assert not fresh.state


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    start_checkpoint(tmp_path, model, make_optimizer(model, TrainingConfig()), "{}", ALONE).result()
    wider = tiny_model("llama-tied")
    with torch.no_grad():
        wider.model.norm.weight = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(Damaged, match=r"model\.norm\.weight: found \(32,\); expected shape \(5,\)"):
        load_checkpoint(tmp_path, wider, make_optimizer(wider, TrainingConfig()), ALONE)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_published_policies_differ_in_weights_only(tmp_path: Path, kind: str, dtype: torch.dtype | None) -> None:
    previous = write_policy(tmp_path / "previous", 0, kind)
    # A hub model may bring defaults that transformers refuses to save; they are the user's.
    (previous / "generation_config.json").write_text(
        '{"do_sample": false,  "temperature": 0.3, "eos_token_id": [1, 2]}'
    )
    config = json.loads((previous / "config.json").read_text()) | {"torch_dtype": "float32", "somebodys": {"own": 1}}
    (previous / "config.json").write_text(json.dumps(config))
    model = load_policy(previous, "mixed", "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    publish_policy(model, previous, tmp_path / "next", dtype)

    names = {p.relative_to(previous).as_posix() for p in previous.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "next").as_posix() for p in (tmp_path / "next").rglob("*") if p.is_file()} == names
    assert {"tokenizer.json", "chat_template.jinja", "extra/notes.txt"} < names
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "next" / name).read_bytes() == (previous / name).read_bytes(), name
    wanted = "float32" if dtype is None else "bfloat16"
    found = json.loads((tmp_path / "next" / "config.json").read_text())
    assert found == config | {"dtype": wanted, "torch_dtype": wanted}
    weights = load_file(tmp_path / "next" / "model.safetensors")
    assert {str(t.dtype) for t in weights.values()} == {f"torch.{wanted}"}
    assert ("lm_head.weight" in weights) == (kind == "llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "next")
    assert loaded.dtype == model.dtype == (dtype or torch.float32)
    for (n, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), n
