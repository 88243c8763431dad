"""The train stage on several ranks: killed, hung, out of memory, stopped, and continued on another number of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spinreg_core.runs import fetch, objects
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import Manifest
from tests.support.training_fixtures import Setting, lines, sha_of_weights, without_time

LONG = pytest.mark.long
# Put into a rank's process by Python itself: the stage is the real one, under the real torchrun.
FAULTY = """
import importlib.util, os, sys
if os.environ.get("RANK", "1") == os.environ.get("FAULT_RANK", "1") and "FAULT" in os.environ:
    class Patch:
        def find_spec(self, name, path=None, target=None):
            if name != "spinreg_core.training.trainer":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                step = module.RoundTrainer.step
                def faulty(self):
                    if self.state.done == int(os.environ.get("FAULT_AFTER", "3")):
                        exec(os.environ["FAULT"])
                    return step(self)
                module.RoundTrainer.step = faulty
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Patch())
"""


@pytest.fixture(scope="module", name="setting")
def _setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("ranked")
    (root / "faulty").mkdir()
    (root / "faulty" / "sitecustomize.py").write_text(FAULTY)
    return Setting(root)


def start(setting: Setting, job: Job, fault: str | None = None, after: int = 3, rank: int = 1) -> subprocess.Popen[str]:
    """`fault`: what this rank, or the only one, does after so many steps."""
    job.workdir.mkdir(parents=True, exist_ok=True)
    job_file = job.workdir / "job.json"
    job.save(job_file)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if fault is not None:
        environment |= {
            "PYTHONPATH": str(setting.root / "faulty"),
            "FAULT": fault,
            "FAULT_AFTER": str(after),
            "FAULT_RANK": str(rank),
        }
    return subprocess.Popen(
        [sys.executable, "-m", "spinreg_core.stages.train", str(job_file)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def run(setting: Setting, job: Job, fault: str | None = None, rank: int = 1) -> tuple[int, str]:
    with start(setting, job, fault, rank=rank) as process:
        assert process.stdout is not None
        output = process.stdout.read()
    return process.returncode, output


def ranks_of(job: Job) -> list[int]:
    """Process ids of the job's ranks that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(job.workdir / "job.json").encode() in words:
            found.append(int(path.parent.name))
    return found


def on(count: int | str, **resources: Any) -> dict[str, Any]:
    return {"processes": count, "collective_timeout_seconds": 60} | resources


@pytest.fixture(scope="module", name="whole")
def _whole(setting: Setting) -> dict[str, Any]:
    """The manifest of a round on two ranks that nothing interrupted."""
    job = setting.job("whole-2", resources=on(2))
    status, output = run(setting, job)
    assert status == 0, output
    assert "2 ranks, mesh {'shard': 2}" in output
    assert output.count("step 12/12: ") == 1, "one rank speaks"
    return objects.require_manifest(setting.store, job.object_id)


def test_two_ranks_end_where_one_does(setting: Setting, whole: Manifest) -> None:
    one = setting.job("whole-1")
    status, output = run(setting, one)
    assert status == 0, output
    manifest = objects.require_manifest(setting.store, one.object_id)
    a, b = (
        load_file(fetch.fetch_file(setting.store, m.object_id, "policy/model.safetensors")) for m in (manifest, whole)
    )
    before = load_file(setting.folder / "model.safetensors")
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert float((b[name] - value).norm()) <= 0.05 * float((value - before[name]).norm()), name
    names = [{f.name for f in m.files} for m in (manifest, whole)]
    assert names[0] == names[1]
    metrics = [lines(setting.store, m) for m in (manifest, whole)]
    assert [m["loss"] for m in metrics[1]] == pytest.approx([m["loss"] for m in metrics[0]], rel=1e-2)


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(2, 1, marks=pytest.mark.long), (1, 2), pytest.param(2, 4, marks=pytest.mark.long)],
)
def test_round_resumes_with_another_number_of_ranks(setting: Setting, whole: Manifest, before: int, after: int) -> None:
    name = f"resharded-{before}-{after}"
    job = setting.job(name, resources=on(before), checkpoint_every_steps=1)
    with start(setting, job, "import time; time.sleep(600)", after=8) as process:  # so that it cannot end before
        assert process.stdout is not None
        shown: list[str] = []
        while not (any("step 8/12" in line for line in shown) and any(" committed" in line for line in shown)):
            shown.append(process.stdout.readline())
            assert shown[-1], "".join(shown)
        kill(process, job)
    committed = max(int(n) for n in re.findall(r"checkpoint step-(\d+) committed", "".join(shown)))
    later = setting.job(name, writer="e0002-bb", resources=on(after), checkpoint_every_steps=1)
    status, output = run(setting, later)
    assert status == 0, output
    resumed = re.search(r"resuming from the checkpoint of step (\d+) of 12", output)
    assert resumed is not None, output
    assert committed <= int(resumed[1]) <= 8
    manifest = objects.require_manifest(setting.store, job.object_id)
    metrics, expected = lines(setting.store, manifest), lines(setting.store, whole)
    # The steps' pairs follow from their number alone; tokens tell them apart.
    assert [(m["step"], m["pairs"], m["tokens"]) for m in metrics] == [
        (m["step"], m["pairs"], m["tokens"]) for m in expected
    ]
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], rel=1e-2)


def kill(process: subprocess.Popen[str], job: Job) -> None:
    """SIGKILL to the process and all its ranks, which lead groups of their own."""
    ranks = ranks_of(job)
    os.killpg(process.pid, signal.SIGKILL)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    wait_until_gone(job)


def wait_until_gone(job: Job, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while ranks_of(job):
        assert time.monotonic() < end, "ranks outlive the process that started them"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("import signal; os.kill(os.getpid(), signal.SIGKILL)",
                     r"error: rank 1 was killed by SIGKILL, often the kernel's out-of-memory killer", marks=LONG),
        ("raise ZeroDivisionError('of rank one')", r"rank 1 failed:\nTraceback.*ZeroDivisionError: of rank one"),
        pytest.param("from spinreg_core.errors import Damaged; raise Damaged('a file')", r"damaged: a file",
                     marks=LONG),
        pytest.param("import torch; torch.empty(10**15)",
         r"error: out of memory in train: it asked for 3725290\.30 GiB more\. Any of these helps: resources\."
         r"tokens_per_pass below 2048; training\.activation_checkpointing full \(now none\); training\.lora_rank "
         r"\(gradients and optimiser state of an adapter only\); more resources\.processes", marks=LONG),
        pytest.param("import ctypes; ctypes.string_at(0)",
                     r"error: rank 1 was killed by SIGSEGV; the end of its output:", marks=LONG),
    ],
    ids=["killed", "raises", "damaged", "memory", "crashes"],
)  # fmt: skip
def test_failed_rank_ends_the_job_with_its_message(setting: Setting, fault: str, said: str) -> None:
    job = setting.job(f"faulty-{abs(hash(fault))}", resources=on(2))
    begin = time.monotonic()
    status, output = run(setting, job, fault)
    assert time.monotonic() - begin < 300  # the others wait up to 600 s for a rank that they believe alive
    assert status == (74 if "Damaged" in fault else 1)
    assert re.search(said, output, re.DOTALL), output
    assert "gloo" not in output, "what the others say of its end is not shown"
    assert output.count("Traceback") == ("ZeroDivisionError" in fault)
    wait_until_gone(job)


@pytest.mark.long
def test_a_rank_that_hangs_is_named_with_the_place_where_it_was(setting: Setting) -> None:
    job = setting.job("hung", resources=on(2, collective_timeout_seconds=4))
    begin = time.monotonic()
    status, output = run(setting, job, "import time; time.sleep(600)")
    assert time.monotonic() - begin < 300
    assert status == 1
    assert "error: rank 1 did not arrive where the others waited" in output

    assert "in faulty" in output.split("rank 1 was here:")[1]
    wait_until_gone(job)


@pytest.mark.long
def test_a_damaged_checkpoint_stops_no_rank(setting: Setting, whole: Manifest) -> None:
    """One rank reads it first, and the others wait for that."""
    job = setting.job("damaged-2", resources=on(2, collective_timeout_seconds=4))
    with start(setting, job, "raise ZeroDivisionError", after=11) as process:
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 1, output
    names = list(objects.usable_parts(setting.store, job.object_id))
    for file in objects.usable_parts(setting.store, job.object_id)[names[-1]].files:
        path = setting.store.local_path(file.key)
        assert path is not None
        path.write_bytes(b"torn")
    begin = time.monotonic()
    later = setting.job("damaged-2", writer="e0002-bb", resources=on(2, collective_timeout_seconds=4))
    status, output = run(setting, later)
    assert status == 0, output
    assert time.monotonic() - begin < 300
    assert f"checkpoint {names[-1]} cannot be read and is removed" in output
    assert sha_of_weights(objects.require_manifest(setting.store, later.object_id)) == sha_of_weights(whole)


STOPS = "import spinreg_core.store.folder as store; store._copy = lambda *_: os.kill(os.getpid(), 19)"
HANGS = "import spinreg_core.store.folder as store; store._copy = lambda *_: __import__('time').sleep(600)"


@pytest.mark.long
@pytest.mark.parametrize(
    ("every", "fault", "said"),
    [
        (None, HANGS,
         r"error: rank 0: storing \S+ in \S+ made no progress for \d+ s \(resources\.collective_timeout_seconds: 4\)\. "
         r"It was here:\n.*in run\n.*in upload"),
        pytest.param(5, HANGS, r"error: rank 0: storing \S+ in \S+ made no progress .*in _finish", marks=LONG),
        pytest.param(None, STOPS,
         r"error: rank 0 has not run for \d+ s \(resources\.collective_timeout_seconds: 4\): it is suspended",
         marks=LONG),
    ],
    ids=["hangs", "hangs in a checkpoint", "suspended"],
)  # fmt: skip
def test_a_rank_that_hangs_with_its_files_is_named_as_soon(
    setting: Setting, every: int | None, fault: str, said: str
) -> None:
    """Ranks wait longer during file transfers, but not for a rank whose transfer has stalled."""
    resources = on(2, collective_timeout_seconds=4, stop_seconds=2)
    job = setting.job(f"files-{abs(hash((every, fault)))}", resources=resources, checkpoint_every_steps=every)
    status, output = run(setting, job, fault, rank=0)
    assert status == 1  # and by these words, not those of a collective that gave up after twelve times as long
    assert re.search(said, output, re.DOTALL), output
    wait_until_gone(job)


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "said"),
    [("raise SystemExit", r"a call in train ended the process with status None:\nTraceback.*in faulty"),
     pytest.param("os._exit(0)", r"error: rank 1 left with exit status 0 before its work was done", marks=LONG)],
    ids=["SystemExit", "_exit"],
)  # fmt: skip
def test_rank_that_exits_with_status_0_is_named(setting: Setting, fault: str, said: str) -> None:
    job = setting.job(f"left-{abs(hash(fault))}", resources=on(2))
    status, output = run(setting, job, fault)
    assert status == 1
    assert re.search(said, output, re.DOTALL), output
    wait_until_gone(job)


@pytest.mark.long
def test_suspended_rank_is_not_reported_as_out_of_memory(setting: Setting) -> None:
    job = setting.job("suspended", resources=on(2, collective_timeout_seconds=4, stop_seconds=2))
    status, output = run(setting, job, "import signal; os.kill(os.getpid(), signal.SIGSTOP)")
    assert status == 1
    assert "error: rank 1 did not answer for resources.collective_timeout_seconds, nor when it was told" in output
    assert "out-of-memory" not in output
    wait_until_gone(job)


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, pytest.param("raise ZeroDivisionError('of machine two')", marks=LONG)])
def test_two_machines_train_together(setting: Setting, whole: Manifest, fault: str | None) -> None:
    """Two sets of processes on this one, with nothing in common but the store and the rendezvous."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    resources = on(1, nodes=2, rendezvous=f"localhost:{port}", collective_timeout_seconds=20, stop_seconds=3)
    job = setting.job(f"machines-{fault is None}", resources=resources)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    paths = str(Path(__file__).resolve().parents[3])
    if fault is not None:
        environment |= {"FAULT": fault}
        paths = f"{setting.root / 'faulty'}{os.pathsep}{paths}"
    with subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "join", job.config.run, "--store", job.store],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=environment | {"PYTHONPATH": paths},
    ) as second:  # fmt: skip
        try:
            assert second.stdout is not None
            assert second.stdout.readline().startswith("waiting for the stages of run")
            status, output = run(setting, job, fault)
            heard = second.stdout.readline()
        finally:
            os.killpg(second.pid, signal.SIGKILL)
    assert "waiting for 1 more nodes at localhost" in output
    assert heard == "taking part in train of round 1\n"
    if fault is None:
        assert status == 0, output
        manifest = objects.require_manifest(setting.store, job.object_id)
        assert [m["loss"] for m in lines(setting.store, manifest)] == pytest.approx(
            [m["loss"] for m in lines(setting.store, whole)], rel=1e-2
        )
    else:
        assert status == 1
        assert re.search(r"Traceback.*ZeroDivisionError: of machine two", output, re.DOTALL), output
        assert "gloo" not in output


@pytest.mark.long
def test_sigterm_finishes_the_step_of_all_ranks(setting: Setting, whole: Manifest) -> None:
    job = setting.job("stopped-2", resources=on(2))
    with start(setting, job, "import time; time.sleep(1.5)") as process:  # in step 4
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/12"):
                time.sleep(0.5)
                os.killpg(process.pid, signal.SIGTERM)
                break
        output = process.stdout.read()
    assert process.returncode == 143, output
    assert "checkpoint step-000004 committed" in output
    wait_until_gone(job)
    later = setting.job("stopped-2", writer="e0002-bb", resources=on(2))
    status, output = run(setting, later)
    assert status == 0, output
    assert "resuming from the checkpoint of step 4 of 12" in output
    manifest = objects.require_manifest(setting.store, job.object_id)
    assert sha_of_weights(manifest) == sha_of_weights(whole)
    assert without_time(lines(setting.store, manifest)) == without_time(lines(setting.store, whole))


KILLS, EPOCHS = 20, 60


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_chaos_changes_no_bit(setting: Setting) -> None:
    """A training process on two ranks is killed at random instants, every other time without its ranks.

    Instants are drawn in steps, and a quarter of them lies before the first, so that machines of any speed are killed
    all over the round.
    """
    shape = {"resources": on(2), "epochs": EPOCHS, "learning_rate": 1e-4, "checkpoint_every_steps": 3}
    draw, kills, resumed = random.Random(int(os.environ.get("CHAOS_SEED", "11"))), 0, []
    while True:
        job = setting.job("chaos", writer=f"e{kills + 1:04d}-aa", **shape)
        shown = []
        with start(setting, job) as process:
            assert process.stdout is not None
            if kills < KILLS:
                early = draw.random() < 0.25
                seconds, steps = draw.uniform(0, 8 if early else 0.1), 0 if early else draw.randint(1, 25)
                while steps and (line := process.stdout.readline()):
                    shown.append(line)
                    steps -= line.startswith("step ")
                time.sleep(seconds)
                if kills % 2:
                    kill(process, job)
                else:
                    os.killpg(process.pid, signal.SIGKILL)  # the ranks are left alone
                kills += 1
            output = "".join([*shown, process.stdout.read()])
        wait_until_gone(job)
        found = re.search(r"resuming from the checkpoint of step (\d+)", output)
        resumed.extend([int(found[1])] if found else [])
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0, output
    assert kills >= KILLS, f"the round was over after {kills} kills"
    assert resumed == sorted(resumed), "nothing that was committed was lost"
    assert len(set(resumed)) > KILLS // 4
    calm = setting.job("calm", **(shape | {"checkpoint_every_steps": None, "checkpoint_every_minutes": None}))
    status, output = run(setting, calm)
    assert status == 0, output
    chaotic, undisturbed = (objects.require_manifest(setting.store, j.object_id) for j in (job, calm))
    assert sha_of_weights(chaotic) == sha_of_weights(undisturbed)
    assert json.dumps(without_time(lines(setting.store, chaotic))) == json.dumps(
        without_time(lines(setting.store, undisturbed))
    )
    assert torch.isfinite(torch.tensor([m["loss"] for m in lines(setting.store, chaotic)])).all()
