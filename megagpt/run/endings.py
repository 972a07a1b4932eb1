"""How a run ends: the exit code, what the screen shows, and the record for whoever started it."""

import contextlib
import logging
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.cluster.launch_command import COMMAND_VARIABLE, command_of_launcher
from megagpt.cluster.launchers import OF_A_RANK, adopt_launch
from megagpt.common.text import redacted
from megagpt.health.watch import RankState, Watch
from megagpt.rundir import end_record
from megagpt.rundir.end_record import EndRecord
from megagpt.rundir.signals import STOP_FILE, StopRequest
from megagpt.utils import ExitCode, RankEnvironment, human_count

if TYPE_CHECKING:
    from megagpt.train import Run

log = logging.getLogger(__name__)

PROMPT_TOKENS = 64
PROMPT_WORDS = 3


def clear_earlier_end(directory: Path) -> None:
    """Remove the crash page, the end record and the hang alarm of an earlier start."""
    shutil.rmtree(directory / "logs" / "watch", ignore_errors=True)
    _crash_file(directory).unlink(missing_ok=True)
    end_record.clear(directory)


def connect_watch(watch: Watch, run: "Run") -> None:
    """Tell the watch the names of this rank and its modules."""
    modules = (item for chunk in run.engine.chunks for item in chunk.named_modules())
    watch.know(run.engine.mesh.name, {id(module): name for name, module in modules if name})


def report_hang(
    states: list[RankState], timeout_s: float, run: "Run | None", directory: Path
) -> None:
    """Show and record a hang, on one rank for all, while every main thread hangs."""
    from megagpt.health.hang_page import hang_page, hang_verdict

    last = last_checkpoint(directory)
    step = run.state.step if run else None
    page = hang_page(
        states,
        timeout_s=timeout_s,
        last_checkpoint=last,
        resume_command=resume_command() if last else None,
        stacks=directory / "logs" / "watch",
    )
    _record(
        EndRecord(end_record.HUNG, ExitCode.FAILED, step, _rank(), hang_verdict(states)), directory
    )
    _publish(page, directory)


def finish(run: "Run", first_step: int, request: StopRequest) -> ExitCode:
    """Record and show the end of a run that is done or was asked to stop; collective."""
    import torch.distributed as dist

    code = ExitCode.PREEMPTED_AND_SAVED if request.ends_the_run else ExitCode.DONE
    if run.engine.mesh.rank == 0:
        (run.directory / STOP_FILE).unlink(missing_ok=True)
        reason, detail = (
            (end_record.PREEMPTED, request.name) if request.ends_the_run else (end_record.DONE, "")
        )
        _record(EndRecord(reason, code, run.state.step, rank=0, detail=detail), run.directory)
        print(
            _saved(run, request) if request.ends_the_run else _outcome(run, first_step), flush=True
        )
    dist.destroy_process_group()
    return code


def _saved(run: "Run", request: StopRequest) -> str:
    return f"{request.name}: saved step {run.state.step} and ended; to resume: {resume_command()}"


def _outcome(run: "Run", first_step: int) -> str:
    """Return what was done, and what the user can type next."""
    total_steps = run.config.megagpt.training.total_steps
    if first_step >= total_steps:
        done = (
            f"already done: {run.directory} is at step {first_step} of {total_steps}; to train "
            f"longer: --set {_twice_as_long(run, first_step)}"
        )
    else:
        done = f"done: step {run.state.step}, {human_count(run.state.tokens)} tokens{_samples(run)}"
    directory = shlex.quote(str(run.directory))
    return f"{done}\nnext: python launch/generate.py --run_dir {directory} {_what_to_say(run)}"


def _twice_as_long(run: "Run", steps: int) -> str:
    """Return the item of `--set` for twice the steps, with the key that the run's length has."""
    training = run.config.megagpt.training
    times = 2 * steps / training.total_steps
    if training.total_epochs is not None:
        return f"megagpt.training.total_epochs={training.total_epochs * times:g}"
    if training.total_tokens is not None:
        return f"megagpt.training.total_tokens={round(training.total_tokens * times)}"
    return f"megagpt.training.total_steps={2 * steps}"


def _what_to_say(run: "Run") -> str:
    """Return the option of `generate` that suits what the run was trained on."""
    if any(dataset.manifest.has_conversations for dataset in run.training.stream.datasets):
        return "--chat"
    prompt = _prompt(run)
    return f"{'--prompt=' if prompt.startswith('-') else '--prompt '}{shlex.quote(prompt)}"


def _samples(run: "Run") -> str:
    """Return where the samples are, if there are any."""
    path = run.directory / "samples.txt"
    return f"; samples in {path}" if path.is_file() and path.stat().st_size else ""


def _prompt(run: "Run") -> str:
    """Return a text to continue, of the kind that the run was trained on.

    The first prompt of its own samples, else the first words of its first document.
    """
    for prompt in run.config.megagpt.training.sample_prompts:
        if prompt.isprintable() and prompt:
            return prompt
    tokens = run.training.stream.datasets[0].split("train")
    text = run.tokenizer.decode(tokens.read(0, min(PROMPT_TOKENS, len(tokens))).tolist())
    lines = (line.strip() for line in text.replace("\ufffd", "").split("\n"))
    words = next((line for line in lines if line.isprintable() and line), "").split()
    return " ".join(words[:PROMPT_WORDS]) or "The"


def end_at_once(heard: signal.Signals, run: "Run | None", directory: Path) -> None:
    """End this process immediately, from any thread; it does not return.

    Before the first step everything is on the disk. Later a save may be cut off; then the
    checkpoint before it counts.
    """
    code = ExitCode.PREEMPTED_AND_SAVED if run is None else ExitCode.FAILED
    step = run.state.step if run else None
    last = last_checkpoint(directory)
    try:
        _record(EndRecord(end_record.ENDED_AT_ONCE, code, step, _rank(), heard.name), directory)
        _show(f"{heard.name}: ended at once; last checkpoint: {last or 'none'}")
    finally:
        os._exit(code)


def crash(error: BaseException, run: "Run | None", directory: Path) -> ExitCode:
    """Show and record an unexpected end; return the exit code."""
    from megagpt.health.guard import StoppedByGuardError

    guard = isinstance(error, StoppedByGuardError)
    code = ExitCode.STOPPED_BY_GUARD if guard else ExitCode.FAILED
    reason = end_record.STOPPED if guard else end_record.FAILED
    step = run.state.step if run else None
    detail = redacted(f"{type(error).__name__}: {error}")
    _record(EndRecord(reason, code, step, _rank(), detail), directory)
    _show_crash(error, run, directory)
    return code


def _record(record: EndRecord, directory: Path) -> None:
    """Write the end record, unless another rank has written one."""
    try:
        if EndRecord.read(directory) is None:
            record.write(directory)
    except OSError as full:
        log.info("the end record was not written: %s", full)


def _show_crash(error: BaseException, run: "Run | None", directory: Path) -> None:
    """Show the page if this rank failed first; ranks that only lost a peer write to their logs."""
    from megagpt.monitoring.monitor import crash_page
    from megagpt.monitoring.rank_log import rank_log_path

    log.info("the run ended early", exc_info=error)  # for the log only: the screen gets the page
    last = last_checkpoint(directory)
    page = crash_page(
        error,
        rank_name=run.engine.mesh.name if run else f"rank {_rank()}",
        last_step=run.state.step if run else None,
        last_checkpoint=last,
        resume_command=resume_command() if last else None,
        log_path=rank_log_path(directory, _rank()),
    )
    _publish(page, directory)


def _publish(page: str, directory: Path) -> None:
    """Show the page of the rank that ended first, and keep it; later ends follow from that one."""
    try:
        with _crash_file(directory).open("x") as file:
            file.write(page)
    except FileExistsError:
        return
    except OSError as full:
        log.info("the crash page was not written to a file: %s", full)
    _show(page)


def _show(text: str) -> None:
    """Print on the screen, if there is one.

    A closed terminal must not change how the run ends.
    """
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _crash_file(directory: Path) -> Path:
    return directory / "logs" / "crash.txt"


def _rank() -> int:
    return RankEnvironment.read().rank


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest committed checkpoint, damaged or not."""
    from megagpt.checkpoint.format import complete_steps, step_directory

    checkpoints = directory / "checkpoints"
    return next((step_directory(checkpoints, step) for step in complete_steps(checkpoints)), None)


def resume_command() -> str:
    """Return the command that was typed.

    If no rank could see it, return this rank's command without the launcher's additions, and with
    the variables that made it a rank if no launcher set them.
    """
    if (command := command_of_launcher()) is not None:
        return shlex.join(command)
    if COMMAND_VARIABLE in os.environ:
        return os.environ[COMMAND_VARIABLE]
    launch = adopt_launch()
    hostfile = (
        " --hostfile HOSTFILE" if launch.launcher == "deepspeed" and len(launch.hosts) > 1 else ""
    )
    started = [word for word in sys.argv if not word.startswith("--local_rank")]
    again = f"{launch.launcher}{hostfile} {shlex.join(started)}"
    if launch.launcher != "python" or launch.world_size == 1:
        return again
    place = " ".join(f"{name}={shlex.quote(os.environ[name])}" for name in OF_A_RANK)
    return f"{place} {again}  # and so every other rank, with its own RANK and LOCAL_RANK"
