"""Deploying as documented, on a real Prefect server: what arrives there, and what it refuses."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker.types import HostConfig
from prefect.utilities.importtools import import_object
from prefect.utilities.templating import apply_values

from flows.compare import compare
from spinreg_core.config import RunConfig
from tests.support.servers import PrefectServer

ROOT = Path(__file__).parents[2]
FILES = {"prefect.yaml": "", "deployments/docker.yaml": "-docker", "deployments/kubernetes.yaml": "-kubernetes"}


def only_deployment(file: str, entrypoint: str = "flows.spin:spin") -> dict[str, Any]:
    """Return the only deployment of a flow."""
    declared = yaml.safe_load((ROOT / file).read_text())["deployments"]
    (deployment,) = [one for one in declared if one["entrypoint"] == entrypoint]
    return deployment


@pytest.mark.parametrize("file", FILES)
def test_deployments_name_the_flows_and_set_no_limit_by_lease(file: str) -> None:
    iterate, grid = only_deployment(file), only_deployment(file, "flows.compare:compare")
    assert (iterate["name"], grid["name"]) == (f"iterate{FILES[file]}", f"grid{FILES[file]}")
    assert [import_object(one["entrypoint"]).name for one in (iterate, grid)] == ["spin", "compare"]
    for deployment in (iterate, grid):
        assert "concurrency_limit" not in deployment
        assert deployment["work_pool"]["job_variables"]["stream_output"] is False


@pytest.mark.parametrize("file", FILES)
def test_grid_deployment_matches_its_members_but_has_its_own_pool(file: str) -> None:
    iterate, grid = only_deployment(file), only_deployment(file, "flows.compare:compare")
    default = inspect.signature(compare.fn).parameters["deployment"].default
    given = grid.get("parameters", {})
    assert given.get("deployment", default) == f"spin/{iterate['name']}"
    assert given.get("store") == iterate.get("parameters", {}).get("store")
    assert grid["work_pool"]["name"] != iterate["work_pool"]["name"]
    own, theirs = (one["work_pool"]["job_variables"] for one in (grid, iterate))
    assert {name: own.get(name) for name in ("image", "volumes", "env")} == {
        name: theirs.get(name) for name in ("image", "volumes", "env")
    }


def test_docker_understands_the_device_request() -> None:
    extra = only_deployment("deployments/docker.yaml")["work_pool"]["job_variables"]["container_create_kwargs"]
    host = HostConfig(version="1.44", **extra)
    assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert host["ShmSize"] == 16 * 2**30


def test_kubernetes_manifest_is_complete() -> None:
    """The worker fills the template: defaults, then the deployment's variables, then its own."""
    template = json.loads((ROOT / "deployments/kubernetes-base-job-template.json").read_text())
    known = template["variables"]["properties"]
    given = only_deployment("deployments/kubernetes.yaml")["work_pool"]["job_variables"]
    grid = only_deployment("deployments/kubernetes.yaml", "flows.compare:compare")["work_pool"]["job_variables"]
    assert given.keys() | grid.keys() <= known.keys()
    assert grid["gpus"] == 0
    of_the_worker = {
        "name": "run",
        "command": "prefect flow-run execute",
        "labels": {},
        "service_account_name": "spinreg",
    }
    defaults = {name: schema["default"] for name, schema in known.items() if "default" in schema}
    manifest = apply_values(template["job_configuration"]["job_manifest"], defaults | given | of_the_worker)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"] == {"cpu": "8", "memory": "64Gi"}
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in pod["volumes"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["envFrom"] == [{"secretRef": {"name": "spinreg-s3", "optional": True}}]


def deployed(server: PrefectServer, name: str) -> dict[str, Any]:
    found: dict[str, Any] = server.api("GET", f"deployments/name/spin/{name}")
    return found


@pytest.mark.slow
def test_deploy_iterate_arrives_as_described(deployed_server: PrefectServer, clone: Path) -> None:
    iterate = deployed(deployed_server, "iterate")
    assert iterate["entrypoint"] == "flows.spin:spin"
    assert iterate["pull_steps"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": str(clone.resolve())}}
    ]
    assert iterate["work_pool_name"] == "local"
    assert iterate["job_variables"]["stream_output"] is False
    assert iterate["job_variables"]["env"] == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    assert iterate["concurrency_limit"] is None
    assert iterate["global_concurrency_limit"] is None
    (schedule,) = iterate["schedules"]
    assert (schedule["slug"], schedule["active"], schedule["parameters"]) == ("nightly", False, {"rounds": 1})
    assert schedule["schedule"]["cron"] == "0 2 * * *"


@pytest.mark.slow
def test_deploy_grid_arrives_in_its_own_pool(deployed_server: PrefectServer) -> None:
    grid = deployed_server.api("GET", "deployments/name/compare/grid")
    assert (grid["entrypoint"], grid["work_pool_name"]) == ("flows.compare:compare", "control")
    assert grid["job_variables"]["env"] == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    assert grid["job_variables"]["stream_output"] is False
    fields = grid["parameter_openapi_schema"]["properties"]
    assert set(fields) == set(inspect.signature(compare.fn).parameters)
    assert all(len(field["description"]) > 15 for field in fields.values())
    assert fields["deployment"]["default"] == "spin/iterate"
    done = deployed_server.cli("deployment", "run", "compare/grid", "-p", "until_round=0")
    assert done.returncode != 0
    assert "until_round" in done.stdout + done.stderr


@pytest.mark.slow
def test_deploy_credentials_of_a_block_reach_only_the_run(deployed_server: PrefectServer) -> None:
    """As docs/security.md says it: what the worker does before it starts the process of a run."""
    code = """
import asyncio, json, sys
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.workers.process import ProcessJobConfiguration

async def main():
    await Secret(value="planted-block-7Xq").save("s3-key")
    env = {"AWS_SECRET_ACCESS_KEY": "{{ prefect.blocks.secret.s3-key }}"}
    async with get_client() as client:
        found = await client.read_deployment_by_name("spin/iterate")
        run = await client.create_flow_run_from_deployment(found.id, job_variables={"env": env})
        pool = await client.read_work_pool("local")
        template = pool.base_job_template
        made = await ProcessJobConfiguration.from_template_and_values(template, run.job_variables, client=client)
        kept = (await client.read_flow_run(run.id)).model_dump_json()
        await client.delete_flow_run(run.id)
    print(json.dumps([made.env["AWS_SECRET_ACCESS_KEY"], kept]))

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | deployed_server.env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    given, kept = json.loads(done.stdout.splitlines()[-1])
    assert given == "planted-block-7Xq"
    assert "prefect.blocks.secret.s3-key" in kept
    assert "planted-block-7Xq" not in kept


@pytest.mark.slow
def test_deploy_docker_and_kubernetes_variants_arrive(deployed_server: PrefectServer) -> None:
    docker, kubernetes = deployed(deployed_server, "iterate-docker"), deployed(deployed_server, "iterate-kubernetes")
    for deployment in (docker, kubernetes):
        steps = deployment["pull_steps"]
        assert steps == [{"prefect.deployments.steps.set_working_directory": {"directory": "/opt/spinreg"}}]
    assert docker["parameters"] == {"store": "/store"}
    assert kubernetes["parameters"] == {"store": "s3://bucket/prefix"}
    assert kubernetes["job_variables"]["image"] == "registry/spinreg:1"
    for kind, store in (("docker", "/store"), ("kubernetes", "s3://bucket/prefix")):
        grid = deployed_server.api("GET", f"deployments/name/compare/grid-{kind}")
        assert grid["parameters"] == {"store": store, "deployment": f"spin/iterate-{kind}"}
        assert grid["work_pool_name"] == f"control-{kind}"


@pytest.mark.slow
def test_deploy_form_describes_every_field_and_its_range(deployed_server: PrefectServer) -> None:
    schema = deployed(deployed_server, "iterate")["parameter_openapi_schema"]
    for name, field in RunConfig.model_fields.items():
        shown = schema["properties"][name]
        reference = shown.get("$ref")
        if reference is None:
            assert shown["description"].startswith(field.description), name
            continue
        group = schema["definitions"][reference.rpartition("/")[2]]
        assert shown["default"] == {}, "an untouched group must say nothing, or it would override a file"
        assert group["description"]
        for inner, described in type(field.default).model_fields.items():
            assert group["properties"][inner]["description"].startswith(described.description), f"{name}.{inner}"
            assert group["properties"][inner].get("default") is None, f"{name}.{inner}"
    assert schema["properties"]["config"]["description"]
    alpha = schema["definitions"]["ObjectiveConfig"]["properties"]["alpha"]
    assert (alpha["minimum"], alpha["maximum"]) == (0, 1)
    order = sorted(schema["properties"], key=lambda name: schema["properties"][name]["position"])
    assert order[:3] == ["run", "rounds", "until_round"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("rounds=0", "less than the minimum"),
        pytest.param("until_round=-1", "less than the minimum", marks=pytest.mark.long),
        pytest.param("run=Not A Name", "does not match", marks=pytest.mark.long),
        pytest.param('objective={"alpha": 1.5}', "greater than the maximum", marks=pytest.mark.long),
        pytest.param('training={"epochs": 0}', "less than the minimum", marks=pytest.mark.long),
        pytest.param('data={"turns": "second"}', "is not one of", marks=pytest.mark.long),
        ('opponent={"histroy": 2}', "Additional properties are not allowed"),
        ("round=3", "round"),
    ],
)
def test_deployment_refuses_wrong_parameters_before_a_run_exists(
    deployed_server: PrefectServer, parameter: str, reason: str
) -> None:
    before = deployed_server.api("POST", "flow_runs/count", {})
    done = deployed_server.cli("deployment", "run", "spin/iterate", "-p", parameter, env={"COLUMNS": "500"})
    assert done.returncode == 1, done.stdout
    assert reason in done.stdout + done.stderr
    assert deployed_server.api("POST", "flow_runs/count", {}) == before


@pytest.mark.slow
def test_deployment_keeps_a_single_field_of_a_group(deployed_server: PrefectServer) -> None:
    parameters = ("-p", 'data={"heldout_rows": 5}', "-p", "rounds=2", "--start-in", "1 hour")
    done = deployed_server.cli("deployment", "run", "spin/iterate", *parameters)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = deployed_server.api("POST", "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    assert run["parameters"]["data"] == {"heldout_rows": 5}
    assert run["parameters"]["rounds"] == 2
    deployed_server.api("DELETE", f"flow_runs/{run['id']}")
