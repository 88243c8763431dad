"""Verify names damage to a finished run and the dependent stages; repair makes exactly those again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.runs.head import read_head
from spinreg_core.runs.objects import read_manifest
from spinreg_core.store.base import Store
from spinreg_core.store.open import open_store
from tests.support.servers import PrefectServer
from tests.support.whole_runs import ROOT, SMOKE, environment, outcome, run

pytestmark = pytest.mark.slow


def spinreg(arguments: list[str], env: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
    )
    return done.returncode, done.stdout + done.stderr


def manifests(store: Store) -> dict[str, bytes | None]:
    keys = [key for key in store.list("objects/") if key.endswith("/manifest.json")]
    return {key: store.read(key) for key in keys}


def files_of(store: Store, object_id: str | None) -> list[Path]:
    assert object_id is not None
    manifest = read_manifest(store, object_id)
    assert manifest is not None
    paths = [store.local_path(entry.key) for entry in manifest.files]
    return [path for path in paths if path is not None]


@pytest.mark.long
def test_repair_of_a_damaged_run_remakes_exactly_the_damage(prefect_server: PrefectServer, tmp_path: Path) -> None:
    env = environment(tmp_path, prefect_server)
    where = ["--store", str(tmp_path / "store")]
    run(["--config", SMOKE, "--until-round", "1", "-p", "generation.shard_size=3", *where], env, tmp_path / "log")
    store = open_store(str(tmp_path / "store"))
    expected, before = outcome(store, "smoke"), manifests(store)
    status, text = spinreg(["verify", "smoke", *where], env)
    assert status == 0, text
    assert "all as committed" in text
    status, text = spinreg(["resume", "smoke", *where], env)
    assert status == 0, text
    assert "round 1 is complete and nothing is pending" in text

    head = read_head(store, "smoke")
    assert head is not None
    shards = files_of(store, head.stage(1, "generate"))
    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards[1].write_bytes(content)
    weights = next(p for p in files_of(store, head.stage(1, "train")) if p.suffix == ".safetensors")
    os.truncate(weights, 1000)
    status, text = spinreg(["verify", "smoke", "--json", *where], env)
    assert status == 74, text
    found: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert {problem["file"] for problem in found["problems"]} == {
        str(path.relative_to(tmp_path / "store")) for path in (shards[1], weights)
    }
    dependents = {number_and_stage[1] for number_and_stage in found["dependents"][head.stage(1, "generate")]}
    assert dependents == {"mix-opponent", "train", "generate-heldout", "evaluate"}
    assert manifests(store) == before, "verify changes nothing"

    status, text = spinreg(["verify", "smoke", "--repair", *where], env)
    assert status == 0, text
    assert "making again: generate of round 1, train of round 1" in text
    assert "all as committed" in text
    assert outcome(store, "smoke") == expected
    after = manifests(store)
    anew = {key.split("/")[1] for key in after if after[key] != before.get(key)}
    assert anew == {head.stage(1, "generate"), head.stage(1, "train")}, "and nothing else"
    kept = {key for key in store.list("objects/") if "/aside/" in key}
    assert len(kept) == 2, "the old manifests are kept"
    parts = [json.loads(store.read(k) or b"") for k in store.list(f"objects/{head.stage(1, 'generate')}/parts/")]
    assert len({part["writer"] for part in parts}) == 2, "sound shards were not answered again"
