"""Cache of objects: stays within its limit, holds whole objects only, and keeps those in use."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spinreg_core.errors import BadInput, StoreFailed
from spinreg_core.runs import fetch, objects
from spinreg_core.store import cache
from spinreg_core.store.cache import LIMIT_VARIABLE, cache_folder, cache_limit, pinned
from tests.support.builders import make_job
from tests.support.cached_objects import SIZE, content, fetch_policy
from tests.support.remote_store import RemoteStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """Objects a to f."""
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    store = RemoteStore(tmp_path / "store")
    for name in "abcdef":
        folder = tmp_path / f"made-{name}"
        (folder / "policy").mkdir(parents=True)
        (folder / "policy" / "weights").write_bytes(content(name))
        objects.publish(store, make_job("train", tmp_path, object_id=name), folder, metrics={})
    return store


def limit(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    """Room for so many objects."""
    monkeypatch.setenv(LIMIT_VARIABLE, str(count * SIZE / 1e9))


def there() -> set[str]:
    return {path.name for path in (cache_folder() / "objects").iterdir()}


def left() -> list[Path]:
    return [path for name in ("arriving", "leaving") for path in (cache_folder() / name).glob("*")]


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a process with the store of the test and a script, and return after its first line of output."""
    begin = f"""
        import hashlib, os, random, shutil, sys, time
        from pathlib import Path
        from spinreg_core.runs import fetch
        from spinreg_core.store import cache
        from tests.support.cached_objects import content, fetch_policy
        from tests.support.remote_store import RemoteStore
        store = RemoteStore(Path({str(tmp_path / "store")!r}))
    """
    started: list[subprocess.Popen[str]] = []

    def start(script: str, said: str | None = None) -> subprocess.Popen[str]:
        text = textwrap.dedent(begin) + textwrap.dedent(script)
        process = subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True)  # fmt: skip
        started.append(process)
        if said is not None:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{said}\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_cache_over_its_limit_removes_least_recently_used(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 3)
    for name in "abc":
        fetch_policy(store, name)
    fetch_policy(store, "a")  # used again: b is the oldest now
    fetch_policy(store, "d")
    assert there() == {"a", "c", "d"}
    fetch_policy(store, "e")
    assert there() == {"a", "d", "e"}
    assert left() == []


def test_cache_without_a_limit_keeps_everything(store: RemoteStore) -> None:
    for name in "abcdef":
        fetch_policy(store, name)
    assert there() == set("abcdef")
    fetch_policy(store, "a")
    assert store.fetched() == list("abcdef")


def test_object_in_use_stays_until_its_process_ends(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    limit(monkeypatch, 2)
    user = start(
        """
        folder = fetch.fetch_folder(store, "a", "policy")
        print("using", flush=True)
        sys.stdin.readline()
        assert (folder / "weights").read_bytes() == content("a")
        print("still there", flush=True)
        sys.stdin.readline()
        """,
        "using",
    )
    for name in "bcdb":
        fetch_policy(store, name)
        assert there() == {"a", name}
    assert user.stdin is not None
    assert user.stdout is not None
    user.stdin.write("go\n")
    user.stdin.flush()
    assert user.stdout.readline() == "still there\n"
    user.kill()  # nothing is given back, and the lock is gone all the same
    user.wait()
    fetch_policy(store, "c")
    assert there() == {"b", "c"}


def test_limit_below_the_objects_in_use_warns_once(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(monkeypatch, 1.5)
    with pinned():
        for name in "abc":
            assert (fetch.fetch_folder(store, name, "policy") / "weights").read_bytes() == content(name)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "cache: 0.0002 GB are in use at once, more than SPINREG_CACHE_GB=0.00015; continuing"
    fetch_policy(store, "d")
    assert there() == {"d"}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "10GB"])
def test_invalid_limit_is_bad_input(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPINREG_CACHE", str(tmp_path))
    monkeypatch.setenv(LIMIT_VARIABLE, value)
    with pytest.raises(BadInput, match=rf"SPINREG_CACHE_GB: found '{value}'; expected a positive number"):
        cache_folder()


def test_limit_is_read_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "1.5")
    assert cache_limit() == 1_500_000_000
    monkeypatch.setenv(LIMIT_VARIABLE, "")
    assert cache_limit() is None


def test_two_processes_with_the_same_object_fetch_it_once(store: RemoteStore, start: Start) -> None:
    slow = """
        real = store.download
        def download(key, path):
            print("fetching", flush=True)
            time.sleep(1)
            real(key, path)
        store.download = download
        fetch_policy(store, "a")
    """
    first = start(slow, "fetching")
    second = start(slow)
    assert [process.wait(timeout=60) for process in (first, second)] == [0, 0]
    assert store.fetched() == ["a"]


def test_fetch_beside_a_frozen_process_continues_alone(
    store: RemoteStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(
        "store.download = lambda *_: (print('fetching', flush=True), time.sleep(600)); fetch_policy(store, 'a')",
        "fetching",
    )
    monkeypatch.setattr(cache, "SILENCE_SECONDS", 0.5)
    fetch_policy(store, "a")


HOLDS = """
    import fcntl
    file = open(cache.cache_folder() / {name!r}, "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    print("holding", flush=True)
    time.sleep(600)
"""


def test_process_frozen_while_making_room_does_not_block_others(
    store: RemoteStore, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(monkeypatch, 1)
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.3)
    fetch_policy(store, "a")
    frozen = start(HOLDS.format(name=".room"), "holding")
    fetch_policy(store, "b")
    assert there() == {"a", "b"}
    assert "continuing without making room" in capsys.readouterr().out
    frozen.kill()
    frozen.wait()
    fetch_policy(store, "c")
    assert there() == {"c"}


def test_process_frozen_while_removing_is_reported(
    store: RemoteStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.3)
    fetch_policy(store, "a")
    frozen = start(HOLDS.format(name="objects/a/.used"), "holding")
    with pytest.raises(StoreFailed, match=r"objects/a: another process has held its \.used for a minute"):
        fetch_policy(store, "a")
    frozen.kill()
    frozen.wait()
    fetch_policy(store, "a")
    assert not [folder for folder in cache._in_use if folder.is_relative_to(cache.cache_folder())]


def test_error_of_a_signal_handler_ends_the_wait_for_a_lock(
    store: RemoteStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TimeoutError of a signal's handler is an OSError too, and was taken for a file system without locks."""
    fetch_policy(store, "a")
    start(HOLDS.format(name="objects/a/.used"), "holding")

    def late(*_: object) -> None:
        raise TimeoutError("late")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(TimeoutError, match="late"):
            fetch_policy(store, "a")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_process_killed_while_fetching_leaves_no_object(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    limit(monkeypatch, 2)
    process = start(
        """
        def download(key, path):
            path.write_bytes(content("a")[:50_000] + b"0" * 50_000)
            print("half", flush=True)
            time.sleep(600)
        store.download = download
        fetch_policy(store, "a")
        """,
        "half",
    )
    fetch_policy(store, "b")
    assert len(left()) == 1
    fetch_policy(store, "c")
    assert there() == {"a", "c"}, "room is kept for what another process fetches"
    process.kill()
    process.wait()
    fetch_policy(store, "b")
    assert there() >= {"b", "c"}, "and given back when that is killed"
    assert left() == []
    fetch_policy(store, "a")


def test_process_killed_while_removing_leaves_no_object(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    fetch_policy(store, "a")
    limit(monkeypatch, 1)
    process = start(
        """
        def rmtree(folder, **_):
            os.unlink(next(folder.glob("policy-*/weights")))
            print("half", flush=True)
            time.sleep(600)
        shutil.rmtree = rmtree
        fetch_policy(store, "b")
        """,
        "half",
    )
    process.kill()
    process.wait()
    assert "a" not in there()
    assert len(left()) == 1
    fetch_policy(store, "a")
    assert left() == []
    assert store.fetched() == ["a", "a"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_copy_is_fetched_again(store: RemoteStore, damage: str) -> None:
    folder = fetch.fetch_folder(store, "a", "policy")
    copy = cache_folder() / "objects" / "a" / hashlib.sha256(content("a")).hexdigest()
    if damage == "gone":
        copy.unlink()
    else:
        changed = bytearray(content("a"))
        changed[SIZE // 2] ^= 1
        copy.write_bytes(changed if damage == "flipped" else changed[:-1])
    assert fetch.fetch_folder(store, "a", "policy") == folder
    assert (folder / "weights").read_bytes() == content("a")
    assert store.fetched() == ["a", "a"]


def test_byte_flipped_between_two_processes_is_found(store: RemoteStore, start: Start) -> None:
    """With size and times as they were: only the hash tells."""
    assert start("fetch_policy(store, 'a')").wait(timeout=60) == 0
    copy = cache_folder() / "objects" / "a" / hashlib.sha256(content("a")).hexdigest()
    before = copy.stat()
    with open(copy, "r+b") as file:
        file.write(bytes([content("a")[0] ^ 1]))
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert start("fetch_policy(store, 'a')").wait(timeout=60) == 0
    assert store.fetched() == ["a", "a"]


def test_cache_under_random_kills_holds_whole_objects(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    """Three processes, replaced when killed, fetch and read at random with room for two objects of six."""
    limit(monkeypatch, 2)
    script = """
        cache._POLL_SECONDS = 0.01
        print("ready", flush=True)
        while True:
            fetch_policy(store, random.choice("abcdef"))
        """
    running = [start(script, "ready") for _ in range(3)]
    draw, kills, end = random.Random(5), 0, time.monotonic() + 3
    while time.monotonic() < end or kills < 2:
        time.sleep(draw.uniform(0, 0.5))
        assert [process.poll() for process in running] == [None] * 3
        victim = running.pop(0)
        victim.kill()
        victim.wait()
        kills += 1
        running.append(start(script, "ready"))
    for process in running:
        process.kill()
        process.wait()
    assert kills >= 2
    assert len(store.fetched()) > 20
    fetch_policy(store, "a")
    fetch_policy(store, "b")
    assert left() == []
    assert cache._bytes(cache_folder()) <= 2 * SIZE


def test_cache_that_cannot_be_a_folder_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/spinreg")):
        monkeypatch.setenv("SPINREG_CACHE", str(place))
        with pytest.raises(BadInput, match=r"SPINREG_CACHE: found /\S+ \(.*\); expected a folder"):
            cache_folder()
