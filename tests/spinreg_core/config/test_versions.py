"""Configurations of other versions: which fields are filled in, dropped, accepted and refused."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import Group, RunConfig, versions
from spinreg_core.config.resolve import resolve, stored_config, validate
from spinreg_core.config.versions import RemovedField, complete_stored, without_removed
from spinreg_core.errors import BadInput, ConfigChanged, Damaged
from spinreg_core.runs.head import check_config

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def epochs_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """training.epochs and seed exist since now; before, every run made 3 passes with seed 7."""
    monkeypatch.setitem(versions.ADDED, "training.epochs", 3)
    monkeypatch.setitem(versions.ADDED, "seed", 7)


@pytest.fixture
def tempo_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.REMOVED, "opponent.tempo", RemovedField("slow", "use opponent.decay"))
    monkeypatch.setitem(versions.REMOVED, "tempo", RemovedField(None, "use seed"))


def stored(**changes: Any) -> dict[str, Any]:
    values = RunConfig().model_dump(mode="json")
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(values.get(name), dict) else value
    return values


@pytest.mark.usefixtures("epochs_are_new")
def test_stored_config_missing_field_gets_the_value_before_it_existed() -> None:
    old = stored()
    del old["seed"], old["training"]["epochs"]
    config = stored_config(old, "here")
    assert (config.seed, config.training.epochs) == (7, 3)
    assert "epochs" not in old["training"], "the caller's document stays as it was read"


@pytest.mark.usefixtures("epochs_are_new")
def test_stored_config_present_field_keeps_its_value() -> None:
    assert stored_config(stored(seed=1), "here") == RunConfig(seed=1)


@pytest.mark.usefixtures("epochs_are_new")
def test_stored_config_missing_group_gets_its_added_fields() -> None:
    old = stored()
    del old["training"]
    assert stored_config(old, "here").training.epochs == 3


@pytest.mark.usefixtures("epochs_are_new")
def test_check_config_compares_the_completed_configuration() -> None:
    old = stored()
    del old["training"]["epochs"]
    run = stored_config(old, "here")
    check_config(run, validate({"training": {"epochs": 3}}))
    with pytest.raises(ConfigChanged, match=r"training\.epochs: 3 -> 1"):
        check_config(run, RunConfig())
    check_config(run, resolve({"rounds": 1}, stored=run))


@pytest.mark.usefixtures("epochs_are_new")
def test_stored_config_damaged_group_is_left_to_validation() -> None:
    damaged = {"training": 5, "judge": 5, "objective": 5, "opponent": 5, "seed": 0}
    assert complete_stored(damaged) == damaged
    with pytest.raises(Damaged, match="training"):
        stored_config({"training": 5}, "here")


@pytest.mark.usefixtures("tempo_is_gone")
@pytest.mark.parametrize("value", ["slow", "fast", None])
def test_stored_config_removed_field_is_dropped(value: str | None) -> None:
    assert stored_config(stored(opponent={"tempo": value}, tempo=4), "here") == RunConfig()


@pytest.mark.usefixtures("tempo_is_gone")
@pytest.mark.parametrize("value", ["slow", None])
def test_validate_removed_field_at_its_old_default_is_accepted(value: str | None) -> None:
    given = {"opponent": {"tempo": value, "decay": 0.25}, "tempo": None}
    assert validate(given).opponent.decay == 0.25
    assert given["opponent"] == {"tempo": value, "decay": 0.25}


@pytest.mark.usefixtures("tempo_is_gone")
@pytest.mark.parametrize(
    ("values", "field", "replacement"),
    [
        ({"opponent": {"tempo": "fast"}}, "opponent.tempo", "use opponent.decay"),
        ({"tempo": 4}, "tempo", "use seed"),
    ],
)
def test_validate_removed_field_with_a_value_names_its_replacement(
    values: dict[str, Any], field: str, replacement: str
) -> None:
    with pytest.raises(BadInput) as caught:
        validate(values)
    assert str(caught.value).startswith(f"{field}")
    assert "is no longer a field" in str(caught.value)
    assert str(caught.value).endswith(replacement)


@pytest.mark.usefixtures("tempo_is_gone")
def test_without_removed_group_takes_the_fields_of_that_group_only() -> None:
    assert without_removed({"tempo": "slow", "decay": 1}, "opponent") == {"decay": 1}
    assert without_removed({"tempo": "fast"}, "training") == {"tempo": "fast"}
    with pytest.raises(BadInput, match=r"opponent\.tempo"):
        without_removed({"tempo": "fast"}, "opponent")


def paths(values: dict[str, Any]) -> set[str]:
    """The fields of a configuration, those of groups by their path."""
    groups = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, Group)}
    return {
        f"{name}.{inner}" if name in groups else name
        for name, value in values.items()
        for inner in (value if name in groups else [""])
    }


@pytest.mark.parametrize("run", ["smoke", "smoke-spin"])
def test_stored_config_of_0_1_0_keeps_every_field(run: str) -> None:
    """Each of its fields has the value of then; every field that it lacks is in ADDED, every other one in REMOVED."""
    with tarfile.open(DATA / "store-0.1.0.tar.gz") as archive:
        raw = archive.extractfile(f"runs/{run}/run.json")
        assert raw is not None
        old = json.load(raw)["config"]
    read = stored_config(old, "here").model_dump(mode="json")
    assert paths(read) - paths(old) <= set(versions.ADDED)
    assert paths(old) - paths(read) <= set(versions.REMOVED)
    for path in paths(old) & paths(read):
        group, _, field = path.rpartition(".")
        assert (read[group][field], path) == (old[group][field], path) if group else read[field] == old[field]


def test_tables_name_fields_that_exist_and_fields_that_do_not() -> None:
    fields = paths(RunConfig().model_dump(mode="json"))
    assert set(versions.ADDED) <= fields
    assert not set(versions.REMOVED) & fields


def test_resolve_with_a_file_keeps_the_rule_of_a_run_from_before_the_field(tmp_path: Path) -> None:
    old = stored()
    del old["judge"]["parsing"]
    before = stored_config(old, "here")
    assert (before.judge.parsing, RunConfig().judge.parsing) == ("fastchat", "strict")
    file = tmp_path / "run.yaml"
    file.write_text("judge: {model: gpt}")
    assert resolve({}, str(file)).judge.parsing == "strict"
    assert resolve({}, str(file), stored=before).judge.parsing == "fastchat"
    assert resolve({"judge": {"parsing": "strict"}}, str(file), stored=before).judge.parsing == "strict"
    assert resolve({}, str(file), stored=RunConfig()).judge.parsing == "strict"
