"""Trackers of a run: TensorBoard, MLflow and Weights & Biases, each in a few lines over the vendor's library.

Decides: the numbers that a tracker gets; sending them again adds nothing. Leaves out: when that happens (`flows`), and
the addresses and keys of servers, which the vendors read from their own environment variables.

A tracker always gets the whole run and keeps the new numbers. So spinreg remembers nothing about it, and numbers that
it missed during an outage arrive with the next round. Each call runs in a process of its own, because the libraries
start threads, ask questions and retry for minutes; all of that ends with the process. By hand, for any run with a
report:

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
from typing import Literal

from spinreg_core.config import RunConfig, TrackingConfig, fixed_fields
from spinreg_core.errors import BadInput, SpinregError, without_credentials
from spinreg_core.evaluation.intervals import Estimate
from spinreg_core.formatting import flatten
from spinreg_core.reports.schema import Report

# Time for one call; a tracker that does not answer must not hold up a run.
PATIENCE_SECONDS = 120.0
_LONGEST_ERROR = 500  # characters
# MLflow's limits for one request.
_METRICS_AT_ONCE, _PARAMETERS_AT_ONCE = 1000, 100


@dataclass(frozen=True)
class TrackedStep:
    """The numbers of one training step, or of a round's evaluation and benchmarks.

    `step` is the place on the axis: the round, or the training step counted through all rounds. `seconds` is the time
    of the commit, since 1970.
    """

    round: int
    axis: Literal["round", "step"]
    step: int
    seconds: float
    values: dict[str, float]


def require_trackers(wanted: TrackingConfig) -> None:
    """Raise BadInput where the package of a tracker is not installed."""
    for tracker in wanted.to:
        found = importlib.util.find_spec(tracker)
        # A spec without origin is a folder of that name, such as the one that W&B leaves next to a run.
        if found is None or found.origin is None:
            expected = f"run `pip install 'spinreg[{tracker}]'`"
            raise BadInput("tracking.to", f"names {tracker}, which is not installed here", expected)


def send(tracker: str, data: Report, patience: float = PATIENCE_SECONDS) -> None:
    """Send a run to a tracker, with the experiment and folder that its configuration names.

    patience: seconds after which the call is given up.

    Raises SpinregError with the message of the tracker's library.
    """
    command = [sys.executable, "-m", "spinreg_core.reports.trackers", tracker]
    try:
        done = subprocess.run(
            command, input=json.dumps(data), capture_output=True, text=True, errors="replace", timeout=patience
        )
    except subprocess.TimeoutExpired:
        raise SpinregError(f"it took more than {patience:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SpinregError(without_credentials(lines[-1]))


def rows(data: Report) -> list[TrackedStep]:
    """Return the numbers of a run in the order in which they were measured, without those that are not finite."""
    seconds = {
        (line["round"], line["stage"]): datetime.fromisoformat(line["created"]).timestamp() for line in data["lineage"]
    }
    found, before = [], 0
    for entry in data["rounds"]:
        number = entry["round"]
        steps = entry["training"]["steps"] if entry["training"] else []
        for step in steps:
            numbers = {f"training/{k}": float(v) for k, v in step.items() if k != "step" and isinstance(v, int | float)}
            found.append(TrackedStep(number, "step", before + int(step["step"]), seconds[number, "train"], numbers))
        before += len(steps)
        if entry["metrics"] is None:
            continue
        values = _estimates("evaluation", entry["metrics"])
        for part in entry["benchmarks"]:
            values |= _estimates(f"benchmarks/{_plain(part['name'])}", part["metrics"])
        found.append(TrackedStep(number, "round", number, seconds[number, "evaluate"], values))
    return found


def _estimates(group: str, metrics: dict[str, Estimate]) -> dict[str, float]:
    """Return values and the ends of their 95 % intervals, as `group/name`, `group/name_low`, `group/name_high`."""
    return {
        f"{group}/{_plain(name)}{end}": float(value)
        for name, one in metrics.items()
        for end, value in (("", one["value"]), ("_low", one["low"]), ("_high", one["high"]))
        if value is not None
    }


def _plain(name: str) -> str:
    """Return a name that every tracker accepts. MLflow refuses commas and anything that is not path-like."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def identity(data: Report) -> str:
    """Return a run's id in a tracker. It depends on the store too, because two stores may have runs of one name."""
    return f"{data['run']}-{hashlib.sha256(data['store'].encode()).hexdigest()[:8]}"


def _report(data: Report) -> str:
    return f"{data['store']}/runs/{data['run']}/report.html"


def to_tensorboard(data: Report) -> None:
    """Write one file of events per round, with the same bytes for the same numbers; the base's has the configuration.

    A file with other content is replaced. Files of rounds that no longer exist (of another run of that name) are
    deleted.
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
            # The plugin's content is a protobuf map, which is serialised in another order in every process.
            plugin = hparams.value[0].metadata.plugin_data
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


def to_mlflow(data: Report) -> None:
    """Log to a run of the experiment, found by its tag, the numbers that it does not have.

    MLflow deletes no number, so one that was computed again is logged with the time of now and becomes the newest of
    its step. Its parameters never change, so mutable fields of the configuration are not among them.
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


def to_wandb(data: Report) -> None:
    """Log to a W&B run that is resumed by its id.

    W&B's step is the number of the row, and it accepts none twice. So a benchmark that is measured after its round was
    sent is not added. Offline, every folder has the whole run.
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


TRACKERS: dict[str, Callable[[Report], None]] = {
    "tensorboard": to_tensorboard, "mlflow": to_mlflow, "wandb": to_wandb,
}  # fmt: skip

if __name__ == "__main__":
    try:
        TRACKERS[sys.argv[1]](json.load(sys.stdin))
    # Each library has errors of its own; `send` passes on the last line.
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR])
