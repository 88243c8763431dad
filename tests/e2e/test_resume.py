"""A run killed in every stage ends like an undisturbed one: the same weights, rows and metrics."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spinreg_core.store.open import open_store
from tests.support.servers import PrefectServer, S3Server
from tests.support.whole_runs import (
    PLANTED,
    SMOKE,
    environment,
    generations,
    kill,
    outcome,
    run,
    secrets_found,
    stage_processes,
    start,
    wait_until,
)

pytestmark = pytest.mark.slow

ONE_ROUND = [
    "--config",
    SMOKE,
    "--until-round",
    "1",
    "-p",
    "generation.shard_size=3",
    "-p",
    "data.prompts_per_round=12",
]


class Undisturbed(NamedTuple):
    url: str
    outcome: dict[str, Any]
    text: str
    env: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def undisturbed(
    prefect_server: PrefectServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """Return a run on S3 with secrets in its environment; runs in folders are compared with it."""
    tmp, url = tmp_path_factory.mktemp("calm"), s3_server.url(uuid.uuid4().hex)
    env = environment(tmp, prefect_server, **s3_server.env | PLANTED)
    text = run([*ONE_ROUND, "--store", url], env, tmp / "log")
    return Undisturbed(url, outcome(open_store(url), "smoke"), text, env, tmp)


@pytest.mark.long
def test_run_on_s3_is_complete_and_leaves_no_secret(prefect_server: PrefectServer, undisturbed: Undisturbed) -> None:
    store = open_store(undisturbed.url)
    assert f"{undisturbed.url}/runs/smoke/report.html" in undisturbed.text
    assert len(store.list("objects/")) > 20
    assert secrets_found([undisturbed.folder, prefect_server.home], store, undisturbed.env) == []


EVERY = ("prepare", "round-0-evaluate", "round-1-generate", "round-1-mix-opponent", "round-1-train", "round-1-evaluate")


@pytest.mark.long  # kills at random instants are in the short form of tests/chaos
def test_run_killed_in_every_stage_equals_the_undisturbed_one(
    prefect_server: PrefectServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    env = environment(tmp_path, prefect_server)
    store, log = open_store(str(tmp_path / "killed")), tmp_path / "killed.log"
    arguments = [*ONE_ROUND, "--store", store.url]
    kept: dict[str, bytes | None] = {}
    for stage in EVERY:
        process = start(arguments, env, log)

        def begun(stage: str = stage) -> bool:
            if stage == "round-1-generate":  # halfway: some shards committed, others not
                parts = [k for k in store.list("objects/") if "/parts/shard-" in k]
                done = {k.split("/")[1] for k in store.list("objects/") if k.endswith("manifest.json")}
                return any(
                    k.split("/")[1] not in done and not k.startswith("objects/evaluate") for k in parts
                ) and bool(list(tmp_path.glob(f"cache/work/*/{stage}/*/log.txt")))
            logs = list(tmp_path.glob(f"cache/work/*/{stage}/*/log.txt"))
            return bool(logs)

        wait_until(begun, process, log)
        kill(process)
        gone = time.monotonic() + 60
        while any(str(tmp_path) in command for _, command in stage_processes()):
            assert time.monotonic() < gone, f"the stage process outlived its killed flow: {stage_processes()}"
            time.sleep(0.1)
        for key, content in kept.items():  # commits do not change
            assert store.read(key) == content, key
        kept = {key: store.read(key) for key in store.list("objects/") if key.endswith(".json")}
    # The last start has an empty Prefect home and its own embedded server, because only the store may matter.
    text = run(arguments, environment(tmp_path), tmp_path / "last.log")
    assert outcome(store, "smoke") == undisturbed.outcome
    for key, content in kept.items():
        assert store.read(key) == content, key
    assert len(generations(store, "smoke", 1)) == 12
    assert "Reused" in text


@pytest.mark.long
def test_run_with_changed_configuration_is_refused_with_differences(tmp_path: Path) -> None:
    from spinreg_core.config import RunConfig
    from spinreg_core.config.resolve import load_config_file, validate
    from spinreg_core.runs.lease import hold_lease
    from tests.support.whole_runs import ROOT

    store = open_store(str(tmp_path / "store"))
    config: RunConfig = validate(load_config_file(str(ROOT / SMOKE)))
    with hold_lease(store, config, "test") as session:
        session.commit_inputs("base-x", "data-x")
    log = tmp_path / "log"
    process = start(["--config", SMOKE, "--store", store.url, "-p", "objective.beta=0.7"], environment(tmp_path), log)
    assert process.wait(timeout=120) != 0
    text = log.read_text()
    assert "objective.beta" in text
    assert "0.7" in text
    assert store.list("objects/") == []
