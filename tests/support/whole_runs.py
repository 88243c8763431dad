"""Starting whole runs as a user does, and reading what they left in the store."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spinreg_core.runs.fetch import fetch_file
from spinreg_core.runs.head import read_head
from spinreg_core.runs.objects import read_manifest
from spinreg_core.store.base import Store
from tests.support.servers import PrefectServer

ROOT = Path(__file__).resolve().parents[2]
SMOKE = "deployments/configs/smoke.yaml"

# What people have in their environment, and nobody may find again in what a run writes.
PLANTED = {
    "PREFECT_API_AUTH_STRING": "somebody:planted-prefect-7Xq",
    "HF_TOKEN": "hf_planted7Xq0123456789abcdefghijkl",
    "WANDB_API_KEY": "planted-wandb-7Xq",
    "PIP_INDEX_URL": "https://somebody:planted-address-7Xq@127.0.0.1:1/simple",
}


def environment(tmp: Path, server: PrefectServer | None = None, **extra: str) -> dict[str, str]:
    """The caller's environment with a cache of its own, and a running Prefect server or a home of its own."""
    if server is not None:
        return server.env | {"SPINREG_CACHE": str(tmp / "cache")} | extra
    return os.environ | {
        "SPINREG_CACHE": str(tmp / "cache"),
        "PREFECT_HOME": str(tmp / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    } | extra  # fmt: skip


def start(arguments: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m flows.spin ...` in a session of its own, output to a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.spin", *arguments],
            cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def run(arguments: list[str], env: dict[str, str], log: Path, timeout: float = 420) -> str:
    """Run to the end; returns the output. AssertionError with the output if it fails."""
    process = start(arguments, env, log)
    try:
        status = process.wait(timeout=timeout)
    finally:
        if process.poll() is None:
            process.kill()
    text = log.read_text(errors="replace")
    assert status == 0, f"exit status {status}:\n{text[-6000:]}"
    return text


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path, timeout: float = 240
) -> None:
    """Wait for something a run does; AssertionError if the run ends before."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the run ended ({process.returncode}) early:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"nothing after {timeout} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.02)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the flow's process alone, as the out-of-memory killer would."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def stage_processes() -> list[tuple[int, str]]:
    """(pid, command line and environment) of every living stage process of this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                command += (entry / "environ").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if "spinreg_core.stages." in command and state != "Z":
                found.append((int(entry.name), command))
    return found


def secrets_found(folders: list[Path], store: Store, env: dict[str, str]) -> list[str]:
    """`place: secret` for everything that a run wrote and that holds a secret of its environment: files below the
    folders, the store's objects; as it is, in base64 (as in a header), and inside of Parquet."""
    secrets = [*PLANTED.values(), "planted-address-7Xq", env["AWS_SECRET_ACCESS_KEY"]]
    needles = {s: (s.encode(), base64.b64encode(s.encode()).rstrip(b"=")) for s in secrets}
    found = []

    def look(place: str, data: bytes) -> None:
        if data[:4] == b"PAR1":
            data += str(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
        found.extend(f"{place}: {secret}" for secret, forms in needles.items() if any(form in data for form in forms))

    for path in (path for folder in folders for path in folder.rglob("*")):
        with contextlib.suppress(OSError):  # a socket, or gone meanwhile
            if path.is_file():
                look(str(path), path.read_bytes())
    for key in [*store.list("runs/"), *store.list("objects/"), *store.list("probes/")]:
        look(key, store.read(key) or b"")
    return found


def outcome(store: Store, run_name: str) -> dict[str, Any]:
    """Return the results that no interruption may change: weights, rows and metrics of every round, without times."""
    head = read_head(store, run_name)
    assert head is not None
    result: dict[str, Any] = {}
    for entry in head.rounds:
        number = entry.round
        metrics = fetch_file(store, entry.stages["evaluate"], "metrics.json")
        result[f"metrics-{number}"] = json.loads(metrics.read_text())
        if number:
            manifest = read_manifest(store, entry.stages["train"])
            assert manifest is not None
            result[f"weights-{number}"] = sorted(
                (f.name, f.sha256) for f in manifest.files if f.name.startswith("policy/")
            )
            pairs = pq.read_table(fetch_file(store, entry.stages["mix-opponent"], "pairs.parquet")).to_pylist()
            result[f"pairs-{number}"] = pairs
    return result


def generations(store: Store, run_name: str, round_number: int) -> list[dict[str, Any]]:
    """All generated rows of a round."""
    head = read_head(store, run_name)
    assert head is not None
    object_id = head.stage(round_number, "generate")
    assert object_id is not None
    manifest = read_manifest(store, object_id)
    assert manifest is not None
    names = [f.name for f in manifest.files if f.name.endswith(".parquet")]
    return [row for name in names for row in pq.read_table(fetch_file(store, object_id, name)).to_pylist()]
