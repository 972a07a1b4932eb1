"""What ranks do in the tests of saving, resuming and guarding: a whole run, from its
configuration to its end.
"""

import errno
import io
import json
import os
import resource
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megagpt import train as loop
from megagpt.checkpoint import directory as checkpoint_directory
from megagpt.checkpoint import format as checkpoint_format
from megagpt.checkpoint import reader as checkpoint_reader
from megagpt.checkpoint import saver as checkpoint
from megagpt.checkpoint import writer as checkpoint_writer
from megagpt.checkpoint.format import MANIFEST
from megagpt.common import atomic_directory
from megagpt.config import RunConfig
from megagpt.health.guard import StoppedByGuardError
from megagpt.health.watch import Pulse
from megagpt.parallel import compat, device
from megagpt.run import assembly
from megagpt.rundir import data as run_data
from megagpt.rundir.changes import allowed_prefixes
from megagpt.train import Run
from megagpt.utils import UserError
from tests.support.configurations import Config, tiny, with_zero
from tests.support.jobs.training import destroy, held_state
from tests.support.ranks import free_port
from tests.support.shards import whole_tensors

SCHEDULE_STEPS = (
    20  # longer than any run here, so that the schedule does not depend on where a run stops
)
STACKED = {"hidden_size": 128, "num_layers": 4}  # large enough that DeepSpeed really swaps to NVMe


def run_config(
    data: Path,
    steps: int,
    zero: tuple[int, str, str] = (0, "none", "none"),
    *,
    nvme: Path | None = None,
    save_every: int = 6,
    **model: Any,
) -> Config:
    """A run on a dataset of ``tests.support.trained_run``: scheduler, clipping and every step on
    record.
    """
    config = with_zero(tiny(steps=steps, **({"vocab_size": 384} | model)), *zero)
    for section in ("offload_optimizer", "offload_param"):
        if config["zero_optimization"].get(section, {}).get("device") == "nvme":
            config["zero_optimization"][section]["nvme_path"] = str(nvme)
            if section == "offload_param":
                config["zero_optimization"][section] |= {"max_in_cpu": 0, "buffer_size": 2**20}
    config["scheduler"] = {
        "type": "WarmupCosineLR",
        "params": {
            "total_num_steps": SCHEDULE_STEPS,
            "warmup_num_steps": 3,
            "warmup_type": "linear",
        },
    }
    config["megagpt"] |= {
        "data": {"path": str(data)},
        "checkpoint": {"interval_steps": save_every, "keep": 2},
        "monitor": {"log_interval_steps": 1},
    }
    config["megagpt"]["training"] |= {"eval_interval_steps": 0}
    return config


@contextmanager
def started(config: Config, directory: Path, allow_change: Sequence[str] = ()) -> Iterator[Run]:
    """The run as a command brings it up, on the ranks that are there already."""
    parsed = RunConfig.from_json(json.dumps(config))
    with patch.object(
        device, "peak_flops", return_value=None
    ):  # measured on a CPU, which takes longer than a run here
        legal = run_data.resolve_run(parsed)
        streams, changes = run_data.open_data(
            legal.config, directory, allowed_prefixes(allow_change)
        )
        run = assembly.assemble(legal, streams, directory, Pulse(), changes)
    try:
        with run.monitor:
            yield run
    finally:
        run.saver.close()
        destroy(run.engine)


def train(
    config: Config,
    directory: Path,
    poison: dict[str, Any] | None = None,
    allow_change: Sequence[str] = (),
) -> dict[str, Any]:
    """Train to the end, or to where the guard stops; ``poison`` corrupts gradients (see
    ``poison_gradients``).
    """
    with started(config, directory, allow_change) as run:
        samples = recorded_samples(run)
        if poison:
            poison_gradients(run, **poison)
        outcome = {
            "first_step": run.state.step,
            "at_start": held_state(run.engine) if run.state.step else [],
        }
        outcome["scaler_at_start"] = compat.loss_scaler_state(run.engine.deepspeed)
        try:
            loop.train(run)
        except StoppedByGuardError as error:
            outcome["stopped"] = str(error)
        outcome["scaler_at_end"] = compat.loss_scaler_state(run.engine.deepspeed)
        return outcome | {"at_end": held_state(run.engine), "state": run.state, "samples": samples}


def validation_and_samples(config: Config, directory: Path) -> dict[str, Any]:
    """Train, then validate, and keep what this rank's monitor is told of samples."""
    with started(config, directory) as run:
        loop.train(run)
        texts: list[str] = []
        run.monitor.sample = lambda step, prompt, text: texts.append(text)  # type: ignore[method-assign]
        loop.write_samples(run)
        (validation,) = run.validation
        return {"val_loss": validation.losses(run.engine).mean, "texts": texts}


def refusal(
    config: Config,
    directory: Path,
    failing_rank: int | None = None,
    fault: str = "",
    allow_change: Sequence[str] = (),
) -> str:
    """Why the run does not start, where ``fault`` strikes one rank or none."""
    strikes = failing_rank is not None and dist.get_rank() == failing_rank
    try:
        with (
            FAULTS[fault]() if strikes else nullcontext(),
            started(config, directory, allow_change) as run,
        ):
            return f"started at step {run.state.step}"
    except UserError as error:
        return str(error)


def refusal_unless_shared(config: Config, directory: Path) -> str:
    """Why the run does not start where rank 1's host has a disk of its own under the same name:
    here, another name.
    """
    return refusal(
        config, directory if dist.get_rank() == 0 else directory.with_name("another_disk")
    )


def resumption(config: Config, directory: Path, allow_change: Sequence[str] = ()) -> dict[str, Any]:
    """Start, and go no further: where this rank resumes, what it passes over, what it shows."""
    found, load = [], assembly.resume

    def recorded(*arguments: Any) -> Any:
        found.append(load(*arguments))
        return found[-1]

    watched = patch.object(assembly, "resume", recorded)
    with (
        redirect_stdout(io.StringIO()) as said,
        watched,
        started(config, directory, allow_change) as run,
    ):
        return {
            "step": run.state.step,
            "passed_over": found[0].passed_over,
            "said": said.getvalue(),
        }


def disagreement(config: Config, directory: Path) -> str:
    """Why the run does not start where rank 1 has another learning rate in its file."""
    if dist.get_rank() == 1:
        config["optimizer"]["params"]["lr"] *= 2
    return refusal(config, directory)


def failing_save(config: Config, directory: Path, failing_rank: int, fault: str) -> str:
    """Train without saving, then save while ``fault`` strikes one rank; what every rank is told."""
    with started(config, directory) as run:
        loop.train(run)
        strikes = run.engine.mesh.rank == failing_rank
        with FAULTS[fault]() if strikes else nullcontext():
            try:
                loop.save(run)
            except UserError as error:
                return str(error)
        return "saved"


def spoilt_save(config: Config, directory: Path, spoilt_rank: int) -> str:
    """Train, corrupt one master weight of one rank, and save; what every rank is told."""
    with started(config, directory) as run:
        loop.train(run)
        if run.engine.mesh.rank == spoilt_rank:
            with run.engine.buckets()[0].resident(True) as (master, _):
                master.view(-1)[0] = float("nan")
        try:
            loop.save(run)
        except UserError as error:
            return str(error)
        return "saved"


@contextmanager
def small_files() -> Iterator[None]:
    """Nothing this process writes may grow past 4 KiB: the operating system's own refusal, as of
    a full disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def full_disk() -> Iterator[None]:
    """The file system says that 1000 bytes are left."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: type(usage(path))(10**6, 10**6 - 1000, 1000)
    try:
        yield
    finally:
        shutil.disk_usage = usage


@contextmanager
def unforeseen_space() -> Iterator[None]:
    """A disk that looked large enough and is not: whoever checks it first is told that nothing
    is needed.
    """
    with patch.object(checkpoint_directory, "needed_bytes", return_value=0.0):
        yield


@contextmanager
def disk_filled_before(module: Any, name: str) -> Iterator[None]:
    """Another process takes what is left of the disk, to the last byte, when a file of this name
    is written.
    """
    write = module.write_atomically

    def write_on_full_disk(path: Path, data: bytes | str) -> None:
        if path.name == name:
            with suppress(OSError), (path.parent / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(512))
        write(path, data)

    with patch.object(module, "write_atomically", write_on_full_disk):
        yield


@contextmanager
def failing_reads(module: Any, name: str) -> Iterator[None]:
    """The disk does not answer while ``module.name`` reads."""

    def fail(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with patch.object(module, name, fail):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "full_at_manifest": partial(disk_filled_before, checkpoint, MANIFEST),
    "full_at_latest": partial(disk_filled_before, checkpoint_directory, "latest"),
    "unreadable_hash": partial(failing_reads, checkpoint_format, "sha256_of"),
    "unreadable_tensor": partial(failing_reads, checkpoint_reader, "safe_open"),
    "small_files": small_files,
    "full_disk": full_disk,
    "unforeseen_space": unforeseen_space,
}


def recorded_samples(run: Run) -> dict[int, list[int]]:
    """Fills, step by step, with the ids of the samples that this rank trains on.

    They may have been read in a thread, during the step before.
    """
    samples: dict[int, list[int]] = defaultdict(list)
    read: dict[tuple[int, int | None], list[int]] = {}  # by what was prepared
    loader, here = run.training, threading.local()
    batch, prepare, load = loader.stream.batch, loader._prepare, loader.load

    def note_batch(indices: Sequence[int]) -> Any:
        here.ids += indices
        return batch(indices)

    def note_read(first: int, step: int | None) -> Any:
        here.ids = read[first, step] = []
        return prepare(first, step)

    def note_step(first: int, step: int | None = None) -> Any:
        loaded = load(first, step)
        samples[step or 0] += read[first, step]
        return loaded

    loader.stream.batch = note_batch  # type: ignore[method-assign]
    loader._prepare = note_read  # type: ignore[method-assign]
    loader.load = note_step  # type: ignore[method-assign]
    return samples


def poison_gradients(run: Run, steps: Sequence[int], rank: int, kind: str) -> None:
    """On one rank, at some steps: a loss of NaN, an infinite gradient under a finite loss, or
    the other way round.
    """
    if run.engine.mesh.rank != rank:
        return

    def spoil(module: Any, arguments: Any, loss: torch.Tensor) -> torch.Tensor:
        if run.state.step + 1 not in steps:
            return loss
        if kind == "nan":
            return loss * float("nan")
        if kind == "loss":
            return loss + float("inf")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    run.engine.chunks[0].register_forward_hook(spoil)


def gathered(ranks: Sequence[dict[str, Any]], key: str) -> dict[tuple[str, str], torch.Tensor]:
    """Whole flat tensors by (kind, parameter) from what the ranks hold; every element must be
    held exactly once.
    """
    return whole_tensors(rank[key] for rank in ranks)


def assert_same_state(
    left: dict[tuple[str, str], torch.Tensor], right: dict[tuple[str, str], torch.Tensor]
) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


# ---------------------------------------------------------------------------- a save that is killed


def train_and_die(
    config: Config, directory: Path, victim: int, point: str, world_size: int = 2
) -> list[int | None]:
    """A run on ranks of their own, one of which is killed at ``point`` of a save; returns the exit
    codes.

    The ranks are forked from a server that has the imports done, so that a case costs little.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.support.jobs.checkpoint"])
    port = free_port()
    arguments = (world_size, port, config, directory, victim, point)
    processes = [
        context.Process(target=_doomed_rank, args=(rank, *arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _doomed_rank(
    rank: int, world_size: int, port: int, config: Config, directory: Path, victim: int, point: str
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    if rank == victim:
        arrange_death(point, f"step_{config['megagpt']['training']['total_steps']:08d}")
    with started(config, directory) as run:
        loop.train(run)


def arrange_death(point: str, last: str) -> None:
    """Replace one function that a save of step ``last`` calls by one that kills this process
    before or after it.
    """
    death = DEATHS[point]
    original = getattr(death.owner, death.name)

    def deadly(*arguments: Any) -> Any:
        doomed = death.concerns(last, *arguments)
        result = None if doomed and not death.acts_first else original(*arguments)
        if doomed:
            death.leave_half_done(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(death.owner, death.name, deadly)


def cut_in_half(staging: Path, _: Any, planned: Any) -> None:
    os.truncate(staging / planned.name, planned.bytes // 2)


def rename_aside(path: Path) -> None:
    path.rename(path.with_name(f".deleting_{path.name}"))


@dataclass(frozen=True)
class Death:
    """``owner.name``, whether it acts before the process dies, which calls of it concern the last
    save.

    ``leave_half_done`` is what a kill within the function leaves on the disk, where it is more than
    one system call.
    """

    owner: Any
    name: str
    acts_first: bool
    concerns: Callable[..., bool]
    leave_half_done: Callable[..., object] = lambda *arguments: None


def _into(last: str, path: Path, *_: Any) -> bool:
    return last in str(path)


def _of_saver(last: str, saver: Any, save: Any, *_: Any) -> bool:
    return save.final.name == last


# in the order of the protocol; every rank passes those of EVERY_RANK, only rank 0 the others
EVERY_RANK = {
    "before any file": Death(checkpoint_directory, "require_visible", True, _into),
    "within a file": Death(checkpoint_writer, "_write_file", True, _into, cut_in_half),
    "after a file": Death(checkpoint_writer, "_write_file", True, _into),
    "before the report": Death(checkpoint.Saver, "_write", True, _of_saver),
    "after the report": Death(checkpoint.Saver, "_commit", False, _of_saver),
    "after the commit": Death(
        checkpoint.Saver, "trust", False, lambda last, _, state: last.endswith(f"_{state.step:08d}")
    ),
}
RANK_0 = {
    "before the manifest": Death(checkpoint, "write_atomically", False, _into),
    "after the manifest": Death(checkpoint, "write_atomically", True, _into),
    "after the rename": Death(
        atomic_directory, "sync_directory", False, lambda last, path: (path / last).is_dir()
    ),
    "before latest": Death(
        checkpoint_directory,
        "write_atomically",
        False,
        lambda last, path, text: path.name == "latest" and last in text,
    ),
    "while retiring": Death(
        checkpoint_directory,
        "remove",
        False,
        lambda last, path: (path.parent / last).is_dir(),
        rename_aside,
    ),
}
DEATHS = EVERY_RANK | RANK_0
