"""A failing run writes no secret of the environment anywhere; test_resume.py checks a whole run."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from spinreg_core.store.open import open_store
from tests.support.servers import PrefectServer, S3Server
from tests.support.whole_runs import PLANTED, SMOKE, environment, secrets_found, start

pytestmark = pytest.mark.slow


def ended(arguments: list[str], env: dict[str, str], log: Path) -> str:
    """Return the output of a run that fails."""
    assert start(arguments, env, log).wait(timeout=300) != 0
    return log.read_text(errors="replace")


def test_failed_stage_leaves_its_job_and_log_and_no_secret(
    prefect_server: PrefectServer, s3_server: S3Server, tmp_path: Path
) -> None:
    url = s3_server.url(uuid.uuid4().hex)
    env = environment(tmp_path, prefect_server, **s3_server.env | PLANTED)
    (tmp_path / "data.jsonl").write_text('{"prompt": "only one"}\n')
    text = ended(["--config", SMOKE, "--store", url, "--dataset", str(tmp_path / "data.jsonl")], env, tmp_path / "log")
    assert "the columns named in prompt_column" in text
    left = [path.name for path in (tmp_path / "cache" / "work").rglob("*") if path.is_file()]
    assert {"job.json", "log.txt"} <= set(left)
    assert prefect_server.api("POST", "logs/filter", {})
    store = open_store(url)
    assert store.list("runs/")
    assert secrets_found([tmp_path, prefect_server.home], store, env) == []
    # The search finds planted secrets: in a file, in base64, in an object.
    (tmp_path / "control").write_text(PLANTED["HF_TOKEN"])
    store.create("runs/control", b"Basic c29tZWJvZHk6cGxhbnRlZC1wcmVmZWN0LTdYcQ==")
    assert len(secrets_found([tmp_path], store, env)) == 2
