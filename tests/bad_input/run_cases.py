"""Runs that were edited or damaged, and requests that a run cannot fulfil."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from prefect.settings import PREFECT_API_URL, temporary_settings

from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import merge, validate
from spinreg_core.errors import BadInput, ConfigChanged, Damaged, LeaseHeld, LeaseLost, Removed
from spinreg_core.maintenance.gc import find_removable, remove_items
from spinreg_core.maintenance.retention import Needs
from spinreg_core.maintenance.verify import verify
from spinreg_core.reports.run_report import write_report
from spinreg_core.reports.status import run_status
from spinreg_core.runs.fetch import fetch_file, fetch_folder
from spinreg_core.runs.head import read_config, require_head
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.objects import read_part, require_manifest
from spinreg_core.store.folder import FolderStore
from tasks.server import require_server
from tests.bad_input.cases import ROWS, Case, Place, table

CASES: list[Case] = []
case = table(CASES, "start")


@dataclass
class Begun:
    """A run with its base and rows in the store."""

    store: FolderStore
    config: RunConfig
    base: str
    data: str

    def path(self, key: str) -> Path:
        return self.store.root / key

    def edit(self, key: str, change: Callable[[Any], object]) -> None:
        """Edit a document by hand."""
        document = json.loads(self.path(key).read_text())
        change(document)
        self.path(key).write_text(json.dumps(document))

    def file(self, name: str) -> Path:
        """Return the path of a file of the base in the store."""
        manifest = json.loads(self.path(f"objects/{self.base}/manifest.json").read_text())
        return self.path(next(entry["key"] for entry in manifest["files"] if entry["name"] == name))

    def go_on(self, **fields: Any) -> None:
        with hold_lease(self.store, validate(merge(self.config.model_dump(mode="json"), fields)), "test") as session:
            session.begin_advance("test", 1, None)


HEAD, RUN = "runs/demo/head.json", "runs/demo/run.json"


def begun(place: Place) -> Begun:
    made: Any = place.prepare()
    store = FolderStore(place.folder / "store")
    config = validate({"store": str(store.root), "dataset": place.rows(ROWS), "model": "random:tiny",
                       "data": {"heldout_rows": 2}, "resources": {"lease_seconds": 2}})  # fmt: skip
    with hold_lease(store, config, "test") as session:
        session.begin_advance("test", 1, None)
        session.commit_inputs(made["base"], made["data"])
    return Begun(store, config, made["base"], made["data"])


@case("another configuration for a run that has begun", ConfigChanged)
def _(place: Place) -> object:
    return begun(place).go_on(objective={"alpha": 0.9}, training={"epochs": 3})


@case("another model, or other rows, under the same names")
def _(place: Place) -> object:
    run = begun(place)
    with hold_lease(run.store, run.config, "test") as session:
        return session.commit_inputs(run.base, run.data[:-1] + "0")


@case("a run that another process advances", LeaseHeld)
def _(place: Place) -> object:
    run = begun(place)
    with hold_lease(run.store, run.config, "flow run red-fox (0123)"):
        return run.go_on()


@case("a run that was taken over", LeaseLost, "use")
def _(place: Place) -> object:
    run = begun(place)
    with hold_lease(run.store, run.config, "the first") as session:
        holder = {"label": "flow run red-fox (0123)", "host": "elsewhere", "pid": 1}
        run.edit(HEAD, lambda head: head["lease"].update(epoch=9, holder=holder))
        return session.commit(1, "generate", "generate-1")


@case("a run that does not exist")
def _(place: Place) -> object:
    return run_status(begun(place).store, "dmeo")


@case("a report of a run that does not exist")
def _(place: Place) -> object:
    return write_report(begun(place).store, "dmeo")


# Edits of the two documents of a run.
EDITS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "the head was written by a newer spinreg": (HEAD, lambda d: d.update(schema=2)),
    "the configuration was written by a newer spinreg": (RUN, lambda d: d.update(schema=2)),
    "the configuration has a field of a newer spinreg": (RUN, lambda d: d["config"].update(curriculum="easy")),
    "the configuration was edited into nonsense": (RUN, lambda d: d["config"]["objective"].update(alpha="much")),
    "the configuration is not a mapping": (RUN, lambda d: d.update(config=[])),
    "the head lost its lease": (HEAD, lambda d: d.pop("lease")),
    "the head's epoch is a word": (HEAD, lambda d: d["lease"].update(epoch="nine")),
    "the head's holder is a name": (HEAD, lambda d: d["lease"].update(holder="me")),
    "the head's rounds are a mapping": (HEAD, lambda d: d.update(rounds={"1": {}})),
    "the head names an impossible round": (HEAD, lambda d: d.update(rounds=[{"round": 10**12, "stages": {}}])),
    "the head's advance does not say whether it is done": (HEAD, lambda d: d["advances"][0].pop("done")),
    "the head's base leaves the store": (HEAD, lambda d: d.update(base="../../secrets")),
}
for what, (key, change) in EDITS.items():

    def feed(place: Place, key: str = key, change: Callable[[Any], object] = change) -> object:
        run = begun(place)
        run.edit(key, change)
        return run.go_on()

    case(what, BadInput if "written by a newer" in what else Damaged)(feed)

# Edits of a manifest.
MANIFESTS: dict[str, Callable[[Any], object]] = {
    "a manifest written by a newer spinreg": lambda d: d.update(schema=2),
    "a manifest without its files": lambda d: d.pop("files"),
    "a manifest without its metrics": lambda d: d.pop("metrics"),
    "a manifest with a negative size": lambda d: d["files"][0].update(size=-1),
    "a manifest with a file outside the store": lambda d: d["files"][0].update(key="objects/a/../../../etc/passwd"),
    "a manifest with a name that leaves its folder": lambda d: d["files"][0].update(name="../../.bashrc"),
    "a manifest with a malformed checksum": lambda d: d["files"][0].update(sha256="unknown"),
    "a manifest with another size": lambda d: d["files"][0].update(size=1),
    "a manifest with another checksum": lambda d: d["files"][0].update(sha256="0" * 64),
    "a manifest that lists another folder": lambda d: [entry.update(name="x/" + entry["name"]) for entry in d["files"]],
}
for what, change in MANIFESTS.items():

    def feed(place: Place, change: Callable[[Any], object] = change) -> object:
        run = begun(place)
        run.edit(f"objects/{run.base}/manifest.json", change)
        return fetch_folder(run.store, run.base, "policy")

    case(what, BadInput if "newer" in what else Damaged, "use")(feed)


@case("a truncated head", Damaged)
def _(place: Place) -> object:
    run = begun(place)
    run.path(HEAD).write_bytes(run.path(HEAD).read_bytes()[:50])
    return run.go_on()


@case("a head that disappears while a stage works", LeaseLost, "use")
def _(place: Place) -> object:
    run = begun(place)
    with hold_lease(run.store, run.config, "test") as session:
        run.path(HEAD).unlink()
        return session.commit(1, "generate", "generate-1")


@case("a run without its configuration", Damaged, "use")
def _(place: Place) -> object:
    run = begun(place)
    run.path(RUN).unlink()
    return verify(run.store, "demo")


@case("a run without its configuration that is resumed", Damaged)
def _(place: Place) -> object:
    run = begun(place)
    run.path(RUN).unlink()
    return run.go_on()


@case("a run without its head", Damaged)
def _(place: Place) -> object:
    run = begun(place)
    run.path(HEAD).unlink()
    return run.go_on()


@case("a deleted object", Damaged, "use")
def _(place: Place) -> object:
    run = begun(place)
    run.path(f"objects/{run.base}/manifest.json").unlink()
    return require_manifest(run.store, run.base)


@case("a deleted file", Damaged, "use")
def _(place: Place) -> object:
    run = begun(place)
    run.file("policy/model.safetensors").unlink()
    return fetch_folder(run.store, run.base, "policy")


@case("a truncated file", Damaged, "use")
def _(place: Place) -> object:
    run = begun(place)
    file = run.file("policy/config.json")
    file.write_bytes(file.read_bytes()[:100])
    return fetch_folder(run.store, run.base, "policy")


@case("a file of the same size with another content", Damaged, "use")
def _(place: Place) -> object:
    run = begun(place)
    file = run.file("policy/config.json")
    file.write_bytes(file.read_bytes().replace(b"silu", b"gelu"))
    return fetch_folder(run.store, run.base, "policy")


@case("a file that the object never had", Damaged, "use")
def _(place: Place) -> object:
    run = begun(place)
    return fetch_file(run.store, run.data, "pairs.parquet")


@case("a part that is not a document", Damaged, "use")
def _(place: Place) -> object:
    run = begun(place)
    run.store.create("objects/generate-1/parts/shard-00000.json", b'{"schema": 1, "name": "shard-00000"}')
    return read_part(run.store, "generate-1", "shard-00000")


@case("weights that retention removed", Removed, "use")
def _(place: Place) -> object:
    run = begun(place)
    needs = Needs(known={run.base: ["demo"]}, freed={run.base: "keep.policies: 1"})
    remove_items(run.store, find_removable(run.store, needs, rules_only=True), lambda: needs)
    return fetch_folder(run.store, run.base, "policy")


@case("a run that is resumed in another store")
def _(place: Place) -> object:
    run = begun(place)
    other = FolderStore(place.folder / "other")
    assert read_config(other, "demo") is None
    return require_head(other, run.config.run)


@case("PREFECT_API_URL of a server that does not answer")
def _(place: Place) -> object:
    address = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"})
    with address, mock.patch("tasks.server.START_PATIENCE_SECONDS", 0.5):
        return require_server()


@case("PREFECT_API_URL of something that is not a Prefect server")
def _(place: Place) -> object:
    with temporary_settings({PREFECT_API_URL: f"{place.server().endpoint}/api"}):
        return require_server()


@case("a target beyond the last possible round")
def _(place: Place) -> object:
    return validate({"until_round": 1_000_000})
