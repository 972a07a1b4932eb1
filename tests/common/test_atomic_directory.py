"""A directory is committed whole, and whatever interrupts that, nothing that was there is lost."""

import os
import signal
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest

from megagpt.common.atomic_directory import AtomicDirectory, DirectoryHeldError


@pytest.fixture
def place(tmp_path: Path) -> AtomicDirectory:
    """A directory that is there, and a new one that is ready to replace it."""
    place = AtomicDirectory.beside(tmp_path / "out")
    write(place.final, "old")
    write(place.staging, "new")
    return place


def write(directory: Path, text: str) -> None:
    directory.mkdir()
    (directory / "file").write_text(text)


def entries(directory: Path) -> dict[str, str]:
    return {path.name: (path / "file").read_text() for path in directory.iterdir()}


def test_what_was_there_gives_way(place: AtomicDirectory, tmp_path: Path) -> None:
    place.commit()
    assert entries(tmp_path) == {"out": "new"}


def test_of_a_link_the_link_gives_way_and_not_its_target(
    place: AtomicDirectory, tmp_path: Path
) -> None:
    place.final.rename(tmp_path / "elsewhere")
    place.final.symlink_to(tmp_path / "elsewhere")
    place.commit()
    assert entries(tmp_path) == {"out": "new", "elsewhere": "old"}
    assert not place.final.is_symlink()


def test_a_rename_that_fails_puts_back_what_was_there(
    place: AtomicDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, asked = Path.rename, []

    def full(path: Path, target: Path) -> Path:
        asked.append(path.name)
        if path == place.staging:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        place.commit()
    assert asked == ["out", ".staging_out", ".deleting_out"]
    assert entries(tmp_path) == {"out": "old", ".staging_out": "new"}


def _killed_between_the_renames(place: AtomicDirectory) -> None:
    rename = Path.rename

    def deadly(path: Path, target: Path) -> Path:
        if path == place.staging:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = deadly  # type: ignore[method-assign]
    place.commit()


def test_a_kill_between_the_renames_loses_neither_and_the_next_commit_clears_up(
    place: AtomicDirectory, tmp_path: Path
) -> None:
    process = get_context("fork").Process(target=_killed_between_the_renames, args=(place,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert entries(tmp_path) == {".deleting_out": "old", ".staging_out": "new"}
    place.commit()
    assert entries(tmp_path) == {"out": "new"}


def test_one_holder_at_a_time_and_who_waited_gets_a_directory_of_its_own(tmp_path: Path) -> None:
    place = AtomicDirectory.beside(tmp_path / "out")
    got, waiting = [], threading.Event()

    def wait() -> None:
        waiting.set()
        with place.locked(wait=True) as staging:
            got.append((sorted(os.listdir(tmp_path)), os.listdir(staging)))

    waiter = threading.Thread(target=wait)
    with place.locked(wait=False) as staging:
        waiter.start()
        waiting.wait()
        with pytest.raises(DirectoryHeldError), place.locked(wait=False):
            pytest.fail("two hold it")
        assert got == []
        (staging / "file").write_text("mine")
        place.commit()
    waiter.join(60)
    assert got == [([".staging_out", "out"], [])]
    assert entries(tmp_path) == {"out": "mine"}  # the empty one of the waiter is gone
