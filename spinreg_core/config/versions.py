"""Fields that configurations of other versions of spinreg lack or still have.

Every field added after 0.1.0 gets an entry in ADDED, every field removed one in REMOVED, both by its path ("seed",
"opponent.scores"). Existing runs then keep their behaviour, whatever today's defaults are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from spinreg_core.errors import BadInput


class RemovedField(NamedTuple):
    """A field that is gone: its last default, and an instruction that names the replacement."""

    default: object
    replacement: str


# The value that equals the behaviour before the field existed. A default may differ from it, and may change later.
ADDED: dict[str, object] = {
    "judge.parsing": "fastchat", "objective.guard": 1.0, "objective.reference": "previous", "opponent.max_pairs": None,
}  # fmt: skip
REMOVED: dict[str, RemovedField] = {
    "opponent.scores": RemovedField(
        "scorer", "remove it: spinreg scores every answer itself, since reusing the engine's scores saved too little"
    ),
}


def complete_stored(values: Mapping[str, object]) -> dict[str, object]:
    """Return a stored configuration with the fields of this version: removed ones dropped, added ones filled in.

    spinreg stores every field of a configuration, so a missing one did not exist in the version that stored it.
    """
    result = _copy(values)
    for path in REMOVED:
        _pop(result, path)
    for path, value in ADDED.items():
        group, dot, field = path.rpartition(".")
        place = result.setdefault(group, {}) if dot else result
        if isinstance(place, dict):  # anything else is damage, which validation reports
            place.setdefault(field, value)
    return result


def with_stored_additions(values: Mapping[str, object], stored: Mapping[str, object]) -> dict[str, object]:
    """Return the values of a file, with an existing run's own values for the added fields that they do not name."""
    result = _copy(values)
    for path in ADDED:
        group, dot, field = path.rpartition(".")
        place, source = (result.setdefault(group, {}), stored[group]) if dot else (result, stored)
        if isinstance(place, dict) and isinstance(source, Mapping):
            place.setdefault(field, source[field])
    return result


def without_removed(values: Mapping[str, object], group: str = "") -> dict[str, object]:
    """Return the values that a user gave, without removed fields that say nothing: null or their last default.

    group: the group that `values` are the fields of; empty for a whole configuration.

    Raises:
        BadInput: a removed field has another value. The text names the replacement.
    """
    result = _copy(values)
    prefix = f"{group}." if group else ""
    for path, gone in REMOVED.items():
        if path.startswith(prefix):
            value = _pop(result, path.removeprefix(prefix))
            if value is not None and value != gone.default:
                raise BadInput(path, "is no longer a field", gone.replacement)
    return result


def _copy(values: Mapping[str, object]) -> dict[str, object]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}


def _pop(values: dict[str, object], path: str) -> object:
    """Take a field out of nested values, and return its value: None where it is absent."""
    group, dot, field = path.rpartition(".")
    place = values.get(group) if dot else values
    return place.pop(field, None) if isinstance(place, dict) else None
