"""From a command line to the running loop, and from its end to an exit code.

What can be checked without torch is checked before it is imported, so that bad input is answered at
once, on every rank alike and before any rank waits for another.
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
from megagpt.cluster.launchers import Launch, adopt_launch
from megagpt.cluster.orphans import end_with_launcher
from megagpt.config import RunConfig, load_config
from megagpt.data.manifest import Split
from megagpt.dataset import SampleStream
from megagpt.health.watch import Pulse, Watch
from megagpt.parallel import internals, ops
from megagpt.planning.legality import ANY_VOCABULARY, World, require_legal
from megagpt.run import endings
from megagpt.rundir import directory as directories
from megagpt.rundir.data import open_data
from megagpt.rundir.signals import (
    STOP_FILE,
    SignalListener,
    StopRequest,
    StopRequests,
    ends_before_the_start,
)
from megagpt.utils import ExitCode, UserError

if TYPE_CHECKING:
    from megagpt.train import Run

log = logging.getLogger(__name__)

Prepare = Callable[["Run"], None]  # what a caller does with a run before its first step

# The others of a host let its first rank speak for them: the launcher, which looks every second,
# ends them with it.
TURN_S = 2.0


def main(arguments: argparse.Namespace, prepare: Prepare | None = None) -> int:
    """Train as the command line says and return this rank's exit code.

    ``prepare`` is called with the assembled run before its first step. Raises UserError for bad
    input.
    """
    try:
        with ends_before_the_start():
            return _start(arguments, prepare)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(TURN_S)
        raise


def _start(arguments: argparse.Namespace, prepare: Prepare | None) -> int:
    launch = adopt_launch()
    requests = StopRequests()
    end_with_launcher(partial(_without_launcher, requests))
    if (hostfile := hostfile_of_launcher()) is not None:
        read_hostfile(hostfile)  # DeepSpeed would have trained on this machine alone without it
    config = load_config(arguments.deepspeed_config, arguments.set)
    require_legal(config, str(arguments.deepspeed_config), World(launch.world_size, ANY_VOCABULARY))
    _require_stated_world_size(config, launch)
    directory = directories.directory_of_run(arguments.run_dir, arguments.deepspeed_config)
    if arguments.resume and endings.last_checkpoint(directory) is None:
        raise UserError(f"{directory}: nothing to resume; leave out --resume to start it")
    streams = open_data(config, directory)
    # The DeepSpeed of one host may differ: its ranks say so before the others wait for them.
    internals.require_known_internals(internals.parts_used(config, launch.launcher))
    _require_ops(config)
    with _gathered(directory):
        _announce_device()
        return _run_to_its_end(config, streams, directory, requests, prepare)


def _without_launcher(requests: StopRequests) -> None:
    """The launcher has died: save, where there may be something to be saved, and end."""
    if requests.awaited:
        requests.add(StopRequest.ORPHANED)
        return
    log.critical("the launcher has died before the first step: this rank ends")
    os._exit(ExitCode.FAILED)


def _gathered(directory: Path) -> AbstractContextManager[object]:
    """All ranks, and the directory locked by rank 0: until then, it may be another run's, and
    nobody writes there.

    A single process locks it before it imports torch.
    """
    lock = partial(_claimed, directory)
    if os.environ["WORLD_SIZE"] == "1":
        return lock()
    _announce_device()
    from megagpt.cluster.rendezvous import gathered_ranks

    return gathered_ranks(lock)


def _claimed(directory: Path) -> TextIO:
    """The lock, and no word of how an earlier start ended: a new end is to be shown, an old
    alarm to end nobody.
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
    """Raise UserError where this host cannot compile an op that nothing stands in for, before
    others wait for it.
    """
    needed = [op for op in ops.needed_ops(config, "cpu") if not ops.has_substitute(op)]
    if needed:
        _announce_device()
        ops.use_private_extensions()
        ops.require_tools(needed)


def _announce_device() -> None:
    """Before anything imports DeepSpeed. Only what needs torch comes after it."""
    from megagpt.parallel.device import announce_to_deepspeed

    announce_to_deepspeed()


def _require_stated_world_size(config: RunConfig, launch: Launch) -> None:
    """On several hosts one may be missing, and the rest would train on as if they were all;
    raises UserError.
    """
    if (launch.num_hosts or 1) > 1 and config.megagpt.parallel.world_size is None:
        raise UserError(
            f"megagpt.parallel.world_size: needed on {launch.num_hosts} hosts, so that one that is "
            f"missing is noticed; if {launch.world_size} ranks are all of them: --set "
            f"megagpt.parallel.world_size={launch.world_size}"
        )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _run_to_its_end(
    config: RunConfig,
    streams: dict[Split, SampleStream],
    directory: Path,
    requests: StopRequests,
    prepare: Prepare | None,
) -> ExitCode:
    """Train; whatever ends the run early is shown on one screen by the rank that failed first.

    Raises UserError before the first step only: what goes wrong hours later is no bad input,
    whoever calls it so.
    """
    from megagpt.run.assembly import assemble
    from megagpt.train import train

    launch, pulse = adopt_launch(), Pulse()
    run = None
    requests.stop_file = directory / STOP_FILE if _rank() == 0 else None
    with SignalListener(requests, lambda heard: endings.end_at_once(heard, run, directory)):
        try:
            _open_log(directory)
            with Watch(
                directory,
                pulse,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout_s=config.megagpt.monitor.stall_timeout_s,
                report=lambda states, timeout_s: endings.report_hang(
                    states, timeout_s, run, directory
                ),
            ) as watch:
                run = assemble(config, streams, directory, pulse)
                endings.connect_watch(watch, run)
                run.requests, first_step = requests, run.state.step
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
    """This rank's log."""
    from megagpt.monitoring.monitor import open_rank_log

    try:
        open_rank_log(directory, _rank())
        launch = adopt_launch()
        log.info(
            "rank %d of %d, on host %s by %s",
            launch.rank,
            launch.world_size,
            gethostname(),
            launch.launcher,
        )
    except OSError as error:
        raise _cannot_be_written(directory, error) from error
