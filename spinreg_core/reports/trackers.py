"""Shows a run in a tracker: TensorBoard, MLflow or Weights & Biases, a few lines over the vendor's library each.

Decides: what a tracker is given of a run, and that giving it again adds nothing. Leaves out: when that happens
(`flows/show.py`), and where servers and keys are: the vendors' own environment variables say it.

A tracker is always given the whole run, and finds out itself what is new: nothing has to be remembered about it, and
what it missed while it was away comes with the next round. It is served by a process of its own, with which the
library's threads, questions and minutes of trying end. By hand, for any run that has a report:

    python -m spinreg_core.reports.trackers mlflow < spinreg-store/runs/demo/report.json
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from spinreg_core.config import RunConfig, TrackingConfig, fixed_fields
from spinreg_core.errors import BadInput, SpinregError, without_credentials
from spinreg_core.formatting import flatten

# What a tracker may take, one round after the other: one that is away must not hold up a run.
PATIENCE_SECONDS = 120.0
_SAID = 500  # characters of an error
_METRICS_AT_ONCE, _PARAMETERS_AT_ONCE = 1000, 100  # MLflow's limits of one request


@dataclass(frozen=True)
class Row:
    """The numbers of one training step, or of a round's evaluation and benchmarks."""

    round: int
    axis: Literal["round", "step"]  # along which it is drawn
    step: int  # the place on it: the round, or the training step, counted through all rounds
    seconds: float  # since 1970, when the numbers were committed
    values: dict[str, float]


def require_trackers(wanted: TrackingConfig) -> None:
    """Raise BadInput where the package of a tracker is not installed."""
    for tracker in wanted.to:
        found = importlib.util.find_spec(tracker)
        if found is None or found.origin is None:  # without origin it is a folder that has the name by chance
            expected = f"one that is, or `pip install 'spinreg[{tracker}]'`"
            raise BadInput("tracking.to", f"{tracker}, which is not installed here", expected)


def send(tracker: str, data: dict[str, Any]) -> None:
    """Give a tracker everything there is of a run. Raises SpinregError with what the tracker's library said.

    data: as `report.report_data`, also below; its configuration says which experiment and folder.
    """
    command = [sys.executable, "-m", "spinreg_core.reports.trackers", tracker]
    try:
        done = subprocess.run(
            command, input=json.dumps(data), capture_output=True, text=True, errors="replace", timeout=PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise SpinregError(f"it took more than {PATIENCE_SECONDS:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SpinregError(without_credentials(lines[-1]))


def rows(data: dict[str, Any]) -> list[Row]:
    """The numbers of a run in the order in which they came to be; what is not finite is left out."""
    seconds = {
        (line["round"], line["stage"]): datetime.fromisoformat(line["created"]).timestamp() for line in data["lineage"]
    }
    found, before = [], 0
    for entry in data["rounds"]:
        number = entry["round"]
        steps = entry["training"]["steps"] if entry["training"] else []
        for step in steps:
            numbers = {f"training/{k}": float(v) for k, v in step.items() if k != "step" and isinstance(v, int | float)}
            found.append(Row(number, "step", before + step["step"], seconds[number, "train"], numbers))
        before += len(steps)
        if entry["metrics"] is None:
            continue
        values = _estimates("evaluation", entry["metrics"])
        for part in entry["benchmarks"]:
            values |= _estimates(f"benchmarks/{_plain(part['name'])}", part["metrics"])
        found.append(Row(number, "round", number, seconds[number, "evaluate"], values))
    return found


def _estimates(group: str, metrics: dict[str, Any]) -> dict[str, float]:
    """Values and the ends of their 95 % intervals, as `group/name`, `group/name_low`, `group/name_high`."""
    return {
        f"{group}/{_plain(name)}{end}": float(estimate[key])
        for name, estimate in metrics.items()
        for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))
        if estimate[key] is not None
    }


def _plain(name: str) -> str:
    """A name that every tracker takes: MLflow refuses commas, and what looks like no path."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def identity(data: dict[str, Any]) -> str:
    """What a run is found again by: its name and its store, of which another one may have a run of the same name."""
    return f"{data['run']}-{hashlib.sha256(data['store'].encode()).hexdigest()[:8]}"


def _report(data: dict[str, Any]) -> str:
    return f"{data['store']}/runs/{data['run']}/report.html"


def to_tensorboard(data: dict[str, Any]) -> None:
    """One file of events per round, always the same bytes for the same numbers; the base's has the configuration.

    A file that has to change is replaced; those of rounds that are no more (another run of that name) go.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = Path(data["config"]["tracking"]["folder"]).expanduser() / data["run"]
    folder.mkdir(parents=True, exist_ok=True)
    written = set[Path]()
    for number, of_round in groupby(rows(data), key=lambda row: row.round):
        made = list(of_round)
        start = made[0].seconds
        events = [Event(wall_time=start, file_version="brain.Event:2")]
        if not written:
            hparams = hparams_pb(dict(flatten(data["config"])), start_time_secs=start)
            plugin = hparams.value[0].metadata.plugin_data  # a mapping, in another order in every process
            plugin.content = HParamsPluginData.FromString(plugin.content).SerializeToString(deterministic=True)
            events += [Event(wall_time=start, summary=one) for one in (hparams, text_pb("report", _report(data)))]
        for row in made:
            scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.values.items()]
            events.append(Event(wall_time=row.seconds, step=row.step, summary=Summary(value=scalars)))
        content = io.BytesIO()
        for event in events:
            RecordWriter(content).write(event.SerializeToString(deterministic=True))
        # TensorBoard reads the files of a folder in the order of their names.
        path = folder / f"events.out.tfevents.{number:010d}.spinreg"
        written.add(path)
        if not path.exists() or path.read_bytes() != content.getvalue():
            partial = folder / f".partial-{os.getpid()}"
            partial.write_bytes(content.getvalue())
            os.replace(partial, path)
    for path in set(folder.glob("events.out.tfevents.*.spinreg")) - written:
        path.unlink()


def to_mlflow(data: dict[str, Any]) -> None:
    """A run of the experiment, found again by a tag. Only numbers that it does not have are logged; one that was made
    anew becomes the newest of its step, as MLflow forgets none.

    MLflow's parameters never change, so the fields of the configuration that may change are not among them.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, project = MlflowClient(), data["config"]["tracking"]["project"]
    experiment = client.get_experiment_by_name(project)
    place = client.create_experiment(project) if experiment is None else experiment.experiment_id
    found = client.search_runs([place], f"tags.`spinreg.id` = '{identity(data)}'", max_results=1)
    run = found[0] if found else client.create_run(place, run_name=data["run"], tags={"spinreg.id": identity(data)})
    run_id = run.info.run_id
    client.set_tag(run_id, "spinreg.report", _report(data))
    fields = flatten(fixed_fields(RunConfig.model_validate(data["config"])))
    params = [Param(_plain(name), value) for name, value in fields]
    for start in range(0, len(params), _PARAMETERS_AT_ONCE):
        client.log_batch(run_id, params=params[start : start + _PARAMETERS_AT_ONCE])
    known: dict[tuple[str, int], float] = {}
    for key in run.data.metrics:
        for one in sorted(client.get_metric_history(run_id, key), key=lambda one: one.timestamp):
            known[key, one.step] = one.value
    metrics = [
        Metric(key, value, int(1000 * (time.time() if (key, row.step) in known else row.seconds)), row.step)
        for row in rows(data)
        for key, value in row.values.items()
        if known.get((key, row.step)) != value
    ]
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])
    client.set_terminated(run_id)


def to_wandb(data: dict[str, Any]) -> None:
    """A run with an id of its own that is resumed. W&B's step is the number of the row, and it takes none twice; what
    is measured later of a round that it has is not added. Offline every folder has the whole run.
    """
    import wandb

    settings = wandb.Settings(console="off", disable_git=True, x_disable_stats=True)
    config = dict(flatten(data["config"])) | {"report": _report(data)}
    with wandb.init(
        project=data["config"]["tracking"]["project"], id=identity(data), name=data["run"], resume="allow",
        settings=settings,
    ) as run:  # fmt: skip
        run.config.update(config, allow_val_change=True)
        run.define_metric("evaluation/*", step_metric="round")
        run.define_metric("benchmarks/*", step_metric="round")
        run.define_metric("training/*", step_metric="step")
        for number, row in enumerate(rows(data)):
            if number >= run.starting_step:
                run.log(row.values | {row.axis: row.step}, step=number)


TRACKERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "tensorboard": to_tensorboard, "mlflow": to_mlflow, "wandb": to_wandb,
}  # fmt: skip

if __name__ == "__main__":
    try:
        TRACKERS[sys.argv[1]](json.load(sys.stdin))
    except Exception as error:  # each library has errors of its own; `send` passes on the last line
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:_SAID])
