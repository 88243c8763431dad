"""What the deployment tests share: a copy of what is deployed, and a server it is deployed on as documented."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import PrefectServer, prefect_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is deployed, somewhere else than where the tests run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("flows", "tasks", "spinreg_core", "deployments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", folder)
    return folder


@pytest.fixture(scope="session")
def deployed_server(tmp_path_factory: pytest.TempPathFactory, clone: Path) -> Iterator[PrefectServer]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as started:
        for command in (
            "work-pool create local --type process",
            "work-pool create docker --type docker",
            "work-pool create gpu --type kubernetes --base-job-template deployments/kubernetes-base-job-template.json",
            "--no-prompt deploy --all",
            "--no-prompt deploy --all --prefect-file deployments/docker.yaml",
            "--no-prompt deploy --all --prefect-file deployments/kubernetes.yaml",
        ):
            env = {"SPINREG_STORE": "s3://bucket/prefix", "SPINREG_IMAGE": "registry/spinreg:1"}
            done = started.cli(*command.split(), cwd=clone, env=env)
            assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        yield started
