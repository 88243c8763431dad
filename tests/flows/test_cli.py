"""The command line: its output, and the exit statuses for scripts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

import tasks.server
from flows.cli import main
from flows.cli_parser import parser
from flows.terminal import parameters
from spinreg_core.config import ResourcesConfig, RunConfig
from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, BadInput
from spinreg_core.runs.lease import hold_lease
from spinreg_core.store.open import open_store

QUICK = RunConfig(resources=ResourcesConfig(lease_seconds=2))


def test_parameters_are_nested_by_group() -> None:
    arguments = parser().parse_args(
        ["run", "--run", "x", "--rounds", "2", "-p", "objective.alpha=0.25", "-p", "opponent.history=all",
         "-p", "objective.beta=[0.1, 5]", "-p", "training.max_grad_norm=null"]
    )  # fmt: skip
    assert parameters(arguments) == {
        "run": "x",
        "rounds": 2,
        "objective": {"alpha": 0.25, "beta": [0.1, 5]},
        "opponent": {"history": "all"},
        "training": {"max_grad_norm": None},
    }


def test_parameters_without_a_value_are_refused() -> None:
    with pytest.raises(BadInput, match=r"GROUP\.FIELD=VALUE"):
        parameters(parser().parse_args(["run", "-p", "objective.alpha"]))


def test_main_bad_input_ends_with_65_and_names_the_field(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", "--store", str(tmp_path), "-p", "objective.alpha=2"]) == EXIT_BAD_INPUT
    assert "objective.alpha: found 2" in capsys.readouterr().err
    assert main(["run", "--config", str(tmp_path / "none.yaml")]) == EXIT_BAD_INPUT
    assert "none.yaml" in capsys.readouterr().err
    assert main(["grid", "--store", str(tmp_path), "--until-round", "0"]) == EXIT_BAD_INPUT
    assert "until_round: found 0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_main_damage_ends_with_74(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    open_store(str(tmp_path)).write("runs/demo/head.json", b"{")
    for command in ("status", "report", "verify"):
        assert main([command, "demo", "--store", str(tmp_path)]) == EXIT_DAMAGED
        assert "head.json: found 1 bytes" in capsys.readouterr().err


def test_status_shows_no_runs_one_run_and_refuses_an_unknown_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["status", "--store", str(tmp_path)]) == 0
    assert "no runs" in capsys.readouterr().out
    with hold_lease(open_store(str(tmp_path)), QUICK, "somebody") as session:
        session.begin_advance("one", 2, None)
        assert main(["status", "--store", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert "somebody" in shown
        assert "0 -> 2" in shown
    assert main(["status", "demo", "--json", "--store", str(tmp_path)]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["pending"]["to"] == 2
    assert run["lease"]["holder"] is None
    assert main(["status", "nope", "--store", str(tmp_path)]) == EXIT_BAD_INPUT
    assert "demo" in capsys.readouterr().err


def test_data_inspect_counts_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "builtin:demo", "--json"]) == 0
    text = capsys.readouterr().out
    assert "350" in text
    json.loads(text)


def test_plan_shows_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[2] / "deployments/configs/smoke.yaml"
    assert main(["plan", "--config", str(config), "--tflops", "1"]) == 0
    shown = capsys.readouterr().out
    for stage in ("generate", "mix-opponent", "train", "evaluate"):
        assert stage in shown


@pytest.mark.parametrize("command", [[], ["run"], ["status"], ["report"], ["compare"], ["plan"], ["data", "inspect"]])
def test_help_of_every_command_shows_its_usage(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "usage: spinreg" in done.stdout


@pytest.fixture
def _clients_forgotten() -> Iterator[None]:
    """s3fs keeps clients, and with them the credentials they found or did not find."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("_clients_forgotten")
@pytest.mark.parametrize("command", ["status", "report"])
def test_main_unreadable_store_is_bad_input(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for store in (str(file), "s3://nowhere/x"):
        assert main([command, "demo", "--store", store]) == 65
        error = capsys.readouterr().err
        assert error.startswith("spinreg: store")
        assert store in error
        assert error.count("\n") == 1


def test_help_lists_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit):
            main(command)
        assert "65 bad input" in " ".join(capsys.readouterr().out.split())


def test_main_ctrl_c_ends_without_a_traceback(tmp_path: Path, interruptible: None) -> None:
    """Any command; this one reads a run from a FIFO without a writer."""
    (tmp_path / "store/runs/demo").mkdir(parents=True)
    fifo = tmp_path / "store/runs/demo/head.json"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "flows.cli", "status", "demo", "--store", str(tmp_path / "store")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer = os.open(fifo, os.O_WRONLY)  # waits for the reader
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    os.close(writer)
    assert (process.returncode, out, error) == (130, "", "")


@pytest.mark.parametrize("run", ["../demo", "", "Demo"])
@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["verify"],
        ["resume"],
        ["gc", "--run"],
        ["report"],
        ["join"],
        ["run", "--run"],
        ["compare", "a"],
        ["win-rate", "a"],
        ["export", "--to", "x"],
    ],
)
def test_main_refuses_names_that_cannot_be_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str], run: str
) -> None:
    assert main([*command, run, "--store", str(tmp_path)]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith(f"spinreg: run: found {run!r}; expected a name that matches ")


@pytest.mark.parametrize("odd", ["not a name", "newer"])
def test_status_unreadable_run_hides_no_other(capsys: pytest.CaptureFixture[str], tmp_path: Path, odd: str) -> None:
    """A copy made by hand, or a run of a newer version."""
    store = open_store(str(tmp_path))
    with hold_lease(store, QUICK, "test"):
        pass
    shutil.copytree(tmp_path / "runs/demo", tmp_path / ("runs/demo.BAK" if odd == "not a name" else "runs/newer"))
    if odd == "newer":
        store.write("runs/newer/head.json", b'{"schema": 99}')
    assert main(["status", "--store", store.url]) == (EXIT_DAMAGED if odd == "newer" else 0)
    printed = capsys.readouterr().out
    assert "demo: 0 complete rounds" in printed
    assert ("demo.BAK: 0 complete rounds" if odd == "not a name" else "newer: damaged: ") in printed


@pytest.mark.parametrize("command", ["run", "grid"])
def test_main_unreachable_server_ends_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks.server, "START_PATIENCE_SECONDS", 0.5)
    given = ["--until-round", "1", "--model", "random:tiny", "--dataset", "demo", "--store", str(tmp_path / "store")]
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert main([command, *given]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("spinreg: PREFECT_API_URL cannot be used: http://127.0.0.1:9/api (")
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "PREFECT_API_URL",
            "http://[::1",
            "Prefect's settings (in the environment or Prefect's profile) cannot be used",
        ),
        (
            "PREFECT_CLIENT_MAX_RETRIES",
            "abc",
            "PREFECT_CLIENT_MAX_RETRIES (in the environment or Prefect's profile) cannot be used",
        ),
        (
            "PREFECT_CLIENT_CUSTOM_HEADERS",
            '{"a": "b"',
            "Prefect's settings (in the environment or Prefect's profile) cannot be read",
        ),
        (
            "PREFECT_PROFILES_PATH",
            "/",
            "Prefect's settings (in the environment or Prefect's profile) cannot be read",
        ),
        ("SPINREG_CACHE", "~nosuch/x", "SPINREG_CACHE: found '~nosuch/x' (Could not determine home directory.)"),
        ("SPINREG_CACHE", "/proc", "SPINREG_CACHE: found /proc (No such file or directory)"),
        ("SPINREG_CACHE_GB", "-3", "SPINREG_CACHE_GB: found '-3'"),
    ],
)
def test_main_wrong_environment_ends_before_a_flow_run_exists(
    tmp_path: Path, variable: str, value: str, said: str
) -> None:
    command = [sys.executable, "-m", "flows.cli", "run", "--store", str(tmp_path / "store"), "--model", "random:tiny"]
    env = os.environ | {"PREFECT_HOME": str(tmp_path / "home"), variable: value}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"spinreg: {said}")
    assert "Traceback" not in done.stderr


def test_main_empty_store_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--store", ""]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("spinreg: store is empty; give a local folder")
