"""Saving and resuming a distributed run: every rank writes what it owns and reads what it needs.

Commit protocol: all ranks write into a staging directory and report size and SHA-256; rank 0 writes the manifest last
and renames the directory in one move. Whatever the moment of a crash, a directory named ``step_...`` is complete.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megagpt import __version__, compat
from megagpt.boxes import Box
from megagpt.checkpoint_format import (
    MANIFEST,
    WEIGHT,
    DamagedCheckpointError,
    Manifest,
    Reader,
    Slice,
    StoredFile,
    StoredTensor,
    TrainState,
    complete_steps,
    hash_file,
    read_manifest,
    step_directory,
    verify_file,
)
from megagpt.config import identity_differences
from megagpt.engine import Engine
from megagpt.model import GPT
from megagpt.utils import UserError, human_bytes, sync_directory, write_atomically

log = logging.getLogger(__name__)
Result = TypeVar("Result")

Written = tuple[str, StoredFile, dict[str, tuple[int, int, Box]]]  # a file, what it is, parameter -> slice

EXPECTED = (OSError, SafetensorError, UserError, DamagedCheckpointError)  # what files and disks may do to a run
DAMAGED = "damaged_"
LEFTOVERS = (".staging_*", ".deleting_*", ".latest.*.partial")
SPARE_SPACE = 1.05  # manifests and the file system's own records, beside the tensors


def save(engine: Engine, state: TrainState, run_directory: Path, data_fingerprint: str) -> Path:
    """Write one checkpoint and commit it; every rank must call it. Returns its directory.

    Raises UserError on every rank, with the previous checkpoints untouched, where any rank could not write.
    """
    checkpoints = run_directory / "checkpoints"
    final = step_directory(checkpoints, state.step)
    staging = checkpoints / f".staging_{final.name}"
    try:
        together(partial(_prepare, engine, staging))
        together(partial(_require_visible, engine, staging))
        written = together(partial(_write_files, engine, staging))
        by_rank = _gather(written)
        together(partial(_commit, engine, state, staging, final, data_fingerprint, by_rank))
    except UserError:
        if engine.mesh.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # a torn save must not fill the disk that was too small
        raise
    return final


def _prepare(engine: Engine, staging: Path) -> None:
    """Rank 0: an empty staging directory on a disk with room for it."""
    if engine.mesh.rank != 0:
        return
    staging.parent.mkdir(parents=True, exist_ok=True)
    needed, free = _needed_bytes(engine), shutil.disk_usage(staging.parent).free
    if needed > free:
        raise UserError(_no_room(engine, staging))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()


def _needed_bytes(engine: Engine) -> float:
    return SPARE_SPACE * 12 * engine.config.megagpt.model.num_parameters  # weight and two moments in fp32


def _no_room(engine: Engine, staging: Path) -> str:
    needed, free = human_bytes(_needed_bytes(engine)), human_bytes(shutil.disk_usage(staging.parent).free)
    steps = complete_steps(staging.parent)
    may_go = f" (the oldest checkpoint may go: {step_directory(staging.parent, steps[-1])})" if len(steps) > 1 else ""
    return (
        f"{staging.parent}: a checkpoint needs {needed}, the disk has {free}; earlier checkpoints are untouched: "
        f"free some space{may_go} and start again"
    )


def _require_visible(engine: Engine, staging: Path) -> None:
    if not staging.is_dir():
        raise UserError(
            f"{engine.mesh.name} does not see {staging}: the run directory must lie on a disk that all hosts share"
        )


def _write_files(engine: Engine, staging: Path) -> list[Written]:
    """One file a bucket; returns (name, what it is, parameter -> (start, numel, box)) of each."""
    written = []
    buckets = (bucket for bucket in engine.buckets() if bucket.owned_pieces)
    for index, bucket in enumerate(buckets):
        name = f"rank_{engine.mesh.rank:05d}_{index:03d}.safetensors"
        with bucket.resident(False) as (master, optimizer_state):
            tensors = dict(_tensors(bucket, master, optimizer_state))
        _require_finite(tensors)
        try:
            save_file(tensors, staging / name)
            with (staging / name).open("rb") as file:
                os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{staging / name}: {error}\n{_no_room(engine, staging)}") from error
        entry = StoredFile((staging / name).stat().st_size, hash_file(staging / name))
        pieces = {piece.name: (piece.start, piece.numel, engine.boxes[piece.name]) for piece in bucket.owned_pieces}
        written.append((name, entry, pieces))
    return written


def _require_finite(tensors: dict[str, Tensor]) -> None:
    """A spoilt checkpoint would in time push out the last sound one."""
    spoilt = next((name for name, values in tensors.items() if not values.isfinite().all()), None)
    if spoilt is not None:
        raise UserError(
            f"{spoilt} is not finite, so nothing was saved; earlier checkpoints are untouched: "
            f"lower optimizer.params.lr and start again from the newest"
        )


def _gather(written: list[Written]) -> list[Written]:
    """What all ranks wrote, on rank 0; nothing elsewhere."""
    is_rank0 = dist.get_rank() == 0
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(written, by_rank if is_rank0 else None)
    return [entry for of_rank in by_rank for entry in of_rank] if is_rank0 else []


def _tensors(bucket: compat.Bucket, master: Tensor, optimizer_state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for kind, flat in _kinds(master, optimizer_state):
        for piece in bucket.owned_pieces:
            run = flat.view(-1)[piece.offset : piece.offset + piece.numel]
            yield f"{kind}/{piece.name}", run.to("cpu", torch.float32).clone()


def _kinds(master: Tensor, optimizer_state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Weights and moments by their name in a file; moments that Adam has not made yet are zero."""
    moments = [(name, optimizer_state.get(name)) for name in compat.MOMENTS]
    return [(WEIGHT, master), *((name, torch.zeros_like(master) if m is None else m) for name, m in moments)]


def _commit(
    engine: Engine, state: TrainState, staging: Path, final: Path, data_fingerprint: str, entries: list[Written]
) -> None:
    """Rank 0: the manifest last, then one rename; an older directory of the same step gives way."""
    if engine.mesh.rank != 0:
        return
    write_atomically(staging / MANIFEST, _manifest(engine, state, data_fingerprint, entries).to_json())
    sync_directory(staging)
    if final.exists():
        remove(final)
    staging.rename(final)
    sync_directory(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")
    _retire(final.parent, engine.config.megagpt.checkpoint.keep)


def _manifest(engine: Engine, state: TrainState, data_fingerprint: str, entries: list[Written]) -> Manifest:
    shapes = _shapes(engine)
    slices: dict[str, list[Slice]] = {name: [] for name in shapes}
    for file, _, pieces in entries:
        for name, place in pieces.items():
            slices[name].append(Slice(file, *place))
    scheduler = engine.deepspeed.lr_scheduler
    return Manifest(
        state=state,
        identity=engine.config.identity(),
        data_fingerprint=data_fingerprint,
        topology=_topology(engine),
        scheduler=scheduler.state_dict() if scheduler else {},
        learning_rates=[group["lr"] for group in compat.base_optimizer(engine.deepspeed).param_groups],
        loss_scaler=compat.loss_scaler_state(engine.deepspeed),
        tensors={name: StoredTensor(shapes[name], tuple(slices[name])) for name in shapes},
        files={file: entry for file, entry, _ in entries},
        versions={"megagpt": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__},
    )


def _topology(engine: Engine) -> dict[str, Any]:
    """How the writer was laid out: for the reader's log only, a resume does not depend on it."""
    mesh, zero = engine.mesh, engine.config.zero_optimization
    return {
        "pipeline": mesh.pipeline_size,
        "data": mesh.data_size,
        "tensor": mesh.tensor_size,
        "zero_stage": zero.stage,
        "optimizer_device": zero.optimizer_device,
        "parameter_device": zero.parameter_device,
    }


def _retire(checkpoints: Path, keep: int) -> None:
    for step in complete_steps(checkpoints)[keep:]:
        remove(step_directory(checkpoints, step))


def remove(directory: Path) -> None:
    """Delete a checkpoint so that no moment shows a part of it under its name."""
    aside = directory.with_name(f".deleting_{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)
    shutil.rmtree(aside)


def collect_leftovers(checkpoints: Path) -> list[str]:
    """Remove what a killed save or deletion left; returns the names."""
    leftovers = [path for pattern in LEFTOVERS for path in checkpoints.glob(pattern)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


def resume(engine: Engine, run_directory: Path) -> tuple[TrainState, Manifest, list[str]] | None:
    """Load the newest checkpoint that every rank finds sound; every rank must call it.

    Returns the state, its manifest and what is wrong with newer ones, which are set aside under another name; None
    where the run has no checkpoint yet. Raises UserError where it has some and none is sound (a run never silently
    starts again from zero), and where the newest sound one is of another run.
    """
    checkpoints = run_directory / "checkpoints"
    steps = _from_rank0(partial(complete_steps, checkpoints))
    faults: list[str] = []
    for position, step in enumerate(steps):
        directory = step_directory(checkpoints, step)
        fault = _fault(partial(_verify_share, engine, directory))
        if fault is None:
            together(partial(_require_same_run, engine, directory))
            fault = _fault(partial(_fill_buckets, engine, directory))
        if fault is None:
            manifest = read_manifest(directory)
            _adopt(engine, manifest)
            together(partial(_set_aside, engine, checkpoints, steps[:position]))
            return manifest.state, manifest, faults
        faults.append(fault)
    if faults:
        listed = "\n  ".join(faults)
        raise UserError(
            f"{run_directory}: every checkpoint is damaged:\n  {listed}\n"
            f"restore one from a backup, or start afresh in another directory with --run_dir"
        )
    return None


def _set_aside(engine: Engine, checkpoints: Path, damaged_steps: list[int]) -> None:
    """Rank 0: damaged newer checkpoints would else count among those that are kept, and push out sound ones."""
    if engine.mesh.rank != 0:
        return
    for step in damaged_steps:
        directory = step_directory(checkpoints, step)
        aside = directory.with_name(f"{DAMAGED}{directory.name}")
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)


def _verify_share(engine: Engine, directory: Path) -> None:
    """The manifest, and every world-size-th file, so that the ranks together hash each file once."""
    files = read_manifest(directory).files
    for name in sorted(files)[engine.mesh.rank :: engine.mesh.world_size]:
        verify_file(directory, name, files[name])


def _require_same_run(engine: Engine, directory: Path) -> None:
    """A checkpoint copied from another run may be sound, and even fit."""
    differences = identity_differences(_as_read(read_manifest(directory).identity), _as_read(engine.config.identity()))
    if differences:
        listed = "\n  ".join(differences)
        raise UserError(f"{directory}: saved by another run:\n  {listed}\nremove it, or choose another --run_dir")


def _as_read(identity: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: JSON makes lists of tuples."""
    as_read: dict[str, Any] = json.loads(json.dumps(identity))
    return as_read


def _require_shapes(engine: Engine, manifest: Manifest, directory: Path) -> None:
    """Pieces are read by their place in a flattened parameter: of another shape they would be read without a word."""
    expected, stored = _shapes(engine), {name: tensor.shape for name, tensor in manifest.tensors.items()}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise DamagedCheckpointError(
                f"{directory.name}/{MANIFEST}: {name} has shape {stored.get(name)}, the model's is {expected.get(name)}"
            )


def _shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model, whatever this rank holds of it."""
    with torch.device("meta"):
        whole = GPT(engine.config.megagpt.model)
    return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}


def _fill_buckets(engine: Engine, directory: Path) -> None:
    """Give this rank's buckets what the checkpoint holds; no collective call, so that a rank may fail alone."""
    reader = Reader(directory, read_manifest(directory))
    _require_shapes(engine, reader.manifest, directory)
    for bucket in engine.buckets():
        with bucket.resident(True) as (master, optimizer_state):
            _fill(bucket, engine.boxes, master, optimizer_state, reader)
            compat.set_adam_step(engine.deepspeed, optimizer_state, reader.manifest.state.applied_steps)


def _adopt(engine: Engine, manifest: Manifest) -> None:
    """After the buckets: the model's parameters, learning rates and counters; every rank must call it."""
    compat.publish_master_weights(engine.deepspeed)
    compat.replay_bias_correction(engine.deepspeed, manifest.state.applied_steps)
    if engine.deepspeed.lr_scheduler:
        engine.deepspeed.lr_scheduler.load_state_dict(manifest.scheduler)
    groups = compat.base_optimizer(engine.deepspeed).param_groups
    for group, learning_rate in zip(groups, manifest.learning_rates, strict=True):
        group["lr"] = learning_rate
    compat.set_loss_scaler_state(engine.deepspeed, manifest.loss_scaler)
    compat.set_counters(engine.deepspeed, steps=manifest.state.step, skipped=manifest.state.skipped_steps)


def _fill(
    bucket: compat.Bucket, held: dict[str, Box], master: Tensor, optimizer_state: dict[str, Any], reader: Reader
) -> None:
    for moment in compat.MOMENTS:
        optimizer_state.setdefault(moment, torch.zeros_like(master))
    for kind, flat in _kinds(master, optimizer_state):
        for piece in bucket.pieces:
            run = reader.read(kind, piece.name, held[piece.name], piece.start, piece.numel)
            flat.view(-1)[piece.offset : piece.offset + piece.numel].copy_(run)


def together(work: Callable[[], Result]) -> Result:
    """Run ``work``, which makes no collective call, on every rank; where it fails on any, raise on all.

    Raises UserError with the first failing rank's reason. A rank whose error is no bad input raises that error itself.
    """
    result, error, fault = _attempt(work)
    if error is not None and not isinstance(error, EXPECTED):
        raise error
    if fault is not None:
        raise UserError(fault) from error
    return result  # type: ignore[return-value]  # no rank failed, so this one has its result


def _fault(work: Callable[[], None]) -> str | None:
    """Run ``work`` on every rank; None where all succeed, else what the first failing rank says."""
    _, error, fault = _attempt(work)
    if error is not None and not isinstance(error, EXPECTED):
        raise error
    return fault


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, Exception | None, str | None]:
    """This rank's result and error, and the first failing rank's reason; whatever happens, no rank waits for ever."""
    result: Result | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # of any kind: the others wait for this rank's word; the callers sort them out
        error = caught
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, None if error is None else str(error) or repr(error))
    return result, error, next((f"{fault} (rank {rank})" for rank, fault in enumerate(faults) if fault), None)


def _from_rank0(work: Callable[[], Result]) -> Result:
    """Rank 0's answer, on every rank: file systems may show different things to different hosts."""
    box: list[Any] = [together(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box, src=0)
    return box[0]
