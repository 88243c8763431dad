"""Trackers: what each holds of a run, read back by its own library, and that giving it again adds nothing."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from spinreg_core.config import TrackingConfig
from spinreg_core.errors import BadInput, SpinregError
from spinreg_core.reports.run_report import report_data
from spinreg_core.reports.trackers import identity, require_trackers, rows, send, to_mlflow, to_tensorboard
from spinreg_core.store.open import open_store
from tests.support.reported_runs import estimate, make_run

NLL = [1.25, 1.10, 1.00]
WANDB = any(importlib.metadata.distributions(name="wandb"))
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report's data of a run with two rounds, the second of which was measured with a task of lm-eval."""
    place = tmp_path_factory.mktemp("run")
    data = report_data(make_run(open_store(str(place / "store")), place, NLL), "demo")
    task = {"name": "gsm8k", "metrics": {"exact_match,strict": estimate(0.5, 0.1, "share")}}
    data["rounds"][2]["benchmarks"] = [task]
    return data


@pytest.fixture
def data(finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same, its trackers' files in the test's folder, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("DO_NOT_TRACK", "true"), ("WANDB_MODE", "offline"),
                        ("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")):  # fmt: skip
        monkeypatch.setenv(name, value)
    return copy.deepcopy(finished)


def after(data: dict[str, Any], number: int) -> dict[str, Any]:
    """The data as they were when round `number` had ended."""
    return data | {"rounds": data["rounds"][: number + 1]}


def points(data: dict[str, Any]) -> Points:
    """Every number of the run by its name: (place on the axis, value)."""
    found: Points = {}
    for row in rows(data):
        for name, value in row.values.items():
            found.setdefault(name, []).append((row.step, value))
    return found


def test_tracker_rows_hold_every_number_in_order(data: dict[str, Any]) -> None:
    found = points(data)
    assert "human answer 0" in json.dumps(data), "which no tracker is given"
    nll = [entry["metrics"]["heldout_nll"] for entry in data["rounds"]]
    assert [one["value"] for one in nll] == pytest.approx(NLL)
    for end, name in (("", "value"), ("_low", "low"), ("_high", "high")):
        assert found[f"evaluation/heldout_nll{end}"] == [(number, one[name]) for number, one in enumerate(nll)]
    assert [step for step, _ in found["training/loss"]] == list(range(1, 17)), "through both rounds of eight steps"
    assert found["training/margin"][8:] == [(9 + i, 2.0 * i) for i in range(8)]
    assert [step for step, _ in found["training/grad_norm"]] == [*range(2, 9), *range(10, 17)], "without the two NaN"
    assert found["benchmarks/gsm8k/exact_match_strict"] == [(2, 0.5)]
    assert "training/step" not in found
    made = rows(data)
    assert [(row.round, row.axis) for row in made] == [
        (0, "round"), *[(1, "step")] * 8, (1, "round"), *[(2, "step")] * 8, (2, "round"),
    ]  # fmt: skip
    assert rows(after(data, 1)) == made[:10], "what a round adds comes after what there was"


def tensorboard(folder: Path) -> tuple[Any, Points]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return read, {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_after_each_round_has_every_number_once(data: dict[str, Any], tmp_path: Path) -> None:
    send("tensorboard", after(data, 1))
    folder = tmp_path / "spinreg-tensorboard" / "demo"
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    assert len(before) == 2
    _, found = tensorboard(folder)
    assert found.keys() == points(after(data, 1)).keys()
    for _ in range(2):
        to_tensorboard(data)
    assert {name: ((folder / name).stat().st_ino, (folder / name).read_bytes()) for name in before} == before
    assert len(list(folder.iterdir())) == 3
    read, found = tensorboard(folder)
    assert found == {name: [(s, pytest.approx(v, rel=1e-6)) for s, v in some] for name, some in points(data).items()}
    text = read.Tensors("report")[0].tensor_proto.string_val[0].decode()
    assert text == f"{data['store']}/runs/demo/report.html"
    hparams = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"objective.alpha" in hparams
    assert not any(b"human answer 0" in path.read_bytes() for path in folder.iterdir()), "as the report's data have"


def test_tensorboard_after_changes_drops_old_rounds(data: dict[str, Any], tmp_path: Path) -> None:
    to_tensorboard(data)
    data["rounds"][1]["metrics"]["heldout_nll"]["value"] = 9.0
    to_tensorboard(after(data, 1))
    _, found = tensorboard(tmp_path / "spinreg-tensorboard" / "demo")
    assert found["evaluation/heldout_nll"] == [(0, 1.25), (1, 9.0)]


def mlflow() -> tuple[list[Any], Points]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("spinreg")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    history = {key: client.get_metric_history(runs[0].info.run_id, key) for key in runs[0].data.metrics}
    return runs, {key: [(one.step, one.value) for one in some] for key, some in history.items()}


def test_mlflow_after_each_round_has_every_number_once(data: dict[str, Any], tmp_path: Path) -> None:
    to_mlflow(after(data, 1))
    runs, found = mlflow()
    assert found == points(after(data, 1))
    data["config"]["keep"]["policies"] = 1  # of the fields that may change: MLflow's parameters may not
    for _ in range(2):
        to_mlflow(data)
    again, found = mlflow()
    assert [run.info.run_id for run in again] == [runs[0].info.run_id]
    assert found == points(data)
    (run,) = again
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params["objective.alpha"] == "0.5"
    assert run.data.params["training.average_as"] == '["opponent", "reference", "start"]'
    assert run.data.tags["spinreg.report"] == f"{data['store']}/runs/demo/report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]
    assert b"human answer 0" not in (tmp_path / "mlflow.db").read_bytes(), "as the report's data have"

    before = points(data)["evaluation/heldout_nll"]
    data["rounds"][0]["metrics"]["heldout_nll"]["value"] = 7.0  # made again
    to_mlflow(data)
    to_mlflow(after(data, 0) | {"store": "/another"})  # which has a run of that name too
    runs, _ = mlflow()
    assert [run.info.run_id for run in runs][1:] == [run.info.run_id]
    from mlflow import MlflowClient

    history = MlflowClient().get_metric_history(run.info.run_id, "evaluation/heldout_nll")
    history.sort(key=lambda one: one.timestamp)
    assert [(one.step, one.value) for one in history] == [*before, (0, 7.0)], "the newest of its step"


def logged_by_wandb(folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The run and its history in the one file of an offline folder (LevelDB's log format, of protocol buffers)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, joined, run, history = path.read_bytes(), 7, b"", None, []
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        joined += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, joined = Record.FromString(joined), b""
            run = record.run if record.WhichOneof("record_type") == "run" else run
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.append(items | {"_step": record.history.step.num})
    return run, history


@pytest.mark.skipif(not WANDB, reason="the extra wandb is not installed")
def test_wandb_offline_has_every_number(data: dict[str, Any], tmp_path: Path) -> None:
    send("wandb", data)
    run, history = logged_by_wandb(tmp_path)
    assert (run.run_id, run.display_name, run.project) == (identity(data), "demo", "spinreg")
    assert [entry["_step"] for entry in history] == list(range(19))
    for entry, row in zip(history, rows(data), strict=True):
        assert {name: entry[name] for name in row.values} == row.values
        assert entry[row.axis] == row.step


@pytest.mark.skipif(WANDB, reason="the extra wandb is installed")
def test_tracker_not_installed_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_trackers(TrackingConfig())
    require_trackers(TrackingConfig(to=["mlflow", "tensorboard"]))
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):  # also beside a folder of that name, which W&B leaves where a run was started
        with pytest.raises(BadInput, match=r"tracking\.to names wandb, which.*`pip install 'spinreg\[wandb\]'`"):
            require_trackers(TrackingConfig(to=["wandb"]))
        (tmp_path / "wandb").mkdir(exist_ok=True)
        importlib.invalidate_caches()


def test_send_passes_on_the_error_of_the_library(data: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data["config"]["tracking"]["folder"] = str(tmp_path / "file")
    with pytest.raises(SpinregError, match=r"^NotADirectoryError: .*file/demo'$"):
        send("tensorboard", data)
    with pytest.raises(SpinregError, match=r"it took more than 0\.01 s"):
        send("tensorboard", data, patience=0.01)


def test_identity_differs_between_stores(data: dict[str, Any]) -> None:
    assert identity(data).startswith("demo-")
    assert identity(data) != identity(data | {"store": "s3://elsewhere"})
