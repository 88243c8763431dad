"""Fixtures of the deployment tests: a copy of the files, deployed on a server as documented."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import PrefectServer, prefect_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkout in another folder than that of the tests."""
    folder = tmp_path_factory.mktemp("clone")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def deployed_server(tmp_path_factory: pytest.TempPathFactory, clone: Path) -> Iterator[PrefectServer]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as started:
        for command in (
            "work-pool create local --type process",
            "work-pool create control --type process",
            "work-pool create docker --type docker",
            "work-pool create control-docker --type docker",
            "work-pool create control-kubernetes --type kubernetes "
            "--base-job-template deployments/kubernetes-base-job-template.json",
            "work-pool create gpu --type kubernetes --base-job-template deployments/kubernetes-base-job-template.json",
            "--no-prompt deploy --all",
            "--no-prompt deploy --all --prefect-file deployments/docker.yaml",
            "--no-prompt deploy --all --prefect-file deployments/kubernetes.yaml",
        ):
            env = {"SPINREG_STORE": "s3://bucket/prefix", "SPINREG_IMAGE": "registry/spinreg:1"}
            done = started.cli(*command.split(), cwd=clone, env=env)
            assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        yield started
