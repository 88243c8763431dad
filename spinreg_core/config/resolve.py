"""From a configuration file, single parameters and an existing run to one RunConfig.

Decides: precedence (a parameter wins over the file, the file over the stored run or the defaults), and the text of
every configuration error. Leaves out: the fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pydantic
import yaml

from spinreg_core.config.groups import Group
from spinreg_core.config.run import RunConfig
from spinreg_core.config.versions import complete_stored, with_stored_additions, without_removed
from spinreg_core.errors import BadInput, Damaged, problem_text, redacted
from spinreg_core.input_limits import require_plain

_HOW_FAR = {"rounds", "until_round"}
LARGEST_FILE = 2**20  # bytes; a run configuration has a few kilobytes
# Aliases let a few lines of YAML stand for billions of values.
_MOST_VALUES, _DEEPEST = 100_000, 50
_SHOWN = 200  # characters of a wrong value that a message quotes
# pydantic's phrases, and those that can follow "expected".
_PHRASES = {
    "Value error, ": "",
    "Input should be ": "",
    "String should match pattern ": "text that matches ",
    "String should have ": "text of ",
    "List should have ": "a list of ",
    "greater than or equal to ": "at least ",
    "greater than ": "more than ",
    "less than or equal to ": "at most ",
    "a valid number, unable to parse string as a number": "a number",
    "a valid integer, unable to parse string as an integer": "an integer",
    "a valid ": "a ",
    "Keys should be strings": "a name that is text",
    " after validation, not 0": "",
}


class _Loader(yaml.SafeLoader):
    """YAML in which a mapping names each key once, and numbers are decimal.

    PyYAML would silently take the last value of a key, 010 for 8, 1:20 for 80 and 0042 for 34.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        named = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        _require_once(named)
        return super().construct_mapping(node, deep)

    def decimal(self, node: yaml.ScalarNode) -> int | float:
        value: int | float = (
            self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)
        )
        text = node.value.lstrip("+-")
        if ":" in text or re.match("0[0-9_]", text):
            problem = (
                f'YAML reads {node.value} as the number {value}; write that number, or "{node.value}" for the text'
            )
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.decimal)


def _require_once(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")


def _json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    _require_once([name for name, _ in pairs])
    return dict(pairs)


def load_config_file(location: str) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file at a path or URI (s3://, file://). Raises BadInput."""
    import fsspec

    if redacted(location) != location:
        raise BadInput("config", f"has credentials in its address {redacted(location)}", "put them in the environment")
    where, remedy = f"config {location!r}", "give a YAML or JSON file"
    if ("://" in location and not re.match("(s3|file)://", location)) or "::" in location:
        raise BadInput(where, "is neither a path nor an address of the form file:// or s3://", remedy)
    if not location.startswith("s3://"):
        require_plain("config", Path(location.removeprefix("file://")))
    try:
        with fsspec.open(location, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except Exception as error:  # every kind of location has its own errors; botocore's are not OSErrors
        looked = "" if "://" in location else f" (looked in {Path.cwd()})"
        raise BadInput(where, f"cannot be read{looked}: {error}", remedy) from None
    if len(raw) > LARGEST_FILE:
        raise BadInput(where, f"has more than {LARGEST_FILE} bytes", "give a run configuration")
    try:
        text = raw.decode("utf-8-sig")
        if location.endswith(".json"):
            content = json.loads(text, object_pairs_hook=_json_object)
        else:
            content = yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        # Only the problem and its place: str() of a YAML error quotes the file, which may be any file of the machine.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else problem
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise BadInput(where, f"does not parse: {problem}{place}", "write valid YAML or JSON") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = "text" if isinstance(content, str) else f"a {type(content).__name__}"
        raise BadInput(where, f"holds {kind}", "write a mapping of field names to values")
    return content


def assignments(items: Iterable[str]) -> dict[str, Any]:
    """Return `GROUP.FIELD=VALUE` of command lines as nested mappings; VALUE is JSON, or else text. Raises BadInput."""
    values: dict[str, Any] = {}
    for item in items:
        where = f"--param {item!r}"
        path, equals, text = item.partition("=")
        if not equals or not all(path.split(".")):
            raise BadInput(where, "has an empty name" if equals else "has no '='", "write GROUP.FIELD=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *groups, field = path.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                found = f"names a field of {group}, which has the value {place!r} already"
                raise BadInput(where, found, "give either a group or its fields")
        place[field] = value
    return values


def merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """Return `over` on top of `base`: mappings are merged key by key, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def override(values: Mapping[str, object], parameters: Mapping[str, object]) -> dict[str, object]:
    """Return parameters on top of values, as `merge`; `rounds` or `until_round` as a parameter replaces both."""
    if _HOW_FAR & parameters.keys():
        values = {key: value for key, value in values.items() if key not in _HOW_FAR}
    return merge(values, parameters)


def validate(values: Mapping[str, object]) -> RunConfig:
    """Return a RunConfig. Raises one BadInput that lists every wrong field."""
    _require_bounded(values)
    values = without_removed(values)
    for field, url in _addresses(values):
        if redacted(url) != url:
            found = f"has credentials or a query in its address {redacted(url)}"
            raise BadInput(field, found, "put credentials in the environment")
        if url.startswith(("http://", "https://")) and field != "judge.base_url":
            found, remedy = f"is an address on the web ({url!r})", "give a path, s3://... or a hub id"
            raise BadInput(field, found, f"{remedy}; fetch files on the web first")
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        lines = "\n".join(f"  - {line}" for line in _explain(error))
        raise BadInput.from_message(f"the run configuration is not valid:\n{lines}") from None


def _addresses(values: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    """Every field that may hold an address, and its text."""
    found = {name: values.get(name) for name in ("store", "model", "dataset")}
    if isinstance(data := values.get("data"), dict):
        found["data.heldout_dataset"] = data.get("heldout_dataset")
        for field in ("mixed_datasets", "evaluation_sets"):
            if isinstance(names := data.get(field), dict | list):
                found |= {f"data.{field}[{i}]": name for i, name in enumerate(names)}
    if isinstance(judge := values.get("judge"), dict):
        found["judge.base_url"] = judge.get("base_url")
    return [(field, url) for field, url in found.items() if isinstance(url, str)]


def stored_config(values: Mapping[str, object], where: str) -> RunConfig:
    """Return the configuration in a run's run.json, completed where an earlier version wrote it. Raises Damaged."""
    try:
        return validate(complete_stored(values))
    except BadInput as error:
        raise Damaged(
            f"{where}: found no valid configuration (edited, or of a newer spinreg); expected one as spinreg wrote it. "
            f"{error}"
        ) from None


def _require_bounded(values: object) -> None:
    """Raise BadInput for values that would take forever to check or to write."""
    todo = [(values, 0)]
    count = 0
    while todo:
        value, depth = todo.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            found = (
                f"has more than {_MOST_VALUES} values" if count > _MOST_VALUES else f"has values nested {depth} deep"
            )
            raise BadInput(
                "configuration", found, f"give at most {_MOST_VALUES} values, nested at most {_DEEPEST} deep"
            )
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        todo += [(one, depth + 1) for one in inner]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _explain(error: pydantic.ValidationError) -> list[str]:
    """Return one line per wrong field. pydantic reports a field of several types once per type; those are joined.

    The value of an unknown field or in place of a group may be a secret (`judge.api_key`, `model.token`), and so may
    the value of `judge.key_variable`. Messages are logged and stored, so they leave these values out.
    """
    groups = {name: field.default for name, field in RunConfig.model_fields.items() if isinstance(field.default, Group)}
    found: dict[str, str] = {}
    expected: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        location = item["loc"]
        top = str(location[0]) if location else ""
        place = ".".join(map(str, location[: 2 if top in groups else 1])) or "configuration"
        problem, text = _shown(item["input"]), item["msg"]
        for phrase, words in _PHRASES.items():
            text = text.replace(phrase, words)
        if item["type"] == "extra_forbidden":
            problem, text = "is not a field", "check its name"
        elif item["type"] == "value_error" and isinstance(item["input"], dict):
            problem = ""  # a check across fields names them itself
        elif len(location) == 1 and top in groups:
            field, value = next(iter(groups[top].model_dump(mode="json").items()))
            problem, text = (
                "is not a mapping (its value is not shown)",
                f"give its fields, such as {{{field}: {json.dumps(value)}}}",
            )
        elif location[-1:] == ("key_variable",):
            problem = "a value that is not shown"
        elif item["type"] == "string_type" and isinstance(item["input"], bool):
            text = "a string; YAML reads on, off, yes and no as truth values, so write the text in quotes"
        elif item["type"] == "string_type" and isinstance(item["input"], int | float | date):
            quoted = json.dumps(str(item["input"]))
            text = f"a string; write {quoted} with the quotes (on a command line: -p '{place}={quoted}')"
        found.setdefault(place, problem)
        expected.setdefault(place, []).append(text)
    return [
        problem_text(place, found[place], ", or ".join(texts)) if found[place] else f"{place}: {', or '.join(texts)}"
        for place, texts in expected.items()
    ]


def resolve(
    parameters: Mapping[str, object], config_file: str | None = None, stored: RunConfig | None = None
) -> RunConfig:
    """Return one configuration from parameters, a file, and an existing run.

    parameters: only the values that were given (no None), nested groups as mappings of only the fields given.
    stored: the configuration of the existing run. It gives the values that neither parameters nor a file give, so that
        `-p run=NAME -p rounds=1` advances NAME as it is. A file and the defaults together are a whole configuration,
        so that with a file the stored run gives only fields that did not exist when it was started, and starting the
        run refuses a difference later.
    """
    _require_values(parameters)
    values: dict[str, object] = {}
    if config_file is not None:
        values = load_config_file(config_file)
        _require_values(values)
    elif stored is not None:
        # Its store stays out: the run may have moved since, and its place is where it was found.
        values = stored.model_dump(mode="json", exclude=_HOW_FAR | {"store"})
    values = override(values, parameters)
    if config_file is not None and stored is not None:
        values = with_stored_additions(values, stored.model_dump(mode="json"))
    return validate(values)


def _require_values(given: Mapping[str, object]) -> None:
    """Raise BadInput for an argument of the chat template that is the text of a truth value.

    In a template the text 'False' is true. A stored configuration is left alone.
    """
    data = given.get("data")
    arguments = data.get("template_arguments") if isinstance(data, Mapping) else None
    for name, value in arguments.items() if isinstance(arguments, Mapping) else ():
        plain = {"true": "true", "false": "false", "none": "null", "null": "null"}.get(str(value).lower())
        # "none" in lower case is a word that templates use (reasoning_effort).
        if isinstance(value, str) and plain is not None and value != "none":
            found = f"is the text {value!r}, which is true in a template"
            raise BadInput(f"data.template_arguments.{name}", found, f"write {plain}, without quotes")


def show(config: RunConfig) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> list[str]:
    """Return `field: old -> new` for every leaf that differs, in field order."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
