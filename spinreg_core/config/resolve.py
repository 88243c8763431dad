"""From a configuration file, single parameters and an existing run to one RunConfig.

Decides: precedence (a parameter wins over the file, the file over the stored run or the defaults), and the
text of every configuration error. Leaves out: the fields themselves (`run.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
import yaml

from spinreg_core.config.groups import Group
from spinreg_core.config.run import RunConfig
from spinreg_core.config.versions import complete_stored, without_removed
from spinreg_core.errors import BadInput, Damaged, redacted
from spinreg_core.input_limits import require_plain

LARGEST_FILE = 2**20  # bytes; a run configuration has a few kilobytes
_MOST_VALUES, _DEEPEST = 100_000, 50  # of a configuration: YAML's aliases make billions out of a few lines
_SHOWN = 200  # characters of a wrong value that a message quotes


class _Loader(yaml.SafeLoader):
    """YAML whose mappings name each key once: the first of two would be overruled without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        named = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        _require_once(named)
        return super().construct_mapping(node, deep)


def _require_once(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require_once([name for name, _ in pairs])
    return dict(pairs)


def load_config_file(location: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file at a path or URI (s3://, file://). Raises BadInput."""
    import fsspec

    if redacted(location) != location:
        raise BadInput("config", redacted(location), "an address without credentials; they come from the environment")
    if ("://" in location and not re.match("(s3|file)://", location)) or "::" in location:
        raise BadInput(
            f"config {location!r}", "no readable file: neither a path nor file:// or s3://", "a YAML or JSON file"
        )
    if not location.startswith("s3://"):
        require_plain("config", Path(location.removeprefix("file://")))
    try:
        with fsspec.open(location, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except Exception as error:  # every kind of location has errors of its own; botocore's are no OSError
        looked = "" if "://" in location else f" (looked in {Path.cwd()})"
        raise BadInput(f"config {location!r}", f"no readable file{looked}: {error}", "a YAML or JSON file") from None
    if len(raw) > LARGEST_FILE:
        raise BadInput(f"config {location!r}", f"more than {LARGEST_FILE} bytes", "a run configuration")
    try:
        text = raw.decode("utf-8")
        if location.endswith(".json"):
            content = json.loads(text, object_pairs_hook=_json_object)
        else:
            content = yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        what = "brackets within brackets without end" if isinstance(error, RecursionError) else what
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise BadInput(f"config {location!r}", f"text that does not parse: {what}{place}", "YAML or JSON") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        what = "text" if isinstance(content, str) else f"a {type(content).__name__}"
        raise BadInput(f"config {location!r}", what, "a mapping of field names to values")
    return content


def assignments(items: Iterable[str]) -> dict[str, Any]:
    """`GROUP.FIELD=VALUE` of command lines as nested mappings; VALUE is JSON, or else text. Raises BadInput."""
    values: dict[str, Any] = {}
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not all(path.split(".")):
            raise BadInput(
                f"--param {item!r}", "a name with an empty part" if equals else "no '='", "GROUP.FIELD=VALUE"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *groups, field = path.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise BadInput(f"--param {item!r}", f"{group} = {place!r} given before", "either a group or its fields")
        place[field] = value
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings are merged key by key, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def validate(values: dict[str, Any]) -> RunConfig:
    """A RunConfig, or one BadInput that lists every wrong field with what was found and expected."""
    _require_bounded(values)
    values = without_removed(values)
    data = values.get("data")
    addresses = {name: values.get(name) for name in ("store", "model", "dataset")}
    if isinstance(data, dict):
        addresses["data.heldout_dataset"] = data.get("heldout_dataset")
        for field in ("mixed_datasets", "evaluation_sets"):
            names = data.get(field)
            if isinstance(names, dict | list):
                addresses |= {f"data.{field}[{i}]": name for i, name in enumerate(names)}
    if isinstance(judge := values.get("judge"), dict):
        addresses["judge.base_url"] = judge.get("base_url")
    for field, url in addresses.items():
        if isinstance(url, str) and redacted(url) != url:
            raise BadInput(
                field, redacted(url), "an address without credentials or query; credentials come from the environment"
            )
        if isinstance(url, str) and url.startswith(("http://", "https://")) and field != "judge.base_url":
            raise BadInput(
                field, repr(url), "a path, s3://... or a hub id; what lies on the web is to be fetched first"
            )
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        lines = "\n".join(f"  - {line}" for line in _explain(error))
        raise BadInput.from_message(f"the run configuration is not valid:\n{lines}") from None


def stored_config(values: dict[str, Any], where: str) -> RunConfig:
    """The configuration in a run's run.json, completed where an earlier version wrote it. Raises Damaged."""
    try:
        return validate(complete_stored(values))
    except BadInput as error:
        raise Damaged(
            f"{where}: found what is no configuration (edited, or of a newer spinreg?); expected one as spinreg wrote "
            f"it. {error}"
        ) from None


def _require_bounded(values: dict[str, Any]) -> None:
    """Raise BadInput for what would take for ever to check, or to write down."""
    todo: list[tuple[Any, int]] = [(values, 0)]
    count = 0
    while todo:
        value, depth = todo.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            found = f"more than {_MOST_VALUES} values" if count > _MOST_VALUES else f"values nested {depth} deep"
            raise BadInput("configuration", found, f"at most {_MOST_VALUES} values, nested at most {_DEEPEST} deep")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        todo += [(one, depth + 1) for one in inner]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _explain(error: pydantic.ValidationError) -> list[str]:
    """One line per wrong field. pydantic reports a field of several types once per type; those are joined.

    What stands where there is no such field, or in place of a group, may be a secret (`judge.api_key`, `model.token`),
    and so may what is no variable's name.
    """
    groups = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, Group)}
    found: dict[str, str] = {}
    expected: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        depth = 2 if item["loc"][:1] and item["loc"][0] in groups else 1
        place = ".".join(str(part) for part in item["loc"][:depth]) or "configuration"
        # A check across fields names them itself; its input is the whole group.
        whole_group = item["type"] == "value_error" and isinstance(item["input"], dict)
        shown = "a mapping" if isinstance(item["input"], dict) else _shown(item["input"])
        text = item["msg"]
        if item["type"] == "extra_forbidden":
            shown, text = "a field of this name", "one that exists"
        elif item["loc"][-1:] == ("key_variable",) or (len(item["loc"]) == 1 and item["loc"][0] in groups):
            shown = "what is not shown"
        found.setdefault(place, "" if whole_group else f"found {shown}; expected ")
        expected.setdefault(place, []).append(text.removeprefix("Value error, ").removeprefix("Input should be "))
    return [f"{place}: {found[place]}{'; or '.join(texts)}" for place, texts in expected.items()]


def resolve(parameters: dict[str, Any], config_file: str | None = None, stored: RunConfig | None = None) -> RunConfig:
    """One configuration out of everything that was said.

    parameters: only what was given (no None), nested groups as mappings of only the fields given.
    stored: the configuration of the existing run; what neither parameters nor a file say comes from it, so
        that `-p run=NAME -p rounds=1` goes on with NAME as it is. With a file, the file and the defaults are
        the whole of what is wanted, and a difference from the stored run is an error later.
    """
    how_far = {"rounds", "until_round"}
    values: dict[str, Any] = {}
    if config_file is not None:
        values = load_config_file(config_file)
    elif stored is not None:
        # Not its store: the run may have moved, and the one it was found in is the one that is meant.
        values = stored.model_dump(mode="json", exclude=how_far | {"store"})
    if how_far & parameters.keys():  # one of the two at the prompt replaces either of them in the file
        values = {key: value for key, value in values.items() if key not in how_far}
    return validate(merge(values, parameters))


def show(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: old -> new` for every leaf that differs, in field order."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
