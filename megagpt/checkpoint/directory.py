"""The directory `checkpoints`: room for one more, and which old ones may go."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from megagpt.checkpoint.format import (
    DamagedCheckpointError,
    OtherFormatError,
    complete_steps,
    read_manifest,
    step_directory,
)
from megagpt.common.atomic_directory import delete, move_aside
from megagpt.utils import MIB, UserError, human_bytes, write_atomically

DAMAGED = "damaged_"
LEFTOVERS = (".staging_*", ".deleting_*", ".latest.*.partial", "step_*/.*.partial")
SPARE_SHARE, MOST_SPARE_BYTES = (
    0.05,
    256 * MIB,
)  # manifest and the file system's own records, beside the tensors


def prepare_staging(staging: Path, tensor_bytes: int) -> None:
    """An empty staging directory on a disk with room for so many bytes of tensors; raises
    UserError.
    """
    staging.parent.mkdir(parents=True, exist_ok=True)
    delete(staging)
    if needed_bytes(tensor_bytes) > shutil.disk_usage(staging.parent).free:
        raise UserError(no_room(staging.parent, tensor_bytes))
    staging.mkdir()


def needed_bytes(tensor_bytes: int) -> float:
    """What a checkpoint adds to the disk before any older one goes."""
    return tensor_bytes + min(SPARE_SHARE * tensor_bytes, MOST_SPARE_BYTES)


def no_room(checkpoints: Path, tensor_bytes: int) -> str:
    """What to do about it."""
    steps = complete_steps(checkpoints)
    may_go = (
        f" (the oldest checkpoint may go: {step_directory(checkpoints, steps[-1])})"
        if len(steps) > 1
        else ""
    )
    return (
        f"{checkpoints}: {need_and_have(checkpoints, tensor_bytes)}; earlier checkpoints are "
        f"untouched: free some space{may_go} and start again"
    )


def need_and_have(checkpoints: Path, tensor_bytes: int) -> str:
    """Of the disk, in words."""
    needed, free = (
        human_bytes(needed_bytes(tensor_bytes)),
        human_bytes(shutil.disk_usage(checkpoints).free),
    )
    return f"a checkpoint needs {needed}, the disk has {free}"


def require_visible(directory: Path, rank: str) -> None:
    """Raise UserError unless this rank sees what rank 0 has made."""
    if not directory.is_dir():
        raise UserError(
            f"{rank} does not see {directory}: the run directory must lie on a disk that all "
            f"hosts share"
        )


def name_latest(final: Path) -> None:
    """For people: which checkpoint is the newest."""
    write_atomically(final.parent / "latest", final.name + "\n")


def retire(
    checkpoints: Path, *, keep: int, milestone_interval_steps: int, last_good_step: int | None
) -> None:
    """Remove checkpoints older than the ``keep`` newest ones, but no milestone and not
    ``last_good_step``.

    That one is known to load, since this process has loaded it. Directories without a sound
    manifest count for nothing: they push no other out.
    """
    steps = complete_steps(checkpoints)
    newest = [step for step in steps if _has_manifest(step_directory(checkpoints, step))][:keep]
    for step in steps:
        milestone = milestone_interval_steps > 0 and step % milestone_interval_steps == 0
        if step < min(newest) and not milestone and step != last_good_step:
            remove(step_directory(checkpoints, step))


def _has_manifest(directory: Path) -> bool:
    try:
        read_manifest(directory)
    except (DamagedCheckpointError, OtherFormatError):
        return False
    return True


def remove(directory: Path) -> None:
    """Delete a checkpoint so that no moment shows a part of it under its name."""
    delete(move_aside(directory))


def set_aside(checkpoints: Path, damaged_steps: Iterable[int]) -> None:
    """Damaged checkpoints would else count among those that are kept, and push out sound ones."""
    for step in damaged_steps:
        directory = step_directory(checkpoints, step)
        aside = directory.with_name(f"{DAMAGED}{directory.name}")
        delete(aside)
        directory.rename(aside)


def collect_leftovers(checkpoints: Path) -> list[str]:
    """Remove what a killed save or deletion left; returns the names."""
    leftovers = [
        path
        for pattern in LEFTOVERS
        for path in checkpoints.glob(pattern)
        if not path.parent.is_symlink()
    ]
    for path in leftovers:
        delete(path)
    return [path.name for path in leftovers]
