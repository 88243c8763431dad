"""From file, parameters and stored run to one configuration: precedence, and the message for a wrong value."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from s3fs import S3FileSystem

from spinreg_core.config import DataConfig, RunConfig
from spinreg_core.config.resolve import LARGEST_FILE, load_config_file, merge, resolve, show, validate
from spinreg_core.data.filters import load_training
from spinreg_core.errors import BadInput


def written(path: Path, values: dict[str, Any]) -> str:
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return str(path)


def refusal(values: dict[str, Any]) -> list[str]:
    """The lines about single fields."""
    with pytest.raises(BadInput) as caught:
        validate(values)
    head, *lines = str(caught.value).splitlines()
    assert head == "the run configuration is not valid:"
    return lines


# Precedence


def test_resolve_nothing_gives_the_defaults() -> None:
    assert resolve({}) == RunConfig()


@pytest.mark.parametrize("name", ["run.yaml", "run.yml", "run.json"])
def test_resolve_parameter_wins_over_file_and_file_over_defaults(tmp_path: Path, name: str) -> None:
    file = written(
        tmp_path / name, {"run": "of-file", "seed": 5, "objective": {"alpha": 0.25, "beta": 0.7}, "rounds": 3}
    )
    config = resolve({"seed": 9, "objective": {"alpha": 1.0}}, file)
    assert (config.run, config.seed, config.rounds) == ("of-file", 9, 3)
    assert (config.objective.alpha, config.objective.beta) == (1.0, 0.7)
    assert config.training == RunConfig().training


def test_resolve_merges_groups_and_replaces_lists(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", {"training": {"learning_rate": [1e-6, 2e-6, 3e-6], "epochs": 2}})
    config = resolve({"training": {"learning_rate": [9e-6]}}, file)
    assert config.training.learning_rate == [9e-6]
    assert config.training.epochs == 2


def test_resolve_stored_run_keeps_its_fields() -> None:
    stored = RunConfig.model_validate({"run": "r", "seed": 3, "objective": {"alpha": 0.1}, "until_round": 4})
    config = resolve({"run": "r", "rounds": 1}, stored=stored)
    assert (config.seed, config.objective.alpha) == (3, 0.1)
    assert (config.rounds, config.until_round) == (1, None)


def test_resolve_stored_run_keeps_the_store_it_was_found_in() -> None:
    stored = RunConfig(run="r", store="/where/it/was")
    assert resolve({"run": "r"}, stored=stored).store == RunConfig().store
    assert resolve({"run": "r", "store": "/now"}, stored=stored).store == "/now"


@pytest.mark.parametrize("field", ["store", "model", "dataset"])
def test_validate_refuses_credentials_without_repeating_them(field: str) -> None:
    with pytest.raises(
        BadInput, match=rf"{field} has credentials or a query in its address s3://\*\*\*@bucket/x; put"
    ) as caught:
        validate({field: "s3://me:hush@bucket/x"})
    assert "hush" not in str(caught.value)


def test_validate_refuses_credentials_with_slashes_and_in_groups() -> None:
    for values in ({"store": "s3://me:hu/sh@bucket/x"}, {"data": {"heldout_dataset": "s3://me:hu/sh@bucket/x"}}):
        with pytest.raises(BadInput, match=r"s3://\*\*\*@bucket/x") as caught:
            validate(values)
        assert "sh@" not in str(caught.value)
    assert validate({"dataset": "hf://datasets/user/rows@main"}).dataset == "hf://datasets/user/rows@main"


def test_resolve_stored_run_gives_no_target_round() -> None:
    stored = RunConfig(until_round=4)
    assert resolve({}, stored=stored).until_round is None


def test_resolve_parameter_wins_over_stored_run() -> None:
    assert resolve({"seed": 8}, stored=RunConfig(seed=3)).seed == 8


def test_resolve_with_a_file_ignores_the_stored_run(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", {"run": "r"})
    assert resolve({}, file, stored=RunConfig(run="r", seed=3)).seed == RunConfig().seed


@pytest.mark.parametrize(("given_", "left"), [({"rounds": 2}, (2, None)), ({"until_round": 7}, (None, 7))])
@pytest.mark.parametrize("in_file", [{"rounds": 1}, {"until_round": 5}])
def test_resolve_rounds_parameter_replaces_both_fields_of_the_file(
    tmp_path: Path, given_: dict[str, int], left: tuple[int | None, int | None], in_file: dict[str, int]
) -> None:
    config = resolve(given_, written(tmp_path / "a.yaml", in_file))
    assert (config.rounds, config.until_round) == left


def test_resolve_both_rounds_fields_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not both"):
        resolve({}, written(tmp_path / "a.yaml", {"rounds": 1, "until_round": 5}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.text(max_size=2), json_values, max_size=4)


@given(mappings, mappings, mappings)
def test_merge_has_an_identity_and_is_associative(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    assert merge(a, {}) == a
    assert merge({}, a) == a
    assert merge(a, a) == a
    flat_b = {k: v for k, v in b.items() if not isinstance(v, dict)}
    flat_c = {k: v for k, v in c.items() if not isinstance(v, dict)}
    assert merge(merge(a, flat_b), flat_c) == merge(a, merge(flat_b, flat_c))


def test_merge_changes_neither_argument() -> None:
    a, b = {"g": {"x": 1}}, {"g": {"y": 2}}
    assert merge(a, b) == {"g": {"x": 1, "y": 2}}
    assert (a, b) == ({"g": {"x": 1}}, {"g": {"y": 2}})


def test_show_resolves_to_the_same_configuration(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"run": "r", "objective": {"beta": [0.1, 5.0]}, "opponent": {"weighting": [1, 0.5]}}
    )
    (tmp_path / "shown.yaml").write_text(show(config))
    assert resolve({}, str(tmp_path / "shown.yaml")) == config


# Files


def test_load_config_file_empty_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert load_config_file(str(tmp_path / "a.yaml")) == {}


def test_load_config_file_reads_a_file_uri(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", {"seed": 4})
    assert resolve({}, f"file://{file}").seed == 4


def test_load_config_file_missing_names_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"config 'no/such.yaml' cannot be read") as caught:
        load_config_file("no/such.yaml")
    assert f"looked in {tmp_path}" in str(caught.value)


@pytest.mark.parametrize("location", ["nosuch://bucket/a.yaml", "gs://bucket/a.yaml"])
def test_load_config_file_refuses_unknown_kinds_of_address(location: str) -> None:
    with pytest.raises(BadInput, match="is neither a path nor an address"):
        load_config_file(location)


def test_load_config_file_unreachable_s3_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    # s3fs keeps its connections for the process: another test's server would answer.
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(BadInput, match=r"127\.0\.0\.1:1"):
            load_config_file("s3://bucket/never-there.yaml")
    finally:
        S3FileSystem.clear_instance_cache()


def test_load_config_file_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be read .* give a YAML or JSON file"):
        load_config_file(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", b"- run: x\n", "holds a list; write a mapping of field names to values"),
        ("a.yaml", b"just text\n", "holds text; write a mapping"),
        ("a.json", b"[1, 2]", "holds a list; write a mapping"),
        ("a.yaml", b"run: [unclosed\n", "does not parse"),
        ("a.yaml", b"run: x\n\tseed: 1\n", "does not parse"),
        ("a.json", b'{"run": "x",}', "does not parse"),
        ("a.json", b"run: x\n", "does not parse"),
        ("a.yaml", b"run: \xff\xfe\n", "does not parse"),
        ("a.yaml", b"!!python/object/apply:os.system ['true']\n", "does not parse"),
        ("a.yaml", b"#" * (LARGEST_FILE + 1), f"has more than {LARGEST_FILE} bytes"),
    ],
)
def test_load_config_file_refuses_other_content(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        load_config_file(str(tmp_path / name))
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_load_config_file_reads_the_largest_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"seed: 1\n" + b"#" * (LARGEST_FILE - 8))
    assert load_config_file(str(tmp_path / "a.yaml")) == {"seed": 1}


# Messages for wrong values


def test_validate_gives_one_line_for_each_wrong_field() -> None:
    lines = refusal(
        {
            "run": "No Good",
            "objective": {"alpha": 2, "link": "probit"},
            "opponent": {"history": 0},
            "training": {"learning_rate": "fast"},
        }
    )
    assert len(lines) == 5
    for line, field, found in zip(
        sorted(lines),
        ["objective.alpha", "objective.link", "opponent.history", "run", "training.learning_rate"],
        ["2", "'probit'", "0", "'No Good'", "'fast'"],
        strict=True,
    ):
        assert line.startswith(f"  - {field}: found {found}; expected ")


def test_validate_joins_the_types_of_a_field_in_one_line() -> None:
    assert refusal({"opponent": {"history": 0}}) == ["  - opponent.history: found 0; expected at least 1, or 'all'"]
    [line] = refusal({"objective": {"beta": -1}})
    assert "expected more than 0, or a list" in line
    [line] = refusal({"opponent": {"weighting": [1, -1]}})
    assert line.startswith("  - opponent.weighting: found [1, -1]; expected 'uniform' or 'recency'")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"alhpa": 1}, "alhpa"),
        ({"objective": {"alhpa": 1}}, "objective.alhpa"),
        ({"group": {"x": 1}}, "group"),
    ],
)
def test_validate_names_an_unknown_field(values: dict[str, Any], field: str) -> None:
    assert refusal(values) == [f"  - {field} is not a field; check its name"]


def test_validate_check_across_fields_names_its_fields() -> None:
    assert refusal({"rounds": 1, "until_round": 2}) == [
        "  - configuration: give rounds (advance by) or until_round (advance to), not both"
    ]
    [line] = refusal({"data": {"max_length": 100, "max_prompt_tokens": 100}})
    assert line.startswith("  - data: max_length (100) must exceed max_prompt_tokens (100): the longest prompt")


def test_validate_hides_a_value_in_place_of_a_group() -> None:
    assert refusal({"data": 5}) == [
        '  - data is not a mapping (its value is not shown); give its fields, such as {format: "auto"}'
    ]
    [line] = refusal({"judge": {"key_variable": "planted"}})
    assert line.startswith("  - judge.key_variable: found a value that is not shown; expected text that matches")


def test_validate_hides_the_words_of_pydantic() -> None:
    for values in ({"objective": {"beta": []}}, {"rounds": 0}, {"data": {"prompt_column": "a"}}, {"seed": None}):
        text = "\n".join(refusal(values))
        for word in ("pydantic", "constrained", "literal[", "list[", "Value error", "type="):
            assert word not in text


@pytest.mark.parametrize("location", ["http://127.0.0.1:1/a.yaml", "simplecache::s3://b/a.yaml", "zip://a::/x.zip"])
def test_load_config_file_opens_files_and_s3_only(location: str) -> None:
    """Any other one is refused by its form; opening it would end with "cannot be read"."""
    with pytest.raises(BadInput, match="is neither a path nor an address of the form file:// or s3://"):
        load_config_file(location)


def test_load_config_file_does_not_quote_the_file(tmp_path: Path) -> None:
    """The message is shown in logs, and the path may be any file of the machine."""
    (tmp_path / "credentials").write_text("[default]\naws_secret_access_key = planted: x: y\n")
    with pytest.raises(BadInput, match=r"does not parse: .*\(line 2, column 1\)") as caught:
        load_config_file(str(tmp_path / "credentials"))
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_load_config_file_refuses_deep_nesting(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(BadInput, match="does not parse: it is nested too deeply"):
        load_config_file(str(tmp_path / name))


def test_resolve_refuses_aliases_for_too_many_values(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(BadInput, match="more than 100000 values"):
        resolve({}, str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("opponent: &x {history: all}\nobjective: *x\n")
    assert load_config_file(str(tmp_path / "b.yaml"))["objective"] == {"history": "all"}


def test_pipes_are_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(BadInput, match="which is a pipe, a socket or a device"):
        resolve({}, str(tmp_path / "run.yaml"))
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(BadInput, match=r"dataset names .*rows\.jsonl, which is a pipe"):
        load_training(str(tmp_path / "rows.jsonl"), DataConfig())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("training: {batch_size: 010}", 'YAML reads 010 as the number 8; write that number, or "010" for the text'),
        ("generation: {max_new_tokens: 1:20}", "YAML reads 1:20 as the number 80"),
        ("run: 0042", 'YAML reads 0042 as the number 34; write that number, or "0042" for the text'),
        ("run: 42", """write "42" with the quotes (on a command line: -p 'run="42"')"""),
        ("run: 2024-11-30", 'write "2024-11-30" with the quotes'),
        ("run: on", "YAML reads on, off, yes and no as truth values"),
    ],
)
def test_resolve_refuses_values_that_yaml_reads_otherwise(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(line)
    with pytest.raises(BadInput) as error:
        resolve({}, str(file))
    assert words in str(error.value)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("0.5", 0.5), ("1_0", 10), ("-3", -3), ("1.0e-3", 0.001)])
def test_load_config_file_reads_decimal_numbers(tmp_path: Path, text: str, value: float) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"seed: {text}")
    assert load_config_file(str(file)) == {"seed": value}


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
def test_load_config_file_accepts_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"run": "mine"}', encoding="utf-8-sig")
    assert load_config_file(str(tmp_path / name)) == {"run": "mine"}


@pytest.mark.parametrize(("text", "plain"), [("False", "false"), ("true", "true"), ("None", "null"), ("null", "null")])
def test_resolve_refuses_the_text_of_a_truth_value_for_a_template(tmp_path: Path, text: str, plain: str) -> None:
    fields = {"data": {"template_arguments": {"enable_thinking": text}}}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(fields))
    for parameters, config in ((fields, None), ({}, str(file))):
        with pytest.raises(BadInput, match=f"enable_thinking is the text '{text}'.* write {plain}, without quotes"):
            resolve(parameters, config)
    # A run that has it goes on as it is.
    stored = validate({"run": "x"} | fields)
    assert resolve({"run": "x"}, stored=stored).data.template_arguments == {"enable_thinking": text}
    arguments = {"effort": "none", "language": "no", "thinking": False}
    assert resolve({"data": {"template_arguments": arguments}}).data.template_arguments == arguments
