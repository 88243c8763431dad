"""Real servers for tests: an S3 store (SeaweedFS), a Prefect server and a process worker, all on loopback.

Decides: how they are started, that they are ready when handed out, and that nothing of them is left after.
Leaves out: fixtures (`tests/conftest.py`, `tests/e2e/conftest.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PREFECT = [sys.executable, "-m", "prefect"]
WEED = Path(sys.executable).with_name("weed")


def free_ports(count: int, highest: int = 55_000) -> list[int]:
    """Free TCP ports on loopback, all at most `highest` and free at +10000 too, where weed puts its gRPC ports."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = 20_000 + probe.getsockname()[1] % (highest - 20_000)
            try:
                for number in (port, port + 10_000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            ports.append(port)
    return ports


@contextlib.contextmanager
def process(
    command: list[str], log: Path, env: dict[str, str], cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own; on leaving, SIGTERM, and after 15 s SIGKILL for what is left of the group."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=env, cwd=cwd,
        )  # fmt: skip
    try:
        yield started
    finally:
        stop(started)


def stop(started: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> None:
    """End a process and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signum)
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def wait_for(url: str, started: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Return when `url` answers at all; raise with the end of the log when it does not or the process ends."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except (OSError, TimeoutError):
            pass
        if started.poll() is not None or time.monotonic() > end:
            how = f"ended with {started.poll()}" if started.poll() is not None else f"no answer after {seconds} s"
            raise RuntimeError(f"{url}: {how}\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)


@dataclass
class S3Server:
    """A running S3 store. `env` holds the credentials and the endpoint for s3fs, boto and spinreg."""

    endpoint: str
    bucket: str
    env: dict[str, str]
    command: list[str]
    folder: Path
    running: subprocess.Popen[bytes] = field(repr=False)

    def url(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}"


@contextlib.contextmanager
def s3_server(folder: Path, bucket: str = "spinreg") -> Iterator[S3Server]:
    """SeaweedFS `weed mini` with one bucket, its files in `folder`; ready for writes when handed out."""
    folder.mkdir(parents=True, exist_ok=True)
    s3, master, volume, filer, admin = free_ports(5, highest=54_000)
    credentials = {"AWS_ACCESS_KEY_ID": "spinreg-test", "AWS_SECRET_ACCESS_KEY": "spinreg-test-secret"}
    endpoint = f"http://127.0.0.1:{s3}"
    command = [
        str(WEED), "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-master.telemetry=false", "-admin.ui=false", "-admin.password=spinreg-test", "-webdav=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", f"-admin.port={admin}", f"-filer.localSocket={folder}/filer.sock", f"-bucket={bucket}",
    ]  # fmt: skip
    env = credentials | {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    log = folder / "weed.log"
    with process(command, log, os.environ | credentials) as started:
        wait_for(endpoint, started, log, 60)
        _wait_until_writable(endpoint, bucket, env, started, log, 60)
        yield S3Server(endpoint, bucket, env, command, folder, started)


def _wait_until_writable(
    endpoint: str, bucket: str, env: dict[str, str], started: subprocess.Popen[bytes], log: Path, seconds: float
) -> None:
    """The S3 port answers before the bucket and a volume to write to exist."""
    import s3fs

    end = time.monotonic() + seconds
    while True:
        try:
            files = s3fs.S3FileSystem(
                key=env["AWS_ACCESS_KEY_ID"], secret=env["AWS_SECRET_ACCESS_KEY"], endpoint_url=endpoint,
                skip_instance_cache=True, use_listings_cache=False,
                config_kwargs={"retries": {"max_attempts": 1}, "connect_timeout": 2, "read_timeout": 5},
            )  # fmt: skip
            files.pipe(f"{bucket}/.ready", b"ready")
            files.rm(f"{bucket}/.ready")
            return
        except Exception as error:
            if started.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{endpoint}: not writable\n{log.read_text(errors='replace')[-3000:]}") from error
        time.sleep(0.2)


@dataclass
class PrefectServer:
    """A Prefect server that can be killed and started again on the same port and database."""

    port: int
    home: Path
    env: dict[str, str]
    running: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, seconds: float = 120) -> None:
        log = self.home / "server.log"
        with log.open("ab") as output:
            self.running = subprocess.Popen(
                [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(self.port)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=self.env, cwd=self.home,
            )  # fmt: skip
        wait_for(f"{self.url}/api/health", self.running, log, seconds)

    def stop(self, signum: int = signal.SIGTERM) -> None:
        if self.running is not None:
            stop(self.running, signum)
            self.running = None

    def clients(self) -> list[int]:
        """Process ids of everything that runs with this server's `env`: itself, workers, flow runs, stages."""
        marker = f"PREFECT_HOME={self.home}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def cli(
        self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `prefect ARGUMENTS` against this server."""
        return subprocess.run(
            [*PREFECT, *arguments], env=self.env | (env or {}), cwd=cwd, text=True, capture_output=True, timeout=300,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Call the REST API, e.g. api("POST", "flow_runs/filter", {})."""
        request = urllib.request.Request(
            f"{self.url}/api/{path}", method=method, headers={"Content-Type": "application/json"},
            data=None if body is None else json.dumps(body).encode(),
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def flow_run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api("GET", f"flow_runs/{run_id}")
        return found

    def wait_for_state(self, run_id: str, states: set[str], seconds: float) -> dict[str, Any]:
        """The flow run once its state type is one of `states` (e.g. COMPLETED)."""
        end = time.monotonic() + seconds
        while (found := self.flow_run(run_id))["state_type"] not in states:
            if time.monotonic() > end:
                raise TimeoutError(f"flow run {run_id} is {found['state']['name']} after {seconds} s, not {states}")
            time.sleep(0.5)
        return found


@dataclass
class Postgres:
    """A PostgreSQL server on loopback; `url` for Prefect's PREFECT_SERVER_DATABASE_CONNECTION_URL."""

    folder: Path
    port: int
    user: str | None  # that runs it: PostgreSQL refuses to be root

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/postgres"

    def ctl(self, *arguments: str) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories="
        command = ["pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", options]
        subprocess.run([*command, *arguments], user=self.user, check=True, capture_output=True, cwd=self.folder)


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A fresh PostgreSQL server, its files in a folder that its user can reach (pytest's are for their owner alone)."""
    user = "nobody" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="spinreg-postgres-"))
    if user:
        shutil.chown(folder, user)
    server = Postgres(folder, free_ports(1)[0], user)
    try:
        made = subprocess.run(["initdb", "-D", str(folder / "data"), "-U", "prefect", "--auth=trust"], user=user,
                              capture_output=True, text=True, cwd=folder)  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr
        server.ctl("start")
        yield server
        server.ctl("stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def prefect_server(home: Path, database: str | None = None) -> Iterator[PrefectServer]:
    """A Prefect server on a free port with a fresh SQLite database below `home`, or with the one named.

    Its `env` is for everything that talks to it: own PREFECT_HOME, so no profile of the user has a say.
    """
    home.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env = (
        inherited
        | {
            "PREFECT_HOME": str(home),
            # Of the server process too: without it the UI asks 127.0.0.1:4200 (measured, shared/prefect.md).
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        | ({} if database is None else {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database})
    )
    server = PrefectServer(port, home, env)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        end_all(server.clients())


@contextlib.contextmanager
def prefect_worker(
    server: PrefectServer, *arguments: str, pool: str = "local", cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`prefect worker start --pool POOL ARGUMENTS`; everything it started ends with it."""
    command = [*PREFECT, "worker", "start", "--pool", pool, *arguments]
    try:
        with process(command, server.home / "worker.log", server.env, cwd) as started:
            yield started
            # Flow runs are sessions of their own and a worker told to stop waits for them.
            end_all(server.clients(), but=server.running)
    finally:
        end_all(server.clients(), but=server.running)


def end_all(pids: list[int], but: subprocess.Popen[bytes] | None = None) -> None:
    """SIGKILL the processes `pids`, except one and its children in the same group."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if but is None or os.getpgid(pid) != but.pid:
                os.kill(pid, signal.SIGKILL)
