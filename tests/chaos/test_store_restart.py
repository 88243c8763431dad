"""Restart of the S3 server during uploads and downloads: no transfer fails or loses bytes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from spinreg_core.store.base import PART_BYTES
from spinreg_core.store.s3 import S3Store
from tests.support.servers import S3Server, process, s3_server, stop, wait_for


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server for this test alone, because it is killed."""
    S3FileSystem.clear_instance_cache()
    with s3_server(tmp_path / "s3") as running:
        for name, value in running.env.items():
            monkeypatch.setenv(name, value)
        yield running
    S3FileSystem.clear_instance_cache()


@pytest.mark.long
@pytest.mark.slow
def test_server_restarted_during_transfers_loses_nothing(server: S3Server, tmp_path: Path) -> None:
    store = S3Store(server.url("restart"))
    content = os.urandom(12 * PART_BYTES + 5)
    (tmp_path / "file").write_bytes(content)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for i in range(3):
                store.upload(tmp_path / "file", f"objects/{i}")
                store.create(f"parts/{i}.json", b"part %d" % i)
            for i in range(3):
                store.download(f"objects/{i}", tmp_path / f"back-{i}")
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(1.0)
    assert worker.is_alive(), "it was over before the server was killed"
    stop(server.running, signal.SIGKILL)
    worker.join(3.0)
    log = server.folder / "weed.log"
    credentials = {name: server.env[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    with process(server.command, log, os.environ | credentials) as again:
        wait_for(server.endpoint, again, log, 60)
        worker.join(120)
        assert not worker.is_alive()
        assert not errors, errors
        for i in range(3):
            assert (tmp_path / f"back-{i}").read_bytes() == content
            assert store.read(f"parts/{i}.json") == b"part %d" % i
