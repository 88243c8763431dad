"""The head of a run: who may advance it, how far it was told to go, and which objects its rounds are made of.

Decides: that one process at a time advances a run, that an advance is recorded before it starts, and that a
committed stage is never replaced. Leaves out: what stages do (`stages/`), and which job they get (`plans.py`).

Every change is one compare-and-swap of runs/<run>/head.json, which also holds the lease. A writer that was
frozen while its lease was taken finds another epoch there and cannot commit, however late it wakes.
Expiry is an unchanged tag over the watcher's own monotonic clock; clocks are never compared.
"""

from __future__ import annotations

from typing import Any

from spinreg_core.config import RunConfig, fixed_fields
from spinreg_core.config.resolve import differences, stored_config
from spinreg_core.errors import BadInput, ConfigChanged, Damaged
from spinreg_core.store import documents
from spinreg_core.store.base import Store

ROUND_STAGES = ("generate", "mix-opponent", "train", "evaluate")


def head_key(run: str) -> str:
    return f"runs/{run}/head.json"


def config_key(run: str) -> str:
    return f"runs/{run}/run.json"


def read_head(store: Store, run: str) -> dict[str, Any] | None:
    """The head of a run, or None where there is no such run."""
    return documents.read(store, head_key(run))


def require_head(store: Store, run: str) -> dict[str, Any]:
    """The head of a run. Raises BadInput where there is no such run, naming those that there are."""
    head = read_head(store, run)
    if head is None:
        raise BadInput("run", repr(run), f"one of the runs of {store.url}: {', '.join(list_runs(store)) or '(none)'}")
    return head


def read_config(store: Store, run: str) -> RunConfig | None:
    """The configuration a run was started with, or None where there is no such run. Raises Damaged where it is gone."""
    document = documents.read(store, config_key(run))
    if document is not None:
        return stored_config(document["config"], store.uri(config_key(run)))
    head = read_head(store, run)
    return require_config(store, run) if head is not None and has_begun(head) else None


def require_config(store: Store, run: str) -> RunConfig:
    """The configuration of a run that there is. Raises Damaged where it is gone."""
    return read_config_with_tag(store, run)[0]


def list_runs(store: Store) -> list[str]:
    """Names of the runs in a store."""
    return sorted({key.split("/")[1] for key in store.list("runs/") if key.endswith("/head.json")})


def stage_object(head: dict[str, Any], round_number: int, stage: str) -> str | None:
    """The object a round's stage was committed with, or None."""
    for entry in head["rounds"]:
        if entry["round"] == round_number:
            return entry["stages"].get(stage)
    return None


def enter_stage(head: dict[str, Any], round_number: int, stage: str, object_id: str) -> None:
    """Say in a head which object a round's stage is."""
    for entry in head["rounds"]:
        if entry["round"] == round_number:
            entry["stages"][stage] = object_id
            return
    head["rounds"].append({"round": round_number, "stages": {stage: object_id}})


def complete_round(head: dict[str, Any]) -> int:
    """The last round all of whose stages are committed (0: the base is evaluated, or nothing is yet)."""
    done = 0
    while all(stage_object(head, done + 1, stage) for stage in ROUND_STAGES):
        done += 1
    return done


def pending_advance(head: dict[str, Any]) -> dict[str, Any] | None:
    """The recorded advance that has not been finished, or None."""
    return next((advance for advance in reversed(head["advances"]) if not advance["done"]), None)


def check_config(stored: RunConfig, given: RunConfig) -> None:
    """Raise ConfigChanged unless both differ only in the fields that may change."""
    found = differences(fixed_fields(stored), fixed_fields(given))
    if found:
        raise ConfigChanged(given.run, found)


def has_begun(head: dict[str, Any]) -> bool:
    return head.get("base") is not None or bool(head["rounds"])


def read_config_with_tag(store: Store, run: str) -> tuple[RunConfig, str]:
    """The stored configuration of an existing run, and its tag."""
    found = store.read_tagged(config_key(run))
    if found is None:
        raise Damaged(f"{store.uri(config_key(run))}: found nothing; expected the configuration of run {run!r}")
    document = documents.parse(store, config_key(run), found[0])
    return stored_config(document["config"], store.uri(config_key(run))), found[1]
