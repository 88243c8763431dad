"""From a configuration file, single parameters and an existing run to one RunConfig.

Decides: precedence (a parameter wins over the file, the file over the stored run or the defaults), and the
text of every configuration error. Leaves out: the fields themselves (`config.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import yaml

from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput

LARGEST_FILE = 2**20  # bytes; a run configuration has a few kilobytes


def load_config_file(location: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file at a path or URI (s3://, file://). Raises BadInput."""
    import fsspec

    try:
        with fsspec.open(location, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError, ImportError) as error:
        looked = "" if "://" in location else f" (looked in {Path.cwd()})"
        raise BadInput(f"config {location!r}", f"no readable file{looked}: {error}", "a YAML or JSON file") from None
    if len(raw) > LARGEST_FILE:
        raise BadInput(f"config {location!r}", f"more than {LARGEST_FILE} bytes", "a run configuration")
    try:
        text = raw.decode("utf-8")
        content = json.loads(text) if location.endswith(".json") else yaml.safe_load(text)
    except (UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"config {location!r}", f"text that does not parse: {error}", "YAML or JSON") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadInput(f"config {location!r}", f"a {type(content).__name__}", "a mapping of field names to values")
    return content


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings are merged key by key, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def validate(values: dict[str, Any]) -> RunConfig:
    """A RunConfig, or one BadInput that lists every wrong field with what was found and expected."""
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            place = ".".join(str(part) for part in item["loc"]) or "configuration"
            found = "" if isinstance(item.get("input"), dict) else f", found {item.get('input')!r}"
            lines.append(f"  - {place}: {item['msg']}{found}")
        raise BadInput.from_message("the run configuration is not valid:\n" + "\n".join(lines)) from None


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
        values = stored.model_dump(mode="json", exclude=how_far)
    if how_far & parameters.keys():  # one of the two at the prompt replaces either of them in the file
        values = {key: value for key, value in values.items() if key not in how_far}
    return validate(merge(values, parameters))


def show(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
