"""Resuming a distributed run on any mesh: all ranks agree on one checkpoint.

Each rank reads only the elements that it needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megagpt.checkpoint import directory as directories
from megagpt.checkpoint.collective import RankFailure, attempt, from_rank0, together
from megagpt.checkpoint.format import (
    MANIFEST,
    DamagedCheckpointError,
    GuardMemory,
    Manifest,
    StoredFile,
    TrainState,
    complete_steps,
    read_manifest,
    require_no_other_files,
    step_directory,
    verify_file,
)
from megagpt.checkpoint.reader import Reader
from megagpt.checkpoint.writer import kinds, parameter_shapes
from megagpt.common.background import in_threads
from megagpt.config import identity_changes, identity_line
from megagpt.parallel import compat
from megagpt.parallel.engine import Engine
from megagpt.schema.errors import shown
from megagpt.utils import UserError

# The sizes of the ranks' files differ a little; below this ratio each rank hashes its own.
SLACK = 1.02
DECIDES_LEARNING_RATE = ("optimizer.params.lr", "scheduler.")
DECIDE_SAMPLES = {"megagpt.data.seed", "megagpt.model.sequence_length"}


@dataclass(frozen=True)
class Resumed:
    """The loaded checkpoint, and the damage of newer ones, which were set aside.

    ``steps_found`` are all steps that the run had, newest first. ``bytes_read`` counts the tensor
    bytes read on this rank.
    """

    directory: Path
    manifest: Manifest
    passed_over: list[str]
    steps_found: list[int]
    bytes_read: int
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    data_restart: bool = False

    @property
    def state(self) -> TrainState:
        """The state to continue from: with other samples, from the first of them.

        The guard then forgets the losses on the old data.
        """
        stored = self.manifest.state
        return replace(stored, cursor=0, guard=GuardMemory()) if self.data_restart else stored

    @property
    def differs(self) -> bool:
        """Whether the run is no longer the one that saved it."""
        return bool(self.changed) or self.data_restart

    def describe_changes(self) -> list[str]:
        """Return a line for each identity key whose value is not that of the checkpoint."""
        lines = [
            f"{key} {shown(before)} -> {shown(after)}"
            for key, (before, after) in self.changed.items()
        ]
        if any(key.startswith("optimizer.") for key in self.changed):
            lines.append("Adam's moments are kept")
        if self.data_restart:
            lines.append("the data start from their first sample")
        return lines

    def describe(self, *, provable: bool) -> str:
        """Return the text for the screen.

        It says what was found, what was passed over and why, and what comes next.
        """
        found = ", ".join(map(str, reversed(self.steps_found)))
        skipped = [
            f"  passed over {fault}; kept as {directories.DAMAGED}step_..."
            for fault in self.passed_over
        ]
        written_by = ", ".join(f"{key} {value}" for key, value in self.manifest.topology.items())
        why_not = "the run changed" if self.differs else "it was not recorded"
        proof = (
            "will be compared with the recorded one"
            if provable
            else f"cannot be compared: {why_not}"
        )
        return "\n".join(
            [
                f"checkpoints of steps {found} in {self.directory.parent}",
                *skipped,
                *(f"  changed: {line}" for line in self.describe_changes()),
                f"resuming at step {self.state.step}, sample {self.state.cursor}, written by "
                f"{written_by}; step {self.state.step + 1} {proof}",
            ]
        )


def resume(
    engine: Engine,
    run_directory: Path,
    known: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    data_fingerprint: str | None = None,
) -> Resumed | None:
    """Load the newest checkpoint that every rank finds sound; every rank must call it.

    ``known`` are values of identity keys that a checkpoint may have besides the run's own.
    ``data_fingerprint`` is that of the run's data, None if they are the checkpoint's. Return None
    if the run has no checkpoint yet. Raise UserError if all its checkpoints are damaged (a run
    never silently restarts from zero), and if the newest sound one belongs to another run or has
    another format.
    """
    checkpoints = run_directory / "checkpoints"
    steps = from_rank0(partial(complete_steps, checkpoints))
    together(partial(_require_shared, engine, checkpoints, steps))
    faults: list[str] = []
    for position, step in enumerate(steps):
        directory = step_directory(checkpoints, step)
        loaded = _load(engine, directory, known)
        if not isinstance(loaded, RankFailure):
            manifest = loaded.manifest
            changed = identity_changes(manifest.identity, engine.config.identity())
            other_data = data_fingerprint not in (None, manifest.data_fingerprint)
            _adopt(engine, manifest, changed)
            together(partial(_set_aside, engine, checkpoints, steps[:position]))
            return Resumed(
                directory,
                manifest,
                faults,
                steps,
                loaded.bytes_read,
                changed,
                data_restart=other_data or not DECIDE_SAMPLES.isdisjoint(changed),
            )
        faults.append(loaded.reason)
    if faults:
        listed = "\n  ".join(faults)
        raise UserError(
            f"{run_directory}: every checkpoint is damaged:\n  {listed}\n"
            f"restore one from a backup, or start again with another --run_dir"
        )
    return None


def _require_shared(engine: Engine, checkpoints: Path, steps: list[int]) -> None:
    """Raise UserError if this rank does not see the checkpoints that rank 0 sees, or the reverse.

    A checkpoint on another host's disk is neither damaged nor absent.
    """
    if steps:
        directories.require_visible(step_directory(checkpoints, steps[0]), engine.mesh.name)
    elif others := complete_steps(checkpoints):
        raise UserError(
            f"{checkpoints}: {engine.mesh.name} sees checkpoints of steps {others}, rank 0 sees "
            "none; put the run directory on a disk that all hosts share (--run_dir)"
        )


def _load(
    engine: Engine, directory: Path, known: Mapping[str, Sequence[Any]]
) -> Reader | RankFailure:
    """Verify one checkpoint and fill the buckets from it on all ranks; return the damage if any.

    Raise UserError if it could not be read: it may be sound, so it is neither skipped nor set
    aside.
    """
    reader = _unless_undamaged(attempt(partial(_verified, engine, directory)))
    if isinstance(reader, RankFailure):
        return reader
    together(partial(_require_same_run, engine, reader, known))
    return _unless_undamaged(attempt(partial(_fill_buckets, engine, reader)))


def _unless_undamaged(found: Reader | RankFailure) -> Reader | RankFailure:
    """Raise UserError on a failure that is not damage."""
    if isinstance(found, RankFailure) and not found.damage:
        raise UserError(found.reason)
    return found


@contextmanager
def _from_disk(directory: Path) -> Iterator[None]:
    """Turn an OSError into a UserError: a disk error does not show that a checkpoint is damaged."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be read ({error}); start again when its disk works"
        ) from error


def _set_aside(engine: Engine, checkpoints: Path, damaged_steps: list[int]) -> None:
    if engine.mesh.rank == 0:
        directories.set_aside(checkpoints, damaged_steps)


def _verified(engine: Engine, directory: Path) -> Reader:
    """Return a reader after checking this rank's share of the files.

    Together the ranks hash each file once.
    """
    with _from_disk(directory):
        manifest = read_manifest(directory)
        require_no_other_files(directory, manifest)
        share = hashing_shares(manifest.files, engine.mesh.world_size)[engine.mesh.rank]
        in_threads(lambda name: verify_file(directory, name, manifest.files[name]), share)
        return Reader(directory, manifest)


def hashing_shares(files: Mapping[str, StoredFile], ranks: int) -> list[list[str]]:
    """Return the files that each rank hashes, about equal numbers of bytes.

    Each rank first takes the files written by the rank of its number, which it also reads if the
    mesh is unchanged. Files beyond a fair share, the largest first, go to the rank with the least.
    """
    fair = SLACK * sum(file.bytes for file in files.values()) / ranks
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    too_much = []
    for name in sorted(files):
        rank = _writer(name) % ranks
        if loads[rank] + files[name].bytes > fair:
            too_much.append(name)
        else:
            shares[rank].append(name)
            loads[rank] += files[name].bytes
    for name in sorted(too_much, key=lambda name: -files[name].bytes):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += files[name].bytes
    return shares


def _writer(file: str) -> int:
    """Return the rank in a name like rank_00003_000.safetensors."""
    return int(file.split("_")[1])


def _require_same_run(engine: Engine, reader: Reader, known: Mapping[str, Sequence[Any]]) -> None:
    """Raise UserError if another run saved the checkpoint.

    A checkpoint copied from another run may be sound, and may even fit.
    """
    changed = identity_changes(reader.manifest.identity, engine.config.identity())
    foreign = {key: pair for key, pair in changed.items() if pair[0] not in known.get(key, ())}
    if foreign:
        listed = "\n  ".join(identity_line(key, *pair) for key, pair in foreign.items())
        raise UserError(
            f"{reader.directory}: another run saved it:\n  {listed}\nremove it, or choose another "
            f"--run_dir"
        )
    if reader.manifest.base != engine.base_sha256:
        raise UserError(
            f"{reader.directory}: its adapters are of another base (found weights of sha256 "
            f"{engine.base_sha256}, need {reader.manifest.base}); name theirs: --set "
            "megagpt.training.lora.base=runs/NAME"
        )


def _fill_buckets(engine: Engine, reader: Reader) -> Reader:
    """Load this rank's buckets from the checkpoint.

    It makes no collective call, so that a rank may fail alone.
    """
    with _from_disk(reader.directory):
        return _filled_buckets(engine, reader)


def _filled_buckets(engine: Engine, reader: Reader) -> Reader:
    _require_shapes(engine, reader.manifest, reader.directory)
    for bucket in engine.buckets():
        with bucket.resident(True) as (master, optimizer_state):
            for moment in compat.MOMENTS:
                if moment not in optimizer_state:
                    optimizer_state[moment] = torch.zeros_like(master)
            for kind, flat in kinds(master, optimizer_state).items():
                for piece in bucket.pieces:
                    place = flat[piece.offset : piece.offset + piece.numel]
                    run = place if place.device.type == "cpu" else torch.empty(place.numel())
                    reader.read_into(run, kind, piece.name, engine.boxes[piece.name], piece.start)
                    if run is not place:
                        place.copy_(run)
            compat.set_adam_step(
                engine.deepspeed, optimizer_state, reader.manifest.state.applied_steps
            )
    return reader


def _require_shapes(engine: Engine, manifest: Manifest, directory: Path) -> None:
    """Raise DamagedCheckpointError if shapes differ from the model's.

    Pieces are read by their place in a flattened parameter, so another shape would be read
    silently.
    """
    expected = parameter_shapes(engine)
    stored = {name: tensor.shape for name, tensor in manifest.tensors.items()}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise DamagedCheckpointError(
                f"{directory.name}/{MANIFEST}: {name} has the wrong shape (found "
                f"{stored.get(name)}, need {expected.get(name)})"
            )


def _adopt(engine: Engine, manifest: Manifest, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Set the model's parameters, learning rates and counters from the loaded buckets and manifest.

    The rest of the optimizer (betas, weight decay) is the run's. Every rank must call it.
    """
    compat.publish_master_weights(engine.deepspeed)
    compat.replay_bias_correction(engine.deepspeed, manifest.state.applied_steps)
    if any(key.startswith(DECIDES_LEARNING_RATE) for key in changed):
        learning_rates = _learning_rates_of_its_own(engine, manifest.state.applied_steps)
    else:
        learning_rates = manifest.learning_rates
        if engine.deepspeed.lr_scheduler:
            engine.deepspeed.lr_scheduler.load_state_dict(manifest.scheduler)
    groups = compat.base_optimizer(engine.deepspeed).param_groups
    for group, learning_rate in zip(groups, learning_rates, strict=True):
        group["lr"] = learning_rate
    compat.set_loss_scaler_state(engine.deepspeed, manifest.loss_scaler)
    compat.set_counters(
        engine.deepspeed, steps=manifest.state.step, skipped=manifest.state.skipped_steps
    )


def _learning_rates_of_its_own(engine: Engine, applied_steps: int) -> list[float]:
    """Return each parameter group's learning rate after so many updates, by the run's schedule.

    DeepSpeed's schedules count updates from -1, and set the rates of the next one in ``step``.
    """
    scheduler = engine.deepspeed.lr_scheduler
    if scheduler is None:
        groups = compat.base_optimizer(engine.deepspeed).param_groups
        return [engine.config.optimizer.params.lr] * len(groups)
    scheduler.load_state_dict({"last_batch_iteration": applied_steps - 1})
    return [*scheduler.get_lr()]
