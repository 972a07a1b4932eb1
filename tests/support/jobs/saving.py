"""What ranks do in the tests of saving: whole runs whose disk is slow or full while they train."""

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megagpt import train as loop
from megagpt.checkpoint import format as checkpoint_format
from megagpt.checkpoint import writer as checkpoint_writer
from megagpt.checkpoint.resume import resume
from megagpt.train import Run
from megagpt.utils import UserError
from tests.support.configurations import Config
from tests.support.jobs.checkpoint import small_files, started, train
from tests.support.jobs.training import held_state

STATE_BYTES = 12  # of a parameter: fp32 weight and two moments


def train_with_slow_disk(
    config: Config, directory: Path, saved_step: int, until_step: int | None
) -> dict[str, Any]:
    """Train; files of ``saved_step`` are written once ``until_step`` is made, or when they are
    waited for.

    Returns what this rank held at ``saved_step`` and at the moment when the disk let go.
    """
    held: dict[str, Any] = {}
    gate = threading.Event()
    with started(config, directory) as run:
        write_file = checkpoint_writer._write_file
        finish, poll = run.saver.finish, run.saver.poll

        def wait_and_write(staging: Path, *arguments: Any) -> Any:
            if staging.name.endswith(f"{saved_step:08d}"):
                assert gate.wait(timeout=60)
            return write_file(staging, *arguments)

        def note_step() -> Any:
            if run.state.step == saved_step + 1:
                assert run.saver._pending is not None
            if run.state.step == until_step:
                held["later"] = held_state(run.engine)
                gate.set()
                run.saver._pending.job.result()
                return [*poll(), *finish()]
            return poll()

        def release_and_finish() -> Any:
            gate.set()
            return finish()

        def note_save(state: Any) -> Any:
            if state.step == saved_step:
                held["at_save"] = held_state(run.engine)
            return save(state)

        save = run.saver.save
        run.saver.save, run.saver.poll = note_save, note_step  # type: ignore[method-assign]
        if until_step is None:
            run.saver.finish = release_and_finish  # type: ignore[method-assign]
        with patch.object(checkpoint_writer, "_write_file", wait_and_write):
            loop.train(run)
    return held


def background_failure(config: Config, directory: Path, failing_rank: int) -> tuple[int, str]:
    """Train while no file of one rank may grow: the step after which this rank ends, and what it
    is told.
    """
    with (
        started(config, directory) as run,
        small_files() if run.engine.mesh.rank == failing_rank else nullcontext(),
    ):
        try:
            loop.train(run)
        except UserError as error:
            return run.state.step, str(error)
        return run.state.step, "saved"


def train_into_small_files(config: Config, directory: Path, file_bytes: int) -> None:
    """Train, and save in files of at most so many bytes of tensors."""
    with patch.object(checkpoint_writer, "FILE_BYTES", file_bytes):
        train(config, directory)


def hashed_by_resume(config: Config, directory: Path) -> int:
    """Start from the newest checkpoint: the bytes of the files that this rank hashes."""
    sizes: list[int] = []
    sha256_of = checkpoint_format.sha256_of

    def count_and_hash(path: Path) -> str:
        sizes.append(path.stat().st_size)
        return sha256_of(path)

    with (
        patch.object(checkpoint_format, "sha256_of", count_and_hash),
        started(config, directory) as run,
    ):
        assert run.state.step > 0
        return sum(sizes)


def resume_again(config: Config, directory: Path) -> dict[str, int]:
    """Load the newest checkpoint once more: bytes that this rank read, and that its buckets
    hold.
    """
    with started(config, directory) as run:
        resumed = resume(run.engine, directory)
        assert resumed is not None
        held = sum(piece.numel for bucket in run.engine.buckets() for piece in bucket.pieces)
        return {
            "read": resumed.bytes_read,
            "held": STATE_BYTES * held,
            "whole": STATE_BYTES * parameters(run),
        }


def memory_of_saving(config: Config, directory: Path) -> dict[str, int]:
    """Train a step, save and load: by how many bytes this rank's own memory grew in each, at
    most.
    """
    with started(config, directory) as run:
        loop.train(run)
        share = sum(piece.numel for bucket in run.engine.buckets() for piece in bucket.owned_pieces)
        with Growth() as saving:
            loop.save(run)
            loop.finish_saves(run)
        with Growth() as loading:
            assert resume(run.engine, directory) is not None
        copied = sum(flat.nbytes for flats in run.saver._snapshot._flats for flat in flats.values())
        grown = {"copied": copied, "saving": saving.most, "loading": loading.most}
        return grown | {"share": STATE_BYTES * share, "whole": STATE_BYTES * parameters(run)}


def parameters(run: Run) -> int:
    return run.config.megagpt.model.num_parameters


class Growth:
    """The most by which the memory of this process grew while entered, files that are mapped
    into it left out.
    """

    def __enter__(self) -> "Growth":
        self.before, self.most, self._over = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, anonymous_bytes() - self.before)


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's (proc(5))."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    ]
    return 1024 * int(line.split()[1])
