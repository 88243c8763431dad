"""Several ranks compute what one computes: log-probabilities, gradients, whole rounds, published policies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spinreg_core.logprobs.scoring import score
from tests.support.rank_processes import ranked
from tests.support.tiny_models import random_pairs, tiny_model, write_policy

KINDS = ("llama", "llama-tied", "gemma2", "mamba")
ROUND = {"do": "steps", "kind": "llama-tied", "tokens": 70, "epochs": 3, "batch_size": 3, "learning_rate": 1e-4}
ON_ONE = {f"{kind}-batch": {"do": "gradient", "kind": kind, "tokens": 5000} for kind in KINDS}
ON_ONE |= {f"{kind}-passes": {"do": "gradient", "kind": kind, "tokens": 1} for kind in KINDS}
ROUNDS = {f"round-{name}": ROUND | {"optimizer": name} for name in ("adamw", "rmsprop")}
SCORES = {f"scores-{kind}": {"do": "scores", "kind": kind, "tokens": 30} for kind in ("llama", "mamba")}
RECOMPUTED = {
    f"recomputed-{what}": {"do": "gradient", "kind": "llama", "tokens": 60, "activation_checkpointing": what}
    for what in ("none", "selective", "full")
}
LORA = {"lora_rank": 4, "learning_rate": 1e-3}
ADAPTED = {
    "lora": {"do": "gradient", "kind": "llama", "tokens": 60} | LORA,
    "lora-bf16": {"do": "gradient", "kind": "llama", "tokens": 60, "precision": "bf16"} | LORA,
    "round-lora": ROUND | LORA,
}
MIXED = {"mixed": {"do": "gradient", "kind": "llama", "tokens": 60, "precision": "mixed"}}
WORK: dict[tuple[int, int | str], dict[str, Any]] = {
    (1, "auto"): ON_ONE | ROUNDS | SCORES | ADAPTED,
    (2, "auto"): ON_ONE | ROUNDS | SCORES | RECOMPUTED | MIXED | ADAPTED,
    (2, 1): RECOMPUTED,
    (3, "auto"): RECOMPUTED | SCORES,
    (4, "auto"): ROUNDS,
    (4, 2): RECOMPUTED | ROUNDS | MIXED,
}


class Given:
    """Results by number of ranks; each is started once, for all tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: dict[tuple[int, int | str], Path] = {}
        self.pairs = random_pairs(8, 2)
        for name, seed in (("previous", 1), ("base", 2)):
            for which in ("real", "generated"):
                answers = [p[f"{which}_ids"] for p in self.pairs]
                values = score(tiny_model(seed=seed), [p["prompt_ids"] for p in self.pairs], answers, precision="fp32",
                               tokens_per_pass=100)  # fmt: skip
                for pair, value in zip(self.pairs, values, strict=True):
                    pair[f"{name}_{which}"] = value

    def folder(self, processes: int, shard_over: int | str = "auto") -> Path:
        key = (processes, shard_over)
        if key not in self.done:
            folder = self.root / f"{processes}-{shard_over}"
            for kind in KINDS:
                write_policy(folder / kind, 0, kind)
            (folder / "pairs.json").write_text(json.dumps(self.pairs))
            ranked(processes, "several", folder, work=WORK[key], shard_over=shard_over)
            self.done[key] = folder
        return self.done[key]

    def gradient(self, name: str, *ranks: Any) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
        folder = self.folder(*ranks) / name
        return load_file(folder / "gradient.safetensors"), json.loads((folder / "values.json").read_text())


@pytest.fixture(name="given", scope="module")
def _given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("ranks"))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_batch_equals_that_of_passes_and_of_two_ranks(given: Given, kind: str) -> None:
    batch, values = given.gradient(f"{kind}-batch", 1)
    for name, processes in (("passes", 1), ("batch", 2), ("passes", 2)):
        found, other = given.gradient(f"{kind}-{name}", processes)
        same(found, batch)
        for key, row in values.items():
            assert other[key] == pytest.approx(row, abs=1e-4), (name, key)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "ranks", [(2, "auto"), *(pytest.param(r, marks=pytest.mark.long) for r in [(2, 1), (3, "auto"), (4, 2)])], ids=str
)
def test_meshes_and_recomputation_do_not_change_the_gradient(given: Given, ranks: Any, checkpointing: str) -> None:
    same(given.gradient(f"recomputed-{checkpointing}", *ranks)[0], given.gradient("llama-batch", 1)[0])


def test_mixed_precision_is_near_the_exact_gradient_and_not_biased(given: Given) -> None:
    exact, _ = given.gradient("llama-batch", 1)
    found, _ = given.gradient("mixed", 2)
    a, b = (torch.cat([grads[key].flatten() for key in exact]) for grads in (exact, found))
    assert b.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.995
    residual = b - a
    assert abs(float(residual.mean())) < 4 * float(residual.std()) / len(residual) ** 0.5


@pytest.mark.parametrize("ranks", [(2, "auto"), pytest.param((4, 2), marks=pytest.mark.long)], ids=str)
def test_mixed_precision_on_ranks_is_packed(given: Given, ranks: Any) -> None:
    assert json.loads((given.folder(*ranks) / "mixed/longest_packed.json").read_text()) == math.inf


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize(
    "ranks", [(2, "auto"), *(pytest.param(r, marks=pytest.mark.long) for r in [(4, "auto"), (4, 2)])], ids=str
)
def test_round_on_ranks_equals_the_round_on_one(given: Given, optimizer: str, ranks: Any) -> None:
    start = tiny_model("llama-tied", 0).state_dict()
    (one, metrics, summary), (many, other, also) = (
        _round(given.folder(*r) / f"round-{optimizer}") for r in ((1,), ranks)
    )
    for key, value in one.items():
        moved = float((value - start[key]).norm())
        assert float((many[key] - value).norm()) <= 0.02 * moved, key
    assert len(metrics) == 9
    for a, b in zip(metrics, other, strict=True):
        for name in ("loss", "margin", "grad_norm", "real_logp", "learning_rate", "tokens"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-4), name
    assert also["real_logprob_change"] == pytest.approx(summary["real_logprob_change"], rel=1e-2, abs=1e-3)


def test_adapter_on_ranks_equals_the_adapter_on_one(given: Given) -> None:
    one, two = (given.gradient("lora", processes)[0] for processes in (1, 2))
    assert {name.split(".")[-3] for name in one} == {"lora_A", "lora_B"}
    same(two, one)
    half = [torch.cat([g.flatten() for g in given.gradient("lora-bf16", n)[0].values()]) for n in (1, 2)]
    assert float(torch.nn.functional.cosine_similarity(*half, dim=0)) > 0.99

    (alone, metrics, _), (many, other, _) = (_round(given.folder(n) / "round-lora") for n in (1, 2))
    start = tiny_model("llama-tied", 0).state_dict()
    for key, value in alone.items():
        assert float((many[key] - value).norm()) <= 0.02 * float((value - start[key]).norm()), key
    assert [m["loss"] for m in other] == pytest.approx([m["loss"] for m in metrics], rel=2e-3)
    adapters = [load_file(given.folder(n) / "round-lora" / "adapter" / "adapter_model.safetensors") for n in (1, 2)]
    assert {name: t.shape for name, t in adapters[0].items()} == {name: t.shape for name, t in adapters[1].items()}


def _round(folder: Path) -> tuple[Any, Any, Any]:
    """Weights as transformers loads what was published, metrics, summary."""
    names = {p.relative_to(folder / "policy").as_posix() for p in (folder / "policy").rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors", "extra/notes.txt", "chat_template.jinja"} <= names
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    return model.state_dict(), *json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_scores_are_the_same_on_every_rank(given: Given, kind: str) -> None:
    one, nine = json.loads((given.folder(1) / f"scores-{kind}" / "scores-0.json").read_text())
    assert nine[3] == 0
    assert one[0] == pytest.approx(nine[0], abs=1e-4)
    for processes in (2, 3):
        for rank in range(processes):
            found = json.loads((given.folder(processes) / f"scores-{kind}" / f"scores-{rank}.json").read_text())
            assert found[0] == pytest.approx(one, abs=1e-4)
            assert found[1] == pytest.approx(nine, abs=1e-4)
