"""Contract of a store, for folder and S3: create-only, compare-and-swap, never half a file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import botocore.session
import pytest
from s3fs import S3FileSystem

from spinreg_core.errors import BadInput, Conflict, StoreFailed, StoreRefused
from spinreg_core.store.base import Store
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.open import open_store
from spinreg_core.store.probe import require_conditional_writes
from spinreg_core.store.s3 import S3Store
from tests.support.servers import S3Server
from tests.support.unprivileged import as_nobody


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server = request.getfixturevalue("s3_server")
    return open_store(f"s3://{server.bucket}/{uuid.uuid4().hex}")


def test_read_of_a_missing_key_returns_none(store: Store) -> None:
    assert store.read("runs/x/head.json") is None
    assert store.read_tagged("runs/x/head.json") is None
    assert store.size("runs/x/head.json") is None
    assert store.list("runs/") == []


def test_create_of_an_existing_key_conflicts(store: Store) -> None:
    store.create("a/b.json", b"one")
    with pytest.raises(Conflict):
        store.create("a/b.json", b"two")
    assert store.read("a/b.json") == b"one"


def test_create_of_a_key_that_is_deleted_meanwhile_conflicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path)
    store.create("a", b"one")

    def refuse(_source: Path, target: Path) -> None:
        target.unlink()
        raise FileExistsError

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(Conflict):
        store.create("a", b"two")


def test_create_of_the_same_bytes_again_succeeds(store: Store) -> None:
    assert store.create("a", b"one") == store.create("a", b"one")


def test_replace_needs_the_current_tag(store: Store) -> None:
    first = store.create("a", b"one")
    second = store.replace("a", b"two", first)
    assert second != first
    with pytest.raises(Conflict):
        store.replace("a", b"three", first)
    assert store.read_tagged("a") == (b"two", second)


def test_replace_of_a_missing_key_conflicts(store: Store) -> None:
    tag = store.create("other", b"x")
    with pytest.raises(Conflict):
        store.replace("missing/a", b"one", tag)
    assert store.read("missing/a") is None


@pytest.mark.parametrize("operation", ["create", "replace"])
def test_replace_by_racing_writers_lets_one_win(store: Store, operation: str) -> None:
    tag = store.create("race-start", b"start") if operation == "create" else store.create("race", b"start")
    winners, barrier = [], threading.Barrier(8)

    def write(i: int) -> None:
        barrier.wait()
        try:
            if operation == "create":
                store.create("race", f"writer {i}".encode())
            else:
                store.replace("race", f"writer {i}".encode(), tag)
            winners.append(i)
        except Conflict:
            pass

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert store.read("race") == f"writer {winners[0]}".encode()


def test_upload_and_download_keep_the_bytes(store: Store, tmp_path: Path) -> None:
    content = os.urandom(3 * 2**20 + 17)
    (tmp_path / "file").write_bytes(content)
    store.upload(tmp_path / "file", "objects/x/data/e1/file")
    assert store.size("objects/x/data/e1/file") == len(content)
    store.download("objects/x/data/e1/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    with pytest.raises(FileNotFoundError):
        store.download("objects/none", tmp_path / "none")


def test_list_is_recursive_sorted_and_exact(store: Store) -> None:
    for key in ("runs/b/head.json", "runs/a/head.json", "runs-other/x", "runs/a/deep/er/y"):
        store.create(key, key.encode())
    assert store.list("runs/") == ["runs/a/deep/er/y", "runs/a/head.json", "runs/b/head.json"]


def test_list_follows_links(tmp_path: Path) -> None:
    """Runs or objects may have been moved to another disk; `spinreg gc` removes what no run that it sees needs."""
    store = FolderStore(tmp_path / "store")
    store.create("runs/one/head.json", b"{}")
    (tmp_path / "store/runs/one").rename(tmp_path / "elsewhere")
    (tmp_path / "store/runs/one").symlink_to(tmp_path / "elsewhere")
    assert store.list("runs/") == ["runs/one/head.json"]
    assert [entry.key for entry in store.entries("runs/")] == ["runs/one/head.json"]
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    for listing in (store.list, store.entries):
        with pytest.raises(StoreRefused, match=r"listing .*runs/one'; expected folders that can be listed and links"):
            listing("runs/")
    (tmp_path / "elsewhere").mkdir()  # a place where no file system is mounted
    with pytest.raises(StoreRefused, match=r"a link to an empty folder: '.*runs/one'"):
        store.list("runs/")
    (tmp_path / "store/runs/one").unlink()
    (tmp_path / "store/runs/one").symlink_to(tmp_path / "store/runs")  # a ring
    with pytest.raises(StoreRefused, match="Too many levels of symbolic links"):
        store.list("runs/")


def test_list_skips_lost_and_found() -> None:
    def fill(folder: Path) -> None:
        FolderStore(folder).create("runs/one/head.json", b"{}")
        (folder / "runs/lost+found").mkdir(mode=0)

    with as_nobody(fill) as folder:
        assert FolderStore(folder).list("runs/") == ["runs/one/head.json"]


def test_store_at_a_link_to_nothing_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(BadInput, match="is a link that leads nowhere"):
        FolderStore(tmp_path / "store").check()


def test_list_of_an_unreadable_folder_is_refused() -> None:
    def fill(folder: Path) -> None:
        FolderStore(folder).create("runs/one/head.json", b"{}")
        (folder / "runs/one").chmod(0)

    with as_nobody(fill) as folder:
        for listing in (FolderStore(folder).list, FolderStore(folder).entries):
            with pytest.raises(StoreRefused, match=r"Permission denied: .*; expected folders that can be listed"):
                listing("runs/")


def test_entries_have_sizes_and_ages(store: Store) -> None:
    store.create("a/first", b"12345")
    time.sleep(1.1)  # S3 tells seconds
    store.create("a/b/second", b"")
    entries = store.entries("a/")
    assert [(entry.key, entry.size) for entry in entries] == [("a/b/second", 0), ("a/first", 5)]
    assert 1 <= entries[1].age - entries[0].age < 10
    assert -2 < entries[0].age < 10
    assert store.entries("none/") == []


@pytest.mark.parametrize("write", ["create", "write", "upload"])
def test_new_folders_are_synced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    store, synced = FolderStore(tmp_path / "new" / "store"), list[Path]()
    plain = os.fsync

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "file").write_bytes(b"1")
    for name in ("first", "second"):
        synced.clear()
        if write == "upload":
            store.upload(tmp_path / "file", f"objects/x/{name}")
        else:
            getattr(store, write)(f"objects/x/{name}", b"1")
        folders = {path.relative_to(tmp_path).as_posix() for path in synced if path.is_dir()}
        above = {".", "new", "new/store", "new/store/objects"} if name == "first" else set()
        assert folders == {"new/store/objects/x"} | above


def test_entries_have_ages_by_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this machine may be wrong: a week ahead, all keys would look old enough for removal."""
    store = FolderStore(tmp_path / "store")
    store.create("objects/x/young", b"1")
    store.create("objects/x/old", b"1")
    (tmp_path / "store/objects/.tmp-left").touch()
    (tmp_path / "store/others").mkdir()
    (tmp_path / "store/others/.tmp-left").touch()
    os.utime(tmp_path / "store" / "objects/x/old", (time.time() - 1e6,) * 2)
    ours = time.time
    monkeypatch.setattr(time, "time", lambda: ours() + 8 * 86400)
    ages = {entry.key: entry.age for entry in [*store.entries("objects/"), *store.unfinished()]}
    assert -2 < ages["objects/x/young"] < 60
    assert -2 < ages["objects/.tmp-left"] < 60
    assert "others/.tmp-left" not in ages, "the root may be that of a file system, with folders of its own"
    assert 1e6 - 2 < ages["objects/x/old"] < 1e6 + 60
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["objects", "others"]


def test_entries_of_a_read_only_store_count_from_the_last_write(tmp_path: Path) -> None:
    """Without permission to write there is no clock of the file system: nothing looks older than it is."""

    def fill(folder: Path) -> None:
        for name, ago in (("first", 3000), ("last", 1000)):
            FolderStore(folder).create(f"a/{name}", b"1")
            os.utime(folder / "a" / name, (1e9 - ago,) * 2)

    with as_nobody(fill) as folder:
        store = FolderStore(folder)
        assert [(entry.key, entry.age) for entry in store.entries("a/")] == [("a/first", 2000), ("a/last", 0)]
        assert store.list("a/") == ["a/first", "a/last"]
    assert FolderStore(tmp_path / "none").entries("a/") == []


def test_unfinished_write_is_listed_and_aborted(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process leaves such a write."""
    key, content = "objects/x/data/w/f", b"123"
    (tmp_path / "file").write_bytes(content)
    if isinstance(store, S3Store):
        client = botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/{key}")
    else:
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", lambda *_: sys.exit("killed"))
            patched.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(SystemExit):
                store.upload(tmp_path / "file", key)
    (left,) = store.unfinished()
    assert "objects/x/data/w/" in left.key
    assert -2 < left.age < 60
    assert store.list("objects/") == []
    store.abort_unfinished(left.key)
    store.abort_unfinished(left.key)
    assert store.unfinished() == []
    store.upload(tmp_path / "file", key)
    assert store.size(key) == len(content)


def test_probe_accepts_a_store_with_conditional_writes(store: Store) -> None:
    require_conditional_writes(store)
    assert store.list("probes/") == []
    if isinstance(store, FolderStore):
        assert list((store.root / "probes").iterdir()) == [], "not even a lock"


def test_probe_refuses_a_store_that_ignores_conditions(tmp_path: Path) -> None:
    class Overwriting(FolderStore):
        def create(self, key: str, data: bytes) -> str:
            self.write(key, data)
            return ""

    with pytest.raises(BadInput, match="If-None-Match"):
        require_conditional_writes(Overwriting(tmp_path))

    class Swapping(FolderStore):
        def replace(self, key: str, data: bytes, tag: str) -> str:
            self.write(key, data)
            return ""

    with pytest.raises(BadInput, match="If-Match"):
        require_conditional_writes(Swapping(tmp_path))

    class Refusing(FolderStore):
        def create(self, key: str, data: bytes) -> str:
            raise OSError(95, "NotImplemented: a header you provided implies functionality that is not implemented")

    with pytest.raises(BadInput, match="does not support conditional writes"):
        require_conditional_writes(Refusing(tmp_path))


def test_check_of_a_usable_store_writes_nothing(store: Store) -> None:
    store.check()
    assert store.list("runs/") == []


def test_store_at_a_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(BadInput, match=r"file is not a folder"):
            open_store(str(tmp_path / place)).check()


@pytest.mark.slow
def test_missing_bucket_is_bad_input(s3_server: S3Server) -> None:
    with pytest.raises(BadInput, match="bucket 'nowhere' within reach"):
        open_store("s3://nowhere/x").check()


@pytest.mark.slow
def test_wrong_credentials_are_bad_input(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(BadInput, match="cannot be used"):
            open_store(s3_server.url("x")).check()
    finally:
        S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/./b", ""])
def test_key_that_leaves_the_store_is_bad_input(tmp_path: Path, key: str) -> None:
    with pytest.raises(BadInput):
        open_store(str(tmp_path)).write(key, b"x")


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "s3://key:secret@bucket/x"])
def test_url_of_no_store_is_bad_input(url: str) -> None:
    with pytest.raises(BadInput, match="store") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_killed_process_leaves_whole_keys_only(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing: the key does not exist, or holds everything."""
    script = textwrap.dedent(
        """
        import sys
        from spinreg_core.store.open import open_store
        store = open_store(sys.argv[1])
        print("ready", flush=True)
        for i in range(10**6):
            store.create(f"keys/{i:06d}", b"x" * 200_000)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    while len(open_store(str(tmp_path)).list("keys/")) < 5:
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    store = open_store(str(tmp_path))
    keys = store.list("keys/")
    assert len(keys) >= 5
    assert {store.size(key) for key in keys} == {200_000}
    assert keys == [f"keys/{i:06d}" for i in range(len(keys))]


@pytest.mark.slow
@pytest.mark.long
def test_gigabytes_through_s3_take_little_memory(s3_server: object, tmp_path: Path) -> None:
    """2 GiB up and down: equal bytes, and the process never holds a fifth of them."""
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from spinreg_core.store.open import open_store
        store = open_store(sys.argv[1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        store.upload(Path(sys.argv[2]), "big")
        store.download("big", Path(sys.argv[2] + ".back"))
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
        """
    )
    big, digest = tmp_path / "big", hashlib.sha256()
    with open(big, "wb") as file:
        for i in range(256):
            block = hashlib.sha256(str(i).encode()).digest() * (8 * 2**20 // 32)
            file.write(block)
            digest.update(block)
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"  # type: ignore[attr-defined]
    run = subprocess.run([sys.executable, "-c", script, url, str(big)], stdout=subprocess.PIPE, text=True, check=True)
    grown = int(run.stdout)
    assert grown < 2 * 2**30 / 5, f"memory grew by {grown / 2**20:.0f} MiB"
    with open(str(big) + ".back", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest.hexdigest()


def test_full_disk_is_refused_and_keeps_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "store")
    tag = store.create("head.json", b"one")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_bytes(b"x" * 1000)
    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: store.create("other.json", b"x"),
        lambda: store.replace("head.json", b"two", tag),
        lambda: store.write("head.json", b"two"),
        lambda: store.upload(tmp_path / "file", "objects/file"),
    ):
        with pytest.raises(StoreRefused, match=r"No space left on device.*; free some space"):
            write()
    monkeypatch.undo()
    assert store.read_tagged("head.json") == (b"one", tag)
    assert store.list("runs/") == store.list("objects/") == []
    assert store.unfinished() == []
    store.replace("head.json", b"two", tag)


def test_replace_under_the_lock_of_a_frozen_process_fails(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, lock_seconds=0.2)
    tag = store.create("head.json", b"1")
    with open(tmp_path / ".lock-head.json", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreFailed, match=r"has held the lock \S+/\.lock-head\.json for 0\.2 s"):
            store.replace("head.json", b"2", tag)
    store.replace("head.json", b"2", tag)
    assert store.read("head.json") == b"2"


@pytest.mark.parametrize("prefix", ["team//spin", "./spin", "team/../spin", "team/./spin"])
def test_open_store_refuses_a_prefix_that_listings_lose(prefix: str) -> None:
    with pytest.raises(BadInput, match=r"its prefix has an empty part.*aws s3 cp --recursive 's3://bucket/") as error:
        open_store(f"s3://bucket/{prefix}")
    plain = "/".join(part for part in prefix.split("/") if part.strip("."))
    assert f"write s3://bucket/{plain};" in str(error.value)
    assert open_store("s3://bucket/team/spin/").url == "s3://bucket/team/spin"


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_open_store_refuses_an_endpoint_with_the_bucket(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://localhost:9000/bucket/")
    with pytest.raises(BadInput, match=f"{name} has the bucket 'bucket' at its end"):
        open_store("s3://bucket/spin")
    assert open_store("s3://other/spin").url == "s3://other/spin"
