"""Several ranks compute what one computes: log-probabilities, gradients, whole rounds, published policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked import ranked
from safetensors.torch import load_file
from tiny import random_pairs, tiny_model, write_policy
from transformers import AutoModelForCausalLM

from spinreg_core.scoring import score


@pytest.fixture(name="given", scope="module")
def _given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with policies by kind and eight pairs scored under two others."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind in ("llama", "llama-tied", "gemma2", "mamba"):
        write_policy(folder / kind, 0, kind)
    pairs = random_pairs(8, 2)
    for name, seed in (("previous", 1), ("base", 2)):
        for which in ("real", "generated"):
            values = score(tiny_model(seed=seed), [p["prompt_ids"] for p in pairs], [p[f"{which}_ids"] for p in pairs],
                           precision="fp32", tokens_per_pass=100)  # fmt: skip
            for pair, value in zip(pairs, values, strict=True):
                pair[f"{name}_{which}"] = value
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


def gradient(given: Path, processes: int, kind: str, tokens: int, name: str, **more: Any) -> tuple[Any, Any]:
    folder = given / name
    ranked(
        processes,
        "gradient",
        folder,
        policy=str(given / kind),
        training=more.pop("training", {}),
        tokens=tokens,
        **more,
    )
    return load_file(folder / "gradient.safetensors"), json.loads((folder / "values.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2", "mamba"])
def test_a_batch_of_8_is_8_accumulations_of_1_is_2_ranks_of_4(given: Path, kind: str) -> None:
    batch, values = gradient(given, 1, kind, 5000, f"{kind}-batch")
    for name, processes, tokens in (("passes", 1, 1), ("ranks", 2, 5000), ("ranks-and-passes", 2, 1)):
        found, other = gradient(given, processes, kind, tokens, f"{kind}-{name}")
        assert found.keys() == batch.keys()
        for key, value in batch.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{name} {k}: {m}")
        for key, row in values.items():
            assert other[key] == pytest.approx(row, abs=1e-4), (name, key)


@pytest.mark.parametrize(
    ("processes", "shard_over", "checkpointing"),
    [(4, 4, "none"), (4, 2, "selective"), (2, 1, "full"), (3, "auto", "full")],
)
def test_meshes_and_recomputation_do_not_change_the_gradient(
    given: Path, processes: int, shard_over: int | str, checkpointing: str
) -> None:
    batch, _ = gradient(given, 1, "llama", 5000, "whole")
    found, _ = gradient(given, processes, "llama", 60, f"mesh-{processes}-{shard_over}", shard_over=shard_over,
                        training={"activation_checkpointing": checkpointing})  # fmt: skip
    for key, value in batch.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_mixed_precision_is_near_the_exact_gradient_and_not_biased(given: Path) -> None:
    exact, _ = gradient(given, 1, "llama", 5000, "exact")
    found, _ = gradient(given, 2, "llama", 60, "mixed", training={"precision": "mixed"})
    a, b = (torch.cat([grads[key].flatten() for key in exact]) for grads in (exact, found))
    assert b.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.995
    residual = b - a
    assert abs(float(residual.mean())) < 4 * float(residual.std()) / len(residual) ** 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("processes", [2, 4])
def test_a_round_on_ranks_is_the_round(given: Path, optimizer: str, processes: int) -> None:
    results = {}
    for number in (1, processes):
        folder = given / f"round-{optimizer}-{number}-of-{processes}"
        training = {"optimizer": optimizer, "epochs": 3, "batch_size": 3, "learning_rate": 1e-4}
        ranked(number, "steps", folder, policy=str(given / "llama-tied"), training=training, tokens=70)
        model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
        assert (folder / "policy" / "extra" / "notes.txt").read_text() == "kept"
        results[number] = model.state_dict(), json.loads((folder / "metrics.json").read_text())
    (one, (metrics, summary)), (many, (other, also)) = results[1], results[processes]
    start = AutoModelForCausalLM.from_pretrained(given / "llama-tied", dtype=torch.float32).state_dict()
    for key, value in one.items():
        moved = float((value - start[key]).norm())
        assert float((many[key] - value).norm()) <= 0.02 * moved, key
    for a, b in zip(metrics, other, strict=True):
        for name in ("loss", "margin", "grad_norm", "real_logp", "learning_rate", "tokens"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-4), name
    assert also["real_logprob_change"] == pytest.approx(summary["real_logprob_change"], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_scores_are_the_same_on_every_rank(given: Path, kind: str) -> None:
    found = {}
    for processes in (1, 2):
        folder = given / f"scores-{kind}-{processes}"
        ranked(processes, "scores", folder, policy=str(given / kind), tokens=30)
        found[processes] = [json.loads(p.read_text()) for p in sorted(folder.glob("scores-*.json"))]
    one, nine = found[1]
    assert nine[3] == 0
    assert found[2][0] == found[2][1] == pytest.approx(one, abs=1e-4)
    assert found[2][2] == found[2][3] == pytest.approx(nine, abs=1e-4)
