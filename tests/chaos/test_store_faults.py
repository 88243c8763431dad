"""S3 store behind a faulty network: every promise of the store holds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from spinreg_core.errors import BadInput, Conflict, StoreFailed, StoreRefused
from spinreg_core.store.base import PART_BYTES
from spinreg_core.store.remote_files import fetch_s3, list_s3
from spinreg_core.store.retries import RetryTimes
from spinreg_core.store.s3 import S3Store, write_at
from tests.chaos.fault_proxy import FaultProxy, fault_proxy
from tests.support.servers import S3Server

QUICK = RetryTimes(first_pause=0.02)
ALL = {"refused": 0.2, "lost": 0.1, "torn": 0.1, "slow": 0.05, "doubled": 0.1, "stale": 0.2}

Behind = Callable[..., tuple[FaultProxy, S3Store]]


@pytest.fixture
def behind(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Behind]:
    """A store of its own behind a proxy with the given rates of faults."""
    with contextlib.ExitStack() as stack:

        def make(
            rates: dict[str, float], seed: int = 0, prefix: str | None = None, times: RetryTimes = QUICK
        ) -> tuple[FaultProxy, S3Store]:
            proxy = stack.enter_context(fault_proxy(s3_server.endpoint, rates, seed))
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            S3FileSystem.clear_instance_cache()  # one is kept whatever the address is
            return proxy, S3Store(s3_server.url(prefix or uuid.uuid4().hex), times)

        yield make
    S3FileSystem.clear_instance_cache()


def test_documents_under_all_faults_keep_their_promises(behind: Behind) -> None:
    """Create-only and compare-and-swap decide as without faults, however many replies are lost."""
    proxy, store = behind(ALL, seed=3)
    for i in range(40):
        store.create(f"parts/{i}.json", f"part {i}".encode())
        with pytest.raises(Conflict):
            store.create(f"parts/{i}.json", b"another's")
        assert store.read(f"parts/{i}.json") == f"part {i}".encode()
    tag = store.create("head.json", b"0")
    for i in range(1, 30):
        old, tag = tag, store.replace("head.json", str(i).encode(), tag)
        with pytest.raises(Conflict):
            store.replace("head.json", b"late", old)
    assert store.read_tagged("head.json") == (b"29", tag)
    assert min(proxy.happened[fault] for fault in ALL if fault != "stale") > 5, proxy.happened


@pytest.mark.slow
def test_files_under_all_faults_arrive_unchanged(behind: Behind, tmp_path: Path) -> None:
    """Parts are retried separately, and the bytes arrive unchanged."""
    proxy, store = behind(ALL, seed=4)
    for size in (0, 1, PART_BYTES, PART_BYTES + 1, 9 * PART_BYTES + 12345):
        content = os.urandom(size)
        (tmp_path / "file").write_bytes(content)
        store.upload(tmp_path / "file", f"objects/{size}")
        assert store.size(f"objects/{size}") == size
        store.download(f"objects/{size}", tmp_path / "back")
        assert hashlib.sha256((tmp_path / "back").read_bytes()).digest() == hashlib.sha256(content).digest()
    assert sum(proxy.happened.values()) > 10, proxy.happened


def test_listing_that_was_stale_becomes_complete(behind: Behind) -> None:
    proxy, store = behind({"refused": 0.2, "lost": 0.1, "torn": 0.1, "stale": 0.5}, seed=5)
    keys: list[str] = []
    seen = []
    for i in range(12):
        keys.append(f"runs/{i:03d}/head.json")
        store.create(keys[-1], b"x")
        seen.append(store.list("runs/"))
        assert seen[-1] == keys[: len(seen[-1])], "behind, but nothing that never was"
    assert any(len(found) < i + 1 for i, found in enumerate(seen))
    end = time.monotonic() + 60
    while store.list("runs/") != keys:
        assert time.monotonic() < end
    assert proxy.happened["refused"]
    assert proxy.happened["stale"]


@pytest.mark.slow
def test_bytes_flipped_on_their_way_up_are_sent_again(
    behind: Behind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # as people set it for other servers
    proxy, store = behind({"flipped": 0.4}, seed=6)
    for i in range(20):
        store.create(f"{i}.json", b"%d" % i * 100)
        assert store.read(f"{i}.json") == b"%d" % i * 100
    content = os.urandom(5 * PART_BYTES)
    (tmp_path / "file").write_bytes(content)
    store.upload(tmp_path / "file", "file")
    store.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    assert proxy.happened["flipped"] > 5


def test_upload_with_a_lost_reply_and_a_fault_after_it_succeeds(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload was completed and its reply lost. The first request to find out fails too."""
    from botocore.exceptions import EndpointConnectionError

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    S3FileSystem.clear_instance_cache()
    asked: list[str] = []

    class Faulty(S3Store):
        async def call(self, method: str, **arguments: object) -> object:
            asked.append(method)
            if method == "head_object" and asked.count(method) == 1:
                raise EndpointConnectionError(endpoint_url="http://s")
            answer = await super().call(method, **arguments)
            if method == "complete_multipart_upload" and asked.count(method) == 1:
                raise ConnectionResetError("the answer did not arrive")
            return answer

    store = Faulty(s3_server.url(uuid.uuid4().hex), QUICK)
    content = os.urandom(PART_BYTES + 1)
    (tmp_path / "file").write_bytes(content)
    store.upload(tmp_path / "file", "file")
    store.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    assert asked.count("head_object") >= 2
    assert "abort_multipart_upload" not in asked


def test_write_at_a_nearly_full_disk_writes_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, start: real(file, data[:3], start))
    with open(tmp_path / "file", "wb") as file:
        write_at(file.fileno(), b"0123456789", 2)
    assert (tmp_path / "file").read_bytes() == b"\0\0" + b"0123456789"


def test_store_that_stays_away_fails_after_its_patience(behind: Behind) -> None:
    _, store = behind({"refused": 1.0}, times=RetryTimes(patience=2.0, check=1.0))
    start = time.monotonic()
    with pytest.raises(StoreFailed, match=r"reading s3://spinreg/\S+/a: the store kept failing for 2 s: .*"):
        store.read("a")
    assert time.monotonic() - start >= 2.0, "it was tried for as long as it says"
    with pytest.raises(BadInput, match="bucket 'spinreg' within reach"):
        store.check()


def test_users_files_on_a_faulty_s3_are_retried(behind: Behind, tmp_path: Path) -> None:
    """A server that is away is not bad input: it is retried, and its error is one that a later attempt may not meet."""
    _, calm = behind({})
    contents = {f"{i}.jsonl": os.urandom(100 * i) for i in range(1, 9)}
    for name, content in contents.items():
        calm.write(f"rows/{name}", content)
    calm.write("rows-of-others/9.jsonl", b"x")
    _, store = behind(ALL, seed=6, prefix=calm.prefix)
    for _ in range(5):
        listed = list_s3(f"{store.url}/rows/", "dataset", QUICK)
        sizes = {name: found.size for name, found in listed.items()}  # a stale listing lacks some
        assert sizes.items() <= {name: len(content) for name, content in contents.items()}.items()
    fetch_s3(f"{store.url}/rows", list(contents), tmp_path, "dataset", QUICK)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents
    fetch_s3(f"{store.url}/rows/3.jsonl", [""], tmp_path / "one", "dataset", QUICK)
    assert (tmp_path / "one/3.jsonl").read_bytes() == contents["3.jsonl"]
    behind({"refused": 1.0})
    times = RetryTimes(patience=0.5)
    with pytest.raises(StoreFailed, match=r"listing s3://spinreg/\S+/rows: the store kept failing for 0.5 s"):
        list_s3(f"{store.url}/rows", "dataset", times)
    with pytest.raises(StoreFailed, match=r"dataset: asking for s3://spinreg/\S+/rows/1.jsonl: the store kept failing"):
        fetch_s3(f"{store.url}/rows", ["1.jsonl"], tmp_path, "dataset", times)


def test_refused_request_is_not_retried(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, _ = behind({})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    S3FileSystem.clear_instance_cache()
    store = S3Store("s3://spinreg/wrong-key")
    before = proxy.requests
    with pytest.raises(StoreRefused, match="SignatureDoesNotMatch"):
        store.read("a")
    assert proxy.requests - before <= 2
