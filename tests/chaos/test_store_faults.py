"""The S3 store behind a network that loses, doubles, delays and garbles: every promise holds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, fault_proxy
from s3fs import S3FileSystem
from servers import S3Server

from spinreg_core import s3_store
from spinreg_core.errors import BadInput, Conflict, StoreFailed, StoreRefused
from spinreg_core.s3_store import S3Store
from spinreg_core.store import PART_BYTES

ALL = {"refused": 0.2, "lost": 0.1, "torn": 0.1, "slow": 0.05, "doubled": 0.1, "stale": 0.2}

Behind = Callable[..., tuple[FaultProxy, S3Store]]


@pytest.fixture
def behind(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Behind]:
    """A store of its own behind a proxy with the given rates of faults."""
    with contextlib.ExitStack() as stack:

        def make(rates: dict[str, float], seed: int = 0, prefix: str | None = None) -> tuple[FaultProxy, S3Store]:
            proxy = stack.enter_context(fault_proxy(s3_server.endpoint, rates, seed))
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            S3FileSystem.clear_instance_cache()  # one is kept whatever the address is
            monkeypatch.setattr(s3_store, "_FIRST_PAUSE", 0.02)
            return proxy, S3Store(s3_server.url(prefix or uuid.uuid4().hex))

        yield make
    S3FileSystem.clear_instance_cache()


def test_documents_under_all_faults(behind: Behind) -> None:
    """Create-only and compare-and-swap decide as they do without faults, whatever acknowledgements are lost."""
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
def test_files_under_all_faults(behind: Behind, tmp_path: Path) -> None:
    """Parts are tried again one by one; what arrives is what was sent."""
    proxy, store = behind(ALL, seed=4)
    for size in (0, 1, PART_BYTES, PART_BYTES + 1, 9 * PART_BYTES + 12345):
        content = os.urandom(size)
        (tmp_path / "file").write_bytes(content)
        store.upload(tmp_path / "file", f"objects/{size}")
        assert store.size(f"objects/{size}") == size
        store.download(f"objects/{size}", tmp_path / "back")
        assert hashlib.sha256((tmp_path / "back").read_bytes()).digest() == hashlib.sha256(content).digest()
    assert sum(proxy.happened.values()) > 10, proxy.happened


def test_a_listing_is_complete_once_it_is_no_longer_stale(behind: Behind) -> None:
    proxy, store = behind({"refused": 0.2, "lost": 0.1, "torn": 0.1}, seed=5)
    keys = sorted(f"runs/{i:03d}/head.json" for i in range(30))
    for key in keys:
        store.create(key, b"x")
    assert store.list("runs/") == keys
    assert proxy.happened["refused"]


@pytest.mark.slow
def test_bytes_that_change_on_their_way_up_are_refused_and_sent_again(behind: Behind, tmp_path: Path) -> None:
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


def test_a_store_that_stays_away_ends_in_one_error_after_its_time(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = behind({"refused": 1.0})
    monkeypatch.setattr(s3_store, "PATIENCE_SECONDS", 2.0)
    start = time.monotonic()
    with pytest.raises(StoreFailed, match=r"reading s3://spinreg/\S+/a: the store did not do it for 2 s: .*"):
        store.read("a")
    assert time.monotonic() - start >= 1.0, "it was tried for a while"
    monkeypatch.setattr(s3_store, "_CHECK_SECONDS", 1.0)
    with pytest.raises(BadInput, match="bucket 'spinreg' within reach"):
        store.check()


def test_what_does_not_pass_is_not_tried_again(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, _ = behind({})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    S3FileSystem.clear_instance_cache()
    store = S3Store("s3://spinreg/wrong-key")
    before = proxy.requests
    with pytest.raises(StoreRefused, match="SignatureDoesNotMatch"):
        store.read("a")
    assert proxy.requests - before <= 2
