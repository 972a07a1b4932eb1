"""The directory `checkpoints`: room for a new one, and removal of old ones."""

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
# Room for the manifest and the file system's own records, in addition to the tensors.
SPARE_SHARE = 0.05
MOST_SPARE_BYTES = 256 * MIB


def prepare_staging(staging: Path, tensor_bytes: int) -> None:
    """Create an empty staging directory; raise UserError if the disk lacks room for the tensors."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    delete(staging)
    if needed_bytes(tensor_bytes) > shutil.disk_usage(staging.parent).free:
        raise UserError(no_room(staging.parent, tensor_bytes))
    staging.mkdir()


def needed_bytes(tensor_bytes: int) -> float:
    """Return how much a checkpoint adds to the disk before any older one is removed."""
    return tensor_bytes + min(SPARE_SHARE * tensor_bytes, MOST_SPARE_BYTES)


def no_room(checkpoints: Path, tensor_bytes: int) -> str:
    """Return the message for a full disk, with what to do."""
    steps = complete_steps(checkpoints)
    may_go = (
        f" (the oldest checkpoint can be removed: {step_directory(checkpoints, steps[-1])})"
        if len(steps) > 1
        else ""
    )
    return (
        f"{checkpoints}: {need_and_have(checkpoints, tensor_bytes)}; earlier checkpoints are "
        f"untouched; free some space{may_go} and start again"
    )


def need_and_have(checkpoints: Path, tensor_bytes: int) -> str:
    """Return the space needed and the space free on the disk, in words."""
    needed = human_bytes(needed_bytes(tensor_bytes))
    free = human_bytes(shutil.disk_usage(checkpoints).free)
    return f"a checkpoint needs {needed}, the disk has {free}"


def require_visible(directory: Path, rank: str) -> None:
    """Raise UserError unless this rank sees the directory that rank 0 created."""
    if not directory.is_dir():
        raise UserError(
            f"{rank} does not see {directory}; put the run directory on a disk that all hosts "
            f"share (--run_dir)"
        )


def name_latest(final: Path) -> None:
    """Write the file `latest`, which tells people the newest checkpoint."""
    write_atomically(final.parent / "latest", final.name + "\n")


def retire(
    checkpoints: Path, *, keep: int, milestone_interval_steps: int, last_good_step: int | None
) -> None:
    """Remove checkpoints older than the ``keep`` newest, except milestones and ``last_good_step``.

    This process has loaded ``last_good_step``, so that one is known to load. Directories without a
    valid manifest do not count among the newest.
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
    """Delete a checkpoint; it is renamed first, so that its name never shows a part of it."""
    delete(move_aside(directory))


def set_aside(checkpoints: Path, damaged_steps: Iterable[int]) -> None:
    """Rename damaged checkpoints, so that they do not count as kept and push out sound ones."""
    for step in damaged_steps:
        directory = step_directory(checkpoints, step)
        aside = directory.with_name(f"{DAMAGED}{directory.name}")
        delete(aside)
        directory.rename(aside)


def collect_leftovers(checkpoints: Path) -> list[str]:
    """Remove what a killed save or deletion left; return the names."""
    leftovers = [
        path
        for pattern in LEFTOVERS
        for path in checkpoints.glob(pattern)
        if not path.parent.is_symlink()
    ]
    for path in leftovers:
        delete(path)
    return [path.name for path in leftovers]
