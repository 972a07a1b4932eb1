"""From a command line to the running loop, and from its end to an exit code.

What can be checked without torch is checked before torch is imported, so that bad input is reported
at once, on every rank and before any rank waits for another.
"""

import argparse
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, TextIO

import kernels  # noqa: F401  chooses Triton's interpreter, where it is asked for, before DeepSpeed imports Triton
from megagpt.cluster.hosts import read_hostfile
from megagpt.cluster.launch_command import hostfile_of_launcher
from megagpt.cluster.launchers import Launch, adopt_launch, take_free_port
from megagpt.cluster.orphans import end_with_launcher
from megagpt.config import RunConfig, load_config
from megagpt.dataset import SampleStream
from megagpt.health.watch import Pulse, Watch
from megagpt.parallel import internals, ops
from megagpt.planning.legality import LegalRun
from megagpt.run import endings
from megagpt.rundir import directory as directories
from megagpt.rundir.changes import Changes, allowed_prefixes
from megagpt.rundir.data import open_data, resolve_run
from megagpt.rundir.signals import (
    STOP_FILE,
    SignalListener,
    StopRequest,
    StopRequests,
    ends_before_the_start,
)
from megagpt.utils import ExitCode, RankEnvironment, UserError

if TYPE_CHECKING:
    from megagpt.train import Run

log = logging.getLogger(__name__)

Prepare = Callable[["Run"], None]  # called with the assembled run before its first step

# The other ranks of a host wait while its first rank reports an error; the launcher, which looks
# every second, ends them with it.
TURN_S = 2.0


def main(arguments: argparse.Namespace, prepare: Prepare | None = None) -> int:
    """Train as the command line says and return this rank's exit code.

    ``prepare`` is called with the assembled run before its first step. Raise UserError for bad
    input.
    """
    try:
        with ends_before_the_start():
            return _start(arguments, prepare)
    except UserError:
        if not RankEnvironment.read().is_first_of_host:
            time.sleep(TURN_S)
        raise


def _start(arguments: argparse.Namespace, prepare: Prepare | None) -> int:
    launch = adopt_launch()
    requests = StopRequests()
    end_with_launcher(partial(_without_launcher, requests))
    if (hostfile := hostfile_of_launcher()) is not None:
        read_hostfile(hostfile)  # without a valid one DeepSpeed trains on this machine only
    config = load_config(arguments.deepspeed_config, arguments.set)
    _require_stated_world_size(config, launch)
    directory = directories.directory_of_run(arguments.run_dir, arguments.deepspeed_config)
    if arguments.resume and endings.last_checkpoint(directory) is None:
        raise UserError(f"{directory}: nothing to resume; leave out --resume to start it")
    legal = resolve_run(config, str(arguments.deepspeed_config))
    prefixes = allowed_prefixes(arguments.allow_change)
    streams, changes = open_data(legal.config, directory, prefixes)
    # One host may have another DeepSpeed; its ranks fail here, before others wait for them.
    internals.require_known_internals(internals.parts_used(config, launch.launcher))
    _require_ops(config)
    _require_format(legal, str(arguments.deepspeed_config))
    with _gathered(directory):
        _announce_device()
        return _run_to_its_end(legal, streams, changes, directory, requests, prepare)


def _without_launcher(requests: StopRequests) -> None:
    """Save if there may be something to save, and end, because the launcher has died."""
    if requests.awaited:
        requests.add(StopRequest.ORPHANED)
        return
    log.critical("the launcher has died before the first step; this rank ends")
    os._exit(ExitCode.FAILED)


def _gathered(directory: Path) -> AbstractContextManager[object]:
    """Return a context in which all ranks have met and rank 0 holds the directory's lock.

    Before, the directory may belong to another run, and no rank writes there. A single process
    locks it before it imports torch.
    """
    lock = partial(_claimed, directory)
    if RankEnvironment.read().world_size == 1:
        take_free_port()
        return lock()
    _announce_device()
    from megagpt.cluster.rendezvous import gathered_ranks

    return gathered_ranks(lock)


def _claimed(directory: Path) -> TextIO:
    """Lock the directory, and remove the end record and hang alarm of an earlier start.

    They must not affect this start.
    """
    locked = directories.lock(directory)
    try:
        endings.clear_earlier_end(directory)
    except OSError as error:
        raise _cannot_be_written(directory, error) from error
    return locked


def _cannot_be_written(directory: Path, error: OSError) -> UserError:
    return UserError(f"{directory}: cannot be written ({error.strerror}); choose another --run_dir")


def _require_ops(config: RunConfig) -> None:
    """Raise UserError if this host cannot compile an op without a substitute.

    This runs before other ranks wait for it.
    """
    needed = [op for op in ops.needed_ops(config, "cpu") if not ops.has_substitute(op)]
    if needed:
        _announce_device()
        ops.use_private_extensions()
        ops.require_tools(needed)


def _require_format(legal: LegalRun, source: str) -> None:
    """Raise UserError if the file asks for a 16-bit format that this device does not support."""
    if True in (legal.written.bf16.enabled, legal.written.fp16.enabled):
        _announce_device()
        from megagpt.parallel.engine import supported_formats

        legal.require_format(supported_formats(), source)


def _announce_device() -> None:
    """Tell DeepSpeed the device before anything imports DeepSpeed; imports torch."""
    from megagpt.parallel.device import announce_to_deepspeed

    announce_to_deepspeed()


def _require_stated_world_size(config: RunConfig, launch: Launch) -> None:
    """Raise UserError if several hosts train without a stated number of ranks.

    One may be missing, and the others would train as if they were all.
    """
    if (launch.num_hosts or 1) > 1 and config.megagpt.parallel.world_size is None:
        raise UserError(
            f"megagpt.parallel.world_size: missing (need it on {launch.num_hosts} hosts, so that "
            f"an absent host is noticed); if {launch.world_size} ranks are all of them: --set "
            f"megagpt.parallel.world_size={launch.world_size}"
        )


def _run_to_its_end(
    legal: LegalRun,
    streams: dict[str, SampleStream],
    changes: Changes,
    directory: Path,
    requests: StopRequests,
    prepare: Prepare | None = None,
) -> ExitCode:
    """Train; the rank that fails first shows an early end on one screen.

    Raise UserError before the first step only: an error hours later is not bad input.
    """
    from megagpt.run.assembly import assemble
    from megagpt.train import train

    launch = adopt_launch()
    pulse = Pulse()
    run = None
    requests.stop_file = directory / STOP_FILE if launch.rank == 0 else None
    with SignalListener(requests, lambda heard: endings.end_at_once(heard, run, directory)):
        try:
            _open_log(directory)
            with Watch(
                directory,
                pulse,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout_s=legal.config.megagpt.monitor.stall_timeout_s,
                report=lambda states, timeout_s: endings.report_hang(
                    states, timeout_s, run, directory
                ),
            ) as watch:
                run = assemble(legal, streams, directory, pulse, changes)
                endings.connect_watch(watch, run)
                run.requests = requests
                first_step = run.state.step
                if prepare is not None:
                    prepare(run)
                requests.awaited = True
                with run.monitor:
                    request = train(run)
                return endings.finish(run, first_step, request)
        except BaseException as error:
            if run is None and isinstance(error, UserError):
                raise
            return endings.crash(error, run, directory)


def _open_log(directory: Path) -> None:
    """Open this rank's log."""
    from megagpt.monitoring.monitor import open_rank_log

    try:
        launch = adopt_launch()
        open_rank_log(directory, launch.rank)
        log.info(
            "rank %d of %d, on host %s by %s",
            launch.rank,
            launch.world_size,
            gethostname(),
            launch.launcher,
        )
    except OSError as error:
        raise _cannot_be_written(directory, error) from error
