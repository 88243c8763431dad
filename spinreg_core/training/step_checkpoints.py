"""Checkpoints of a round in training: when they are written, how they reach the store, and which are kept.

Decides: the two intervals (steps and minutes); that a checkpoint exists once all ranks have stored their share (a part
`step-000050` of the stage's object); that the newest K are kept during the round and none after it.
Leaves out: the contents of a checkpoint (`training.checkpoint_files`).
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from spinreg_core.errors import Damaged
from spinreg_core.models.fsdp import local_shard
from spinreg_core.runs.fetch import fetch_part
from spinreg_core.runs.job import Job
from spinreg_core.runs.manifest import File
from spinreg_core.runs.objects import commit_part, delete_part, part_key, part_names, read_part, upload
from spinreg_core.runtime.distributed import Ranks
from spinreg_core.store.base import Store
from spinreg_core.store.transfers import main_thread_waits_for
from spinreg_core.training.checkpoint_files import load_checkpoint, own_files, start_checkpoint
from spinreg_core.training.records import RoundState
from spinreg_core.training.trainer import RoundTrainer

# The assumed speed of a checkpoint until one of this run was timed.
_ASSUMED_BYTES_PER_SECOND = 300e6
# The part of resources.stop_seconds that stays free for the end of the process.
_MARGIN_SECONDS = 2.0


@dataclass(frozen=True)
class _Share:
    """One rank's part in a checkpoint: its uploaded files and their seconds, or its error."""

    files: list[File] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


class StepCheckpoints:
    """Commits the state of a round under the number of its last step. Every rank calls the same methods in step."""

    def __init__(self, store: Store, job: Job, round_: RoundTrainer, ranks: Ranks) -> None:
        self.store, self.job, self.round, self.ranks = store, job, round_, ranks
        self.saved_step, self.saved_at = 0, time.monotonic()
        # The time of the last checkpoint, from its step to its commit.
        self.seconds: float | None = None
        self.writing: Thread | None = None

    def resume(self) -> bool:
        """Load the newest readable checkpoint. Returns False where there is none.

        Newer checkpoints that cannot be read are removed: the round repeats their steps, and must be able to commit
        sound checkpoints under their names.
        """
        names = self.ranks.gather(part_names(self.store, self.job.object_id) if self.ranks.first else [])[0]
        for name in reversed(names):
            problem = None
            try:
                files = self.ranks.local_main_first(lambda name=name: self._fetched(name))  # type: ignore[misc]
            except Damaged as error:
                problem = str(error)
            problems = [text for text in self.ranks.gather(problem) if text is not None]
            if problems:
                print(f"checkpoint {name} cannot be read and is removed: {problems[0]}", flush=True)
                if self.ranks.first:
                    self.store.delete(part_key(self.job.object_id, name))
                continue
            folder = self._folder("resume")
            for file, path in files.items():
                (folder / Path(file).name).symlink_to(path.absolute())
            state = load_checkpoint(folder, self.round.model, self.round.optimizer, self.ranks)
            shutil.rmtree(folder)
            self.round.state = RoundState.from_json(state)
            self.saved_step = self.round.state.done
            return True
        return False

    def _fetched(self, name: str) -> dict[str, Path]:
        part = read_part(self.store, self.job.object_id, name)
        if part is None:
            raise Damaged(f"checkpoint {name}: its part is gone")
        return fetch_part(self.store, part)

    def after_step(self, stopped_at: float | None) -> bool:
        """Begin a checkpoint if one is due. Returns True where training must stop, because any rank was asked to.

        stopped_at: the time of this rank's SIGTERM (time.monotonic), if any.
        """
        training, done = self.round.training, self.round.state.done
        steps, minutes = training.checkpoint_every_steps, training.checkpoint_every_minutes
        due = (steps is not None and done - self.saved_step >= steps) or (
            minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        )
        left = float("inf")
        if stopped_at is not None:
            left = stopped_at + self.job.config.resources.stop_seconds - _MARGIN_SECONDS - time.monotonic()
        busy = self.writing is not None and self.writing.is_alive()
        flags = torch.tensor(
            [stopped_at is not None, self.ranks.first and due, busy, self._estimate() > left], dtype=torch.int64
        )
        # One sum over all ranks, so that they all take the same decision.
        stop, is_due, is_busy, no_time = (bool(n) for n in self.ranks.sum(flags).tolist())
        if done == self.round.steps and not stop:
            return False  # The policy is published next.
        if "skipped" in self.round.state.metrics[-1]:
            # Only the next step shows that the weights are still finite.
            is_due = False
        if stop:
            enabled = steps is not None or minutes is not None
            if enabled and done > self.saved_step and not no_time:
                self.wait()
                self._begin()
                self.wait()
            elif enabled and done > self.saved_step:
                print(f"stopped after step {done}; no time for a checkpoint, the last is of step {self.saved_step}",
                      flush=True)  # fmt: skip
            return True
        if is_due and not is_busy:
            self._begin()
        return False

    def remove_unsound(self) -> None:
        """Remove checkpoints with weights that are not finite, after a run of skipped steps.

        A step with a finite loss can still make such weights, which only the next step shows.
        """
        self.wait()
        bad = not all(bool(local_shard(p.detach()).isfinite().all()) for p in self.round.model.parameters())
        if not any(self.ranks.gather(bad)) or not self.ranks.first:
            return
        sound = [m["step"] for m in self.round.state.metrics if "skipped" not in m][:-1]
        for name in part_names(self.store, self.job.object_id):
            if int(name.removeprefix("step-")) > max(sound, default=0):
                print(f"checkpoint {name} holds numbers that are not finite and is removed", flush=True)
                self.store.delete(part_key(self.job.object_id, name))

    def wait(self) -> None:
        """Wait until the checkpoint in progress is committed."""
        if self.writing is not None:
            with main_thread_waits_for(self.writing):
                self.writing.join()

    def discard(self) -> None:
        """Delete all checkpoints, once the policy is published. For rank 0."""
        self._keep(0)

    def _keep(self, count: int) -> None:
        """Delete all checkpoints except the newest `count`, and those that cannot be read.

        A damaged checkpoint must not fail a round that is published, nor keep the others from being deleted.
        """
        parts = []
        for name in part_names(self.store, self.job.object_id):
            try:
                part = read_part(self.store, self.job.object_id, name)
            except Damaged as error:
                print(f"checkpoint {name} cannot be read and is removed: {error}", flush=True)
                self.store.delete(part_key(self.job.object_id, name))
                continue
            if part is not None:
                parts.append(part)
        for part in parts[: max(0, len(parts) - count)]:
            delete_part(self.store, self.job.object_id, part)

    def _folder(self, name: str) -> Path:
        folder = self.job.workdir / f"{name}-{self.ranks.rank}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _begin(self) -> None:
        self.wait()
        begin, state = time.monotonic(), self.round.state
        name = f"step-{state.done:06d}"
        folder = self._folder(name)
        future = start_checkpoint(
            folder / name, self.round.model, self.round.optimizer, state.to_json(), self.ranks, self.ranks.checkpoints
        )
        self.saved_step, self.saved_at = state.done, time.monotonic()
        pause = self.saved_at - begin
        self.writing = Thread(target=self._finish, args=(name, folder, future, begin, pause), daemon=True)
        self.writing.start()

    def _finish(self, name: str, folder: Path, future: Future[Any], begin: float, pause: float) -> None:
        """Upload and commit, on every rank in a thread. An error costs this checkpoint, not the training."""
        try:
            future.result()
            start = time.monotonic()
            entries = upload(self.store, self.job, folder, own_files(folder / name, self.ranks))
            share = _Share(entries, time.monotonic() - start)
        except BaseException as error:  # DCP raises a CheckpointException, which is no Exception.
            share = _Share(error=f"{type(error).__name__}: {error}")
        # Over a group of its own: the main thread uses the others for its steps at the same time.
        shares = self.ranks.gather(share, self.ranks.checkpoints)
        shutil.rmtree(folder, ignore_errors=True)
        self.seconds = time.monotonic() - begin
        if not self.ranks.first:
            return
        errors = [one.error for one in shares if one.error is not None]
        try:
            if not errors:
                self._commit(name, shares, pause)
        except Exception as error:
            errors = [f"{type(error).__name__}: {error}"]
        if errors:
            print(f"checkpoint {name} could not be stored, training goes on: {errors[0]}", flush=True)

    def _commit(self, name: str, shares: list[_Share], pause: float) -> None:
        files = [entry for share in shares for entry in share.files]
        size = sum(entry.size for entry in files)
        uploading = max(share.seconds for share in shares)
        meta = {"step": int(name.removeprefix("step-")), "ranks": self.ranks.size, "pause_seconds": round(pause, 3),
                "bytes": size, "upload_seconds": round(uploading, 3)}  # fmt: skip
        commit_part(self.store, self.job, name, files, meta)
        print(
            f"checkpoint {name} committed: {size / 1e6:.0f} MB, training paused {pause:.2f} s, stored at "
            f"{size / 1e6 / max(uploading, 1e-3):.0f} MB/s, {self.seconds:.1f} s in all",
            flush=True,
        )
        self._keep(self.round.training.checkpoints_kept)

    def _estimate(self) -> float:
        """Return the seconds that a checkpoint takes, started now."""
        if self.seconds is not None:
            return self.seconds
        tensors = list[torch.Tensor](p for p in self.round.model.parameters() if p.requires_grad)
        tensors += [t for states in self.round.optimizer.state.values() for t in states.values()]
        return sum(t.nbytes for t in tensors) / self.ranks.size / _ASSUMED_BYTES_PER_SECOND
