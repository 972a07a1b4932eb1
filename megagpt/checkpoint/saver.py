"""Saving a distributed run: every rank writes what it owns, and all commit together.

Commit protocol: all ranks write into a staging directory and report size and SHA-256; rank 0 writes
the manifest last and renames the directory in one move. A directory named ``step_...`` is therefore
complete, whenever a crash happens.

In the background, the loop waits only while each rank copies its state to host memory. A thread of
low priority writes the copy and makes no collective call. After each step the main threads check
together whether all ranks have written, then let a thread of rank 0 commit, and check again. Each
check is an all-reduce of one number, on a group of its own.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagpt.checkpoint import directory as directories
from megagpt.checkpoint.collective import everyones, on_rank0, together
from megagpt.checkpoint.execution import VERSIONS, topology
from megagpt.checkpoint.format import (
    MANIFEST,
    Manifest,
    Slice,
    StoredFile,
    StoredTensor,
    TrainState,
    step_directory,
)
from megagpt.checkpoint.resume_proof import NextStep
from megagpt.checkpoint.writer import (
    PlannedFile,
    Snapshot,
    parameter_shapes,
    plan_files,
    write_files,
    write_live,
)
from megagpt.common.atomic_directory import AtomicDirectory
from megagpt.common.background import Job
from megagpt.parallel import compat
from megagpt.parallel.engine import Engine, collective_timeout
from megagpt.utils import UserError, write_atomically

log = logging.getLogger(__name__)

Plan = list[list[PlannedFile]]
# A rank's files, and (parameter, slice) for each slice in them.
Report = tuple[dict[str, StoredFile], list[tuple[str, Slice]]]


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, with ``bytes`` of tensors over all ranks.

    ``duration_s`` is the time until the commit was seen. The loop stood still for ``blocked_s`` of
    it, after waiting ``waited_s`` for the previous save.
    """

    step: int
    path: Path
    bytes: int
    duration_s: float
    blocked_s: float
    waited_s: float


@dataclass
class _Save:
    """A save in progress.

    ``job`` first writes this rank's files, then, when ``committing``, does rank 0's commit.
    """

    state: TrainState
    final: Path
    manifest: Manifest  # tensors and files are still empty
    plan: Plan
    waited_s: float
    started: float = field(default_factory=time.perf_counter)
    bytes: int = 0
    blocked_s: float = 0.0
    job: Job[Any] = field(init=False)
    committing: bool = False
    next_step: NextStep | None = None

    @property
    def place(self) -> AtomicDirectory:
        return AtomicDirectory.beside(self.final)

    @property
    def staging(self) -> Path:
        return self.place.staging


class Saver:
    """Saves one run, one checkpoint at a time.

    Every rank must call each method, at the same step. If a rank cannot write, the method that
    finds out raises UserError on all ranks; earlier checkpoints are untouched.
    """

    def __init__(self, engine: Engine, run_directory: Path, data_fingerprint: str) -> None:
        self.engine = engine
        self.data_fingerprint = data_fingerprint
        self.checkpoints = run_directory / "checkpoints"
        self.settings = engine.config.megagpt.checkpoint
        self.group = self._own_group() if self.settings.asynchronous else None
        self._shapes = parameter_shapes(engine)
        self._snapshot = Snapshot()
        self._pending: _Save | None = None
        self._last_good: TrainState | None = None
        self._loaded_step: int | None = None
        self._unprovable: TrainState | None = None

    def _own_group(self) -> dist.ProcessGroup:
        return dist.new_group(backend="gloo", timeout=collective_timeout(self.engine.config))

    def close(self) -> None:
        """Destroy the group of background saves; every rank must call it."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def trust(self, state: TrainState) -> None:
        """Record that the checkpoint of this state is complete."""
        self._last_good = state

    def goes_on_from(self, state: TrainState, *, changed: bool = False) -> None:
        """Record that this process loaded this state's checkpoint, so that it is never retired.

        If the run has ``changed`` since, its next step proves nothing about the checkpoint.
        """
        self.trust(state)
        self._loaded_step = state.step
        self._unprovable = state if changed else None

    def holds(self, state: TrainState) -> bool:
        """Return whether this state is saved or being saved."""
        return state in (self._last_good, self._pending.state if self._pending else None)

    def save(self, state: TrainState) -> list[Saved]:
        """Save the present state, described by ``state``, after waiting for any save in progress.

        Return the saves committed meanwhile: the earlier one, and this one unless it continues in
        the background.
        """
        asked = time.perf_counter()
        earlier = self.finish()
        save = self._planned(state, waited_s=time.perf_counter() - asked if earlier else 0.0)
        with self._abandoned_on_failure(save):
            together(partial(self._prepare, save))
            together(partial(directories.require_visible, save.staging, self.engine.mesh.name))
            if self.settings.asynchronous:
                copy = together(partial(self._snapshot.take, self.engine))
                work = partial(write_files, save.staging, save.plan, copy)
            else:
                work = partial(write_live, save.staging, save.plan, self.engine)
        save.job = Job(partial(self._write, save, work), in_background=self.settings.asynchronous)
        save.blocked_s = time.perf_counter() - save.started
        self._pending = save
        return earlier if self.settings.asynchronous else self.finish()

    def poll(self) -> list[Saved]:
        """Advance a background save if all ranks are ready for it, without waiting."""
        if self._pending is None or not self._all_done(self._pending):
            return []
        return self._advance(self._pending, in_background=True)

    def finish(self) -> list[Saved]:
        """Wait for a background save and commit it."""
        committed: list[Saved] = []
        while self._pending is not None:
            committed += self._advance(self._pending, in_background=False)
        return committed

    def follow(self, record: NextStep) -> None:
        """Keep a step's result beside the checkpoint of the state that it began with, if any."""
        if self.engine.mesh.rank != 0:
            return
        save = self._pending
        good = self._last_good
        if save is not None and record.follows(save.state):
            save.next_step = record
        elif good is not None and good != self._unprovable and record.follows(good):
            record.write_once(step_directory(self.checkpoints, good.step))

    def _planned(self, state: TrainState, waited_s: float) -> _Save:
        final = step_directory(self.checkpoints, state.step)
        save = _Save(state, final, self._manifest(state), plan_files(self.engine), waited_s)
        sizes = everyones((state.step, sum(file.bytes for files in save.plan for file in files)))
        if len({step for step, _ in sizes}) > 1:
            raise RuntimeError(f"ranks save different steps: {[step for step, _ in sizes]}")
        save.bytes = sum(size for _, size in sizes)
        return save

    def _manifest(self, state: TrainState) -> Manifest:
        """Return the manifest of the present state, without the places of the tensors."""
        engine = self.engine.deepspeed
        return Manifest(
            state=state,
            identity=self.engine.config.identity(),
            data_fingerprint=self.data_fingerprint,
            topology=topology(self.engine),
            scheduler=engine.lr_scheduler.state_dict() if engine.lr_scheduler else {},
            learning_rates=[group["lr"] for group in compat.base_optimizer(engine).param_groups],
            loss_scaler=compat.loss_scaler_state(engine),
            tensors={name: StoredTensor(shape, ()) for name, shape in self._shapes.items()},
            files={},
            versions=VERSIONS,
            base=self.engine.base_sha256,
        )

    def _prepare(self, save: _Save) -> None:
        if self.engine.mesh.rank == 0:
            directories.prepare_staging(save.staging, save.bytes)

    def _write(self, save: _Save, work: Callable[[], dict[str, StoredFile]]) -> Report:
        """Write this rank's files, possibly in a thread; return them with their slices."""
        with self._disk_named(save):
            files = work()
        slices = [
            part
            for of_bucket in save.plan
            for file in of_bucket
            for part in file.slices(self.engine.boxes)
        ]
        return files, slices

    def _all_done(self, save: _Save) -> bool:
        done = torch.tensor(int(save.job.done))
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.group)
        return bool(done)

    def _advance(self, save: _Save, *, in_background: bool) -> list[Saved]:
        """Wait for this rank's job; when all are done, start the commit or report it as done."""
        with self._abandoned_on_failure(save):
            report = together(save.job.result, self.group)
            if not save.committing:
                reports = on_rank0(report, self.group)
                save.committing = True
                save.job = Job(partial(self._commit, save, reports), in_background=in_background)
                return []
        self._pending = None
        self.trust(save.state)
        duration_s = time.perf_counter() - save.started
        blocked_s = save.blocked_s if self.settings.asynchronous else duration_s
        return [
            Saved(save.state.step, save.final, save.bytes, duration_s, blocked_s, save.waited_s)
        ]

    def _commit(self, save: _Save, reports: list[Report]) -> None:
        """Commit on rank 0, possibly in a thread: write the manifest last, then rename once."""
        if not reports:
            return
        if save.next_step is not None:
            save.next_step.write_once(save.staging)
        with self._disk_named(save):
            write_atomically(save.staging / MANIFEST, _completed(save.manifest, reports).to_json())
            save.place.commit()
        with self._no_more_than_warned(save):
            directories.name_latest(save.final)
        with self._no_more_than_warned(save):
            directories.retire(
                self.checkpoints,
                keep=self.settings.keep,
                milestone_interval_steps=self.settings.milestone_interval_steps,
                last_good_step=self._loaded_step,
            )

    @contextmanager
    def _disk_named(self, save: _Save) -> Iterator[None]:
        """Turn an OSError into a UserError that names the space needed and the space free."""
        try:
            yield
        except OSError as error:
            room = directories.no_room(self.checkpoints, save.bytes)
            raise UserError(
                f"{error.filename or save.staging}: {error.strerror}\n{room}"
            ) from error

    @contextmanager
    def _no_more_than_warned(self, save: _Save) -> Iterator[None]:
        """Log an OSError as a warning: the new checkpoint is safe, so the run need not end."""
        try:
            yield
        except OSError as error:
            room = directories.need_and_have(self.checkpoints, save.bytes)
            log.warning("%s is complete, but: %s (%s)", save.final, error, room)

    @contextmanager
    def _abandoned_on_failure(self, save: _Save) -> Iterator[None]:
        try:
            yield
        except UserError:
            self._pending = None
            if self.engine.mesh.rank == 0:
                # A partial save must not fill a disk that was already too small.
                shutil.rmtree(save.staging, ignore_errors=True)
            raise


def _completed(manifest: Manifest, reports: list[Report]) -> Manifest:
    """Return the manifest with what all ranks wrote."""
    slices: dict[str, list[Slice]] = {name: [] for name in manifest.tensors}
    for _, parts in reports:
        for name, part in parts:
            slices[name].append(part)
    tensors = {
        name: replace(tensor, slices=tuple(slices[name]))
        for name, tensor in manifest.tensors.items()
    }
    files = {name: entry for of_rank, _ in reports for name, entry in of_rank.items()}
    return replace(manifest, tensors=tensors, files=files)
