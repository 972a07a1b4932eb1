"""From a command line to the running loop, and from its end to an exit code.

What can be checked without torch is checked before it is imported, so that bad input is answered at once, on every
rank alike and before any rank waits for another.
"""

import argparse
import logging
import os
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING

import kernels  # noqa: F401  chooses Triton's interpreter, where it is asked for, before DeepSpeed imports Triton
from megagpt import endings, faults
from megagpt import run_directory as directories
from megagpt.config import ResolvedConfig, RunConfig, load_config
from megagpt.dataset import SampleStream, open_dataset
from megagpt.hosts import read_hostfile
from megagpt.launch_command import hostfile_of_launcher
from megagpt.launchers import Launch, adopt_launch
from megagpt.legality import ANY_VOCABULARY, World, require_legal
from megagpt.manifest import Split
from megagpt.orphans import end_with_launcher
from megagpt.signals import STOP_FILE, SignalListener, Wish, Wishes, ends_before_the_start
from megagpt.utils import ExitCode, UserError, human_count

if TYPE_CHECKING:
    from megagpt.engine import Engine
    from megagpt.resume_proof import NextStep
    from megagpt.train import Run

log = logging.getLogger(__name__)

EMBEDDED_CORPUS = Path("data/stdlib")
# The others of a host let its first rank speak for them: the launcher, which looks every second, ends them with it.
TURN_S = 2.0
SPLITS: tuple[Split, ...] = ("train", "val")


def main(arguments: argparse.Namespace) -> int:
    """Train as the command line says; returns this rank's exit code. Raises UserError for bad input."""
    try:
        with ends_before_the_start():
            return _start(arguments)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(TURN_S)
        raise


def _start(arguments: argparse.Namespace) -> int:
    launch = adopt_launch()
    wishes = Wishes()
    end_with_launcher(partial(_without_launcher, wishes))
    if (hostfile := hostfile_of_launcher()) is not None:
        read_hostfile(hostfile)  # DeepSpeed would have trained on this machine alone without it
    faults.from_environment()
    config = load_config(arguments.deepspeed_config, arguments.set)
    require_legal(config, str(arguments.deepspeed_config), World(launch.world_size, ANY_VOCABULARY))
    _require_stated_world_size(config, launch)
    directory = directories.directory_of_run(arguments.run_dir, arguments.deepspeed_config)
    if arguments.resume and endings.last_checkpoint(directory) is None:
        raise UserError(f"{directory}: nothing to resume; leave out --resume to start it")
    streams = open_data(config, directory)
    with _gathered(directory):
        _announce_device()
        return _run_to_its_end(config, streams, directory, wishes)


def _without_launcher(wishes: Wishes) -> None:
    """The launcher has died: save, where there may be something to be saved, and end."""
    if wishes.awaited:
        wishes.add(Wish.ORPHANED)
        return
    log.critical("the launcher has died before the first step: this rank ends")
    os._exit(ExitCode.FAILED)


def _gathered(directory: Path) -> AbstractContextManager[object]:
    """All ranks, and the directory locked by rank 0: until then, it may be another run's, and nobody writes there.

    A single process locks it before it imports torch.
    """
    lock = partial(directories.lock, directory)
    if os.environ["WORLD_SIZE"] == "1":
        return lock()
    _announce_device()
    from megagpt.rendezvous import gathered_ranks

    return gathered_ranks(lock)


def _announce_device() -> None:
    """Before anything imports DeepSpeed. Only what needs torch comes after it."""
    from megagpt.device import announce_to_deepspeed

    announce_to_deepspeed()


def _require_stated_world_size(config: RunConfig, launch: Launch) -> None:
    """On several hosts one may be missing, and the rest would train on as if they were all; raises UserError."""
    if (launch.num_hosts or 1) > 1 and config.megagpt.parallel.world_size is None:
        raise UserError(
            f"megagpt.parallel.world_size: needed on {launch.num_hosts} hosts, so that one that is missing is noticed; "
            f"if {launch.world_size} ranks are all of them: --set megagpt.parallel.world_size={launch.world_size}"
        )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def open_data(config: RunConfig, directory: Path) -> dict[Split, SampleStream]:
    """The samples of each split, once everything that needs no torch is found sound; raises UserError."""
    resolved = _resolve(config, _prepare_vocabulary(config))
    directories.check(directory, resolved)
    streams = {split: _open_stream(resolved, split) for split in SPLITS}
    _require_data_of_the_newest(directory, streams["train"])
    return streams


def _require_data_of_the_newest(directory: Path, stream: SampleStream) -> None:
    """Before any rank builds its model: the data are those of the newest checkpoint that has a sound manifest."""
    from megagpt.checkpoint_format import DamagedCheckpointError, complete_steps, read_manifest, step_directory

    checkpoints = directory / "checkpoints"
    for step in complete_steps(checkpoints):
        try:
            manifest = read_manifest(step_directory(checkpoints, step))
        except DamagedCheckpointError:
            continue
        except OSError as error:
            message = f"{error.filename}: cannot be read ({error.strerror}); start again when its disk answers"
            raise UserError(message) from error
        _require_same_data(directory, step, manifest.data_fingerprint, stream)
        return


def _require_same_data(directory: Path, step: int, fingerprint: str, stream: SampleStream) -> None:
    if fingerprint != stream.fingerprint:
        raise UserError(
            f"{directory}: its data changed since step {step} was saved: {stream.fingerprint[:16]} found in "
            f"{', '.join(str(dataset.directory) for dataset in stream.datasets)}, {fingerprint[:16]} expected; "
            f"restore them, or start afresh with another --run_dir"
        )


def _resolve(config: RunConfig, vocabulary: int, bf16_native: bool | None = None) -> ResolvedConfig:
    """As it would be on a device without bf16, or else with it, until torch can say which one this is."""
    world = World(int(os.environ.get("WORLD_SIZE", "1")), vocabulary, bf16_native)
    require_legal(config, world=world)
    return world.resolve(config)


def _prepare_vocabulary(config: RunConfig) -> int:
    """The number of tokens of the data; the embedded corpus is made when missing, by one process of a host."""
    directories_of_data = [Path(source.path) for source in config.megagpt.data.sources]
    if EMBEDDED_CORPUS in directories_of_data:
        from megagpt.download_data import prepare_embedded_corpus

        prepare_embedded_corpus(EMBEDDED_CORPUS)
    return max(open_dataset(directory).vocabulary for directory in directories_of_data)


def _open_stream(config: ResolvedConfig, split: Split) -> SampleStream:
    data = config.megagpt.data
    return SampleStream.open(
        [(Path(source.path), source.weight) for source in data.sources],
        split=split,
        sequence_length=config.megagpt.model.sequence_length,
        seed=data.seed,
        document_mask=data.document_mask,
    )


def _run_to_its_end(config: RunConfig, streams: dict[Split, SampleStream], directory: Path, wishes: Wishes) -> ExitCode:
    """Train; whatever ends the run early is shown on one screen by the rank that failed first.

    Raises UserError before the first step only: what goes wrong hours later is no bad input, whoever calls it so.
    """
    from megagpt.train import train

    run = None
    wishes.stop_file = directory / STOP_FILE if _rank() == 0 else None
    with SignalListener(wishes, lambda heard: endings.end_at_once(heard, run, directory)):
        try:
            _open_log(directory)
            run = assemble(config, streams, directory)
            run.wishes, first_step = wishes, run.state.step
            faults.sabotage(run, faults.from_environment())
            wishes.awaited = True
            with endings.watching(run):
                with run.monitor:
                    wish = train(run)
                return endings.farewell(run, first_step, wish)
        except BaseException as error:
            if run is None and isinstance(error, UserError):
                raise
            return endings.crash(error, run, directory)


def _open_log(directory: Path) -> None:
    """This rank's log; how an earlier start ended gives way, so that a new end is shown."""
    from megagpt.monitor import open_rank_log

    try:
        open_rank_log(directory, _rank())
        launch = adopt_launch()
        log.info("rank %d of %d, on host %s by %s", launch.rank, launch.world_size, gethostname(), launch.launcher)
        if _rank() == 0:  # which holds the lock: the page may be another run's
            endings.forget(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); choose another --run_dir") from error


def assemble(config: RunConfig, streams: dict[Split, SampleStream], directory: Path) -> "Run":
    """Bring up the ranks, the engine and the newest checkpoint; every rank does the same."""
    from megagpt import device
    from megagpt.agreement import require_agreement
    from megagpt.batches import BatchLoader
    from megagpt.engine import (
        build_engine,
        build_mesh,
        collective_timeout,
        compute_dtype,
        join_ranks,
        training_device,
    )
    from megagpt.generate import open_tokenizer
    from megagpt.monitor import Monitor
    from megagpt.together import together
    from megagpt.train import Run

    native = device.multiplies_bf16_natively(training_device())
    resolved = _resolve(config, streams["train"].vocabulary, bf16_native=native)
    join_ranks(collective_timeout(resolved))
    require_agreement(resolved, streams["train"])
    mesh = build_mesh(resolved)
    engine = build_engine(resolved, mesh)
    _announce(engine, directory, device.describe(training_device()))
    run = Run(
        config=resolved,
        engine=engine,
        training=BatchLoader(streams["train"], resolved, mesh, training_device()),
        validation=BatchLoader(streams["val"], resolved, mesh, training_device()),
        encoding=open_tokenizer(resolved.megagpt),
        directory=directory,
        peak_flops=device.peak_flops(training_device(), compute_dtype(resolved)),
    )
    found = _resume(run)
    together(lambda: directories.record(directory, resolved) if mesh.rank == 0 else None)
    run.monitor = Monitor.open(
        resolved,
        directory,
        total_steps=resolved.megagpt.training.total_steps,
        start_step=run.state.step,
        is_writer=mesh.rank == 0,
    )
    if found:
        run.monitor.event("resume", step=run.state.step, **found)
    return run


def _resume(run: "Run") -> dict[str, object] | None:
    """Load the newest sound checkpoint into the run; what it was, for the record."""
    from megagpt.checkpoint_directory import collect_leftovers
    from megagpt.resume import resume

    if run.engine.mesh.rank == 0:
        for name in collect_leftovers(run.saver.checkpoints):
            log.warning("removed %s, left by a save that was interrupted", name)
    resumed = resume(run.engine, run.directory)
    if resumed is None:
        return None
    run.state = resumed.state
    run.saver.trust(run.state)
    if run.engine.mesh.rank == 0:
        run.unproven = _next_step(resumed.directory)
        print(resumed.describe(provable=run.unproven is not None), flush=True)
    _require_same_data(run.directory, run.state.step, resumed.manifest.data_fingerprint, run.training.stream)
    return {"written_by": resumed.manifest.topology, "passed_over": resumed.passed_over}


def _next_step(checkpoint: Path) -> "NextStep | None":
    """The record of the step that followed a checkpoint; a damaged one gives way to what that step gives now.

    One of another format stays, and says nothing to this version.
    """
    from megagpt.checkpoint_format import DamagedCheckpointError, OtherFormatError
    from megagpt.resume_proof import NEXT_STEP, NextStep

    try:
        return NextStep.read(checkpoint)
    except DamagedCheckpointError as error:
        log.warning("%s", error)
        (checkpoint / NEXT_STEP).unlink(missing_ok=True)
    except OtherFormatError as error:
        log.warning("%s", error)
    return None


def _announce(engine: "Engine", directory: Path, device: str) -> None:
    """One paragraph on the screen before the first step: what trains, how, where."""
    if engine.mesh.rank != 0:
        return
    config, zero = engine.config, engine.config.zero_optimization
    model = config.megagpt.model
    optimizer_on, parameters_on = (
        "the device" if place == "none" else place for place in (zero.optimizer_device, zero.parameter_device)
    )
    print(
        f"{directory}: {human_count(model.num_parameters)} parameters "
        f"({model.num_layers} layers, width {model.hidden_size}, {model.num_heads} heads, "
        f"{model.vocab_size} tokens, length {model.sequence_length})\n"
        f"{engine.mesh.world_size} x {device}; ZeRO {zero.stage}, optimizer on {optimizer_on}, "
        f"parameters on {parameters_on}; batch {config.train_batch_size} = "
        f"{config.train_micro_batch_size_per_gpu} x {config.gradient_accumulation_steps} micro-batches x "
        f"{engine.mesh.data_size} replicas",
        flush=True,
    )
    if engine.num_stages > 1:
        print(f"pipeline, {config.megagpt.parallel.schedule}: {describe_stages(config)}", flush=True)


def describe_stages(config: ResolvedConfig) -> str:
    """What each pipeline stage holds, and its shares of work and parameters."""
    from megagpt.stages import cut, describe

    model, parallel = config.megagpt.model, config.megagpt.parallel
    stages = cut(model, parallel.pipeline * parallel.virtual_stages)
    return "; ".join(f"stage {index}: {describe(model, layers)}" for index, layers in enumerate(stages))
