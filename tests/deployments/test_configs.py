"""The run configurations that ship: valid, saying what they claim, differing where they claim to differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import RunConfig, of_round
from spinreg_core.config.resolve import differences, load_config_file, resolve

CONFIGS = Path(__file__).parents[2] / "deployments" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def config(name: str) -> RunConfig:
    return resolve({}, str(CONFIGS / f"{name}.yaml"))


def test_configs_are_all_listed_here() -> None:
    assert NAMES == [
        "alpha-spin-zephyr-7b", "demo", "fictitious-play-zephyr-7b", "smoke", "spin-zephyr-7b",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_valid_and_running_again_changes_nothing(name: str) -> None:
    resolved = config(name)
    assert resolved.run == name
    assert resolved.rounds is None
    assert resolved.until_round is not None


@pytest.mark.parametrize("name", NAMES)
def test_configs_numbers_are_numbers(name: str) -> None:
    """YAML reads 5e-7 (no dot) as text, which only luck turns back into a number."""

    def check(value: Any, default: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                check(inner, default[key])
        elif isinstance(default, int | float) and not isinstance(default, bool):
            assert all(isinstance(v, int | float) for v in (value if isinstance(value, list) else [value])), value

    defaults = RunConfig().model_dump() | {"until_round": 0}
    check(load_config_file(str(CONFIGS / f"{name}.yaml")), defaults)


def test_demo_config_equals_the_defaults() -> None:
    written = load_config_file(str(CONFIGS / "demo.yaml"))
    assert differences(RunConfig().model_dump(mode="json"), config("demo").model_dump(mode="json")) == [
        "until_round: None -> 2"
    ]
    everything = RunConfig().model_dump(mode="json", exclude={"rounds"})
    assert written.keys() == everything.keys()
    for group, fields in everything.items():
        if isinstance(fields, dict):
            assert written[group].keys() == fields.keys(), group


def test_demo_config_uses_the_regularised_method() -> None:
    demo = config("demo")
    assert demo.opponent.history == "all"
    assert demo.objective.alpha < 1
    assert demo.until_round == 2


def test_smoke_config_is_small() -> None:
    smoke = config("smoke")
    assert (smoke.model, smoke.dataset, smoke.until_round) == ("random:tiny", "builtin:demo", 2)
    assert smoke.generation.engine == "hf"
    assert smoke.data.prompts_per_round is not None
    assert smoke.data.prompts_per_round <= 16
    # Killed in the middle, each long stage has something to continue from.
    assert smoke.data.prompts_per_round > smoke.generation.shard_size
    assert smoke.training.checkpoint_every_steps is not None
    assert smoke.data.prompts_per_round // smoke.training.batch_size > smoke.training.checkpoint_every_steps


def test_spin_zephyr_config_is_the_published_recipe() -> None:
    spin = config("spin-zephyr-7b")
    assert spin.model == "alignment-handbook/zephyr-7b-sft-full"
    assert (spin.dataset, spin.data.split) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert (spin.data.turns, spin.data.prompts_per_round, spin.data.round_prompts) == ("first", 50_000, "same")
    assert (spin.data.max_length, spin.data.max_prompt_tokens) == (1024, 512)
    assert (spin.generation.max_new_tokens, spin.generation.temperature) == (256, 1.0)
    assert (spin.opponent.source, spin.opponent.history, spin.opponent.weighting) == ("replay", 2, "uniform")
    assert (spin.objective.alpha, spin.objective.beta, spin.objective.link) == (1.0, 0.1, "logistic")
    training = spin.training
    assert (training.optimizer, training.schedule, training.warmup) == ("rmsprop", "linear", 0.1)
    assert (training.batch_size, training.epochs) == (64, 2)
    assert [of_round(training.learning_rate, r) for r in (1, 2, 3, 4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert spin.until_round == 3  # iterations 0, 1 and 2; the fourth changes beta


def test_zephyr_variants_differ_from_the_recipe_in_one_field() -> None:
    spin = config("spin-zephyr-7b").model_dump(mode="json", exclude={"run"})
    alpha = config("alpha-spin-zephyr-7b").model_dump(mode="json", exclude={"run"})
    fictitious = config("fictitious-play-zephyr-7b").model_dump(mode="json", exclude={"run"})
    assert differences(spin, alpha) == ["objective.alpha: 1.0 -> 0.5"]
    assert differences(spin, fictitious) == ["opponent.history: 2 -> 'all'"]
