"""A directory that readers see whole or not at all.

It is filled at a staging path beside its final path, flushed to the disk and renamed in one move.
Standard library only.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megagpt.utils import sync_directory


class DirectoryHeldError(Exception):
    """Another process of this host is filling the directory."""


@dataclass(frozen=True)
class AtomicDirectory:
    """Where a directory is filled, and where readers find it: two paths on one file system."""

    staging: Path
    final: Path

    @classmethod
    def beside(cls, final: Path) -> Self:
        """Return one that is filled under a hidden name beside its final path."""
        return cls(final.with_name(f".staging_{final.name}"), final)

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[Path]:
        """Make the staging directory and keep other processes of this host out of it.

        Yields its path; what an earlier holder left is still in it. Without ``wait`` raises
        DirectoryHeldError while another process holds it. The lock is on the directory itself and
        ends with its holder, so none goes stale. A holder that commits renames the directory away,
        and the next one makes another. An empty staging directory is removed at the end.
        """
        while True:
            self.staging.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.staging.mkdir(exist_ok=True)
                lock = os.open(self.staging, os.O_RDONLY | os.O_DIRECTORY)
            except (FileExistsError, FileNotFoundError):
                # another process committed or removed it at this moment
                if os.path.lexists(self.staging) and not self.staging.is_dir():
                    raise
                continue
            try:
                _lock(lock, wait=wait)
                if _is_open_as(lock, self.staging):
                    try:
                        yield self.staging
                    finally:
                        self._remove_if_empty(lock)
                    return
            finally:
                os.close(lock)

    def commit(self) -> None:
        """Give the complete directory its final path; what was there gives way.

        A kill leaves the old directory there, the new one, or neither, never a part of one. Where
        the rename fails, the old directory is put back.
        """
        sync_directory(self.staging)
        replaced = move_aside(self.final) if os.path.lexists(self.final) else None
        try:
            self.staging.rename(self.final)
        except BaseException:
            if replaced is not None:
                replaced.rename(self.final)
            raise
        sync_directory(self.final.parent)
        delete(_aside(self.final))  # or what a killed commit left there

    def _remove_if_empty(self, lock: int) -> None:
        """After a commit, the staging path may be another process's already."""
        if _is_open_as(lock, self.staging) and not any(self.staging.iterdir()):
            self.staging.rmdir()


def _aside(directory: Path) -> Path:
    """Return the path at which a directory waits for its deletion."""
    return directory.with_name(f".deleting_{directory.name}")


def move_aside(directory: Path) -> Path:
    """Rename a directory so that its deletion shows no part of it; returns its new path."""
    moved = _aside(directory)
    delete(moved)
    directory.rename(moved)
    return moved


def delete(path: Path) -> None:
    """Remove a directory or a file if it is there; of a link the link only, not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(descriptor: int, *, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise DirectoryHeldError from error


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
