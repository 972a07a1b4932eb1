"""The training loop: fetch, forward-backward, guard, step, report, save."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megagpt.checkpoint.execution import conditions
from megagpt.checkpoint.format import TrainState, step_directory
from megagpt.checkpoint.resume import resume
from megagpt.checkpoint.resume_proof import NextStep, compare
from megagpt.checkpoint.saver import Saved, Saver
from megagpt.config import ResolvedConfig
from megagpt.data.tokenizer import Tokenizer
from megagpt.health.guard import Guard, StoppedByGuardError, Verdict
from megagpt.health.replicas import find_drift
from megagpt.health.stragglers import StragglerWatch
from megagpt.health.watch import Pulse
from megagpt.inference.generate import generate
from megagpt.monitoring.metrics import LOSS_OF_SOURCE, LOSS_OF_VALIDATION_SET
from megagpt.monitoring.monitor import Monitor, StepRecord
from megagpt.parallel import pipeline
from megagpt.parallel.batches import BatchLoader
from megagpt.parallel.device import CPU_REMEASURING_S, peak_memory, remeasured_peak_flops
from megagpt.parallel.engine import Engine
from megagpt.parallel.validation import ValidationSet
from megagpt.planning.flops import model_flops_utilisation
from megagpt.rundir.changes import UNCHANGED, Changes
from megagpt.rundir.signals import StopRequest, StopRequests
from megagpt.utils import UserError

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 96
SAMPLE_TEMPERATURE = 0.8
REMEASURING_SHARE = 0.01  # at most, of the time of a run on a CPU


@dataclass
class Run:
    """The objects that the training loop works with.

    ``peak_flops`` is the device's peak in FLOP/s; None if unknown. A CPU's may rise during the run
    (see Meter).
    """

    config: ResolvedConfig
    engine: Engine
    training: BatchLoader
    validation: list[ValidationSet]  # empty if evaluation is off
    tokenizer: Tokenizer
    directory: Path
    peak_flops: float | None
    monitor: Monitor = field(default_factory=Monitor)
    state: TrainState = field(default_factory=TrainState)
    requests: StopRequests = field(default_factory=StopRequests)
    pulse: Pulse = field(default_factory=Pulse)
    changes: Changes = UNCHANGED
    unproven: NextStep | None = None  # the recorded step that the first one after a resume repeats
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.engine, self.directory, self.training.stream.fingerprint)


def train(run: Run) -> StopRequest:
    """Train from ``run.state`` to the configured number of steps; every rank must call it.

    Return the request that ended the run early, after saving, or ``StopRequest.NOTHING``.
    """
    settings = run.config.megagpt.training
    guard = Guard.of(run.config)
    meter = Meter(run)
    stragglers = StragglerWatch(run.engine.mesh, run.engine.device)
    guard.remember(run.state.guard)
    first_step_began_s = time.perf_counter()
    first_step = run.state.step + 1
    while run.state.step < settings.total_steps:
        step = run.state.step + 1
        stragglers.begin_step()
        run.pulse.beat("loading samples", step)
        micro_batches = run.training.load(run.state.cursor, step)
        run.pulse.beat("training")
        result = pipeline.train_step(
            run.engine,
            micro_batches,
            guard.refuses if guard.may_refuse else None,
            lambda: [*requested(run), *stragglers.share()],
        )
        stragglers.end_step()
        if settings.compile != "none" and step == first_step:
            taken_s = round(time.perf_counter() - first_step_began_s, 1)
            run.monitor.event("compile", step=step, first_step_s=taken_s)
        run.state = advanced(run.state, run.config, result)
        meter.after_step(result)
        meter.pause(partial(follow_saves, run, result))
        report_stragglers(run, stragglers.named(result.sums[len(StopRequest) :]))
        request = greatest_request(run, result.sums[: len(StopRequest)])
        verdict = guard.judge(step, result)
        run.state = replace(run.state, guard=guard.memory)
        if verdict is not None:
            report(run, verdict, applied=result.applied)
            if verdict.rewind and rewind(run):
                guard.remember(run.state.guard)
                if request is StopRequest.SAVE:
                    run.requests.add(request)  # save after the next step
                continue
        if not request.ends_the_run and (work := due_between_steps(run, request)):
            for task in work:
                meter.pause(partial(task, run))
            # That work can take minutes; honour a SIGTERM that arrived meanwhile.
            request = agreed_request(run)
            if request is StopRequest.SAVE:
                run.requests.add(request)  # save after the next step
        if request.ends_the_run:
            leave(run, request)
            return request
    finish_saves(run)
    return StopRequest.NOTHING


def due_between_steps(run: Run, request: StopRequest) -> list[Callable[[Run], None]]:
    """Return the tasks due after this step, in order; the same on every rank.

    Every rank must run all of them.
    """
    settings = run.config.megagpt.training
    step = run.state.step
    intervals: list[tuple[int, Callable[[Run], None]]] = [
        (settings.drift_check_interval_steps, require_equal_replicas),
        (settings.eval_interval_steps, report_validation),
        (settings.sample_interval_steps, write_samples),
        (1 if request is StopRequest.SAVE else run.config.megagpt.checkpoint.interval_steps, save),
    ]
    return [
        task
        for interval_steps, task in intervals
        if due(interval_steps, step, settings.total_steps)
    ]


def due(interval_steps: int, step: int, last_step: int) -> bool:
    """Return whether a task is due: every ``interval_steps`` and after the last step.

    An interval of 0 means never.
    """
    return interval_steps > 0 and (step % interval_steps == 0 or step == last_step)


def requested(run: Run) -> list[float]:
    """Take the requests to this rank: a 1 in the place of the greatest, to be summed over ranks."""
    request = run.requests.take()
    return [float(request is kind) for kind in StopRequest]


def agreed_request(run: Run) -> StopRequest:
    """Return the greatest request of any rank, between steps; every rank must call it."""
    sums = pipeline.to_device(requested(run), run.engine.device)
    dist.all_reduce(sums)
    return greatest_request(run, sums.tolist())


def greatest_request(run: Run, sums: Sequence[float]) -> StopRequest:
    """Return the greatest request of any rank, given the sums of what they ``requested``.

    A signal can reach the ranks up to 30 s apart; this makes all ranks act at the same step. A
    request to end is ignored after the last step.
    """
    request = max(kind for kind, count in zip(StopRequest, sums, strict=True) if count)
    last_step = run.config.megagpt.training.total_steps
    return StopRequest.NOTHING if request.ends_the_run and run.state.step >= last_step else request


def leave(run: Run, request: StopRequest) -> None:
    """Save if needed, and record who asked the run to end; every rank must call it."""
    run.monitor.event("stop", step=run.state.step, wish=request.name)
    if not run.saver.holds(run.state):
        save(run)
    finish_saves(run)


def advanced(state: TrainState, config: ResolvedConfig, result: pipeline.StepResult) -> TrainState:
    """Return the state after a step.

    A skipped step consumes its samples too, so that the step number alone determines the data
    order.
    """
    return replace(
        state,
        step=state.step + 1,
        cursor=state.cursor + config.train_batch_size,
        tokens=state.tokens + config.tokens_per_step,
        applied_steps=state.applied_steps + result.applied,
        skipped_steps=state.skipped_steps + (not result.applied),
    )


def report(run: Run, verdict: Verdict, *, applied: bool) -> None:
    """Record the guard's verdict on a step; if it is fatal, save and raise StoppedByGuardError.

    The weights are safe to save: the step did not change them. Every rank must call it.
    """
    first = run.state.cursor - run.config.train_batch_size
    samples = {"first_sample": first, "last_sample": run.state.cursor - 1}
    run.monitor.event(
        "warning" if applied else "skip", step=run.state.step, message=verdict.message, **samples
    )
    if not verdict.fatal:
        return
    try:
        save(run)
        finish_saves(run)
    except UserError as error:
        run.monitor.event("warning", step=run.state.step, message=f"not saved: {error}")
    raise StoppedByGuardError(verdict.message)


def rewind(run: Run) -> bool:
    """Return to the newest checkpoint and skip the samples read since; every rank must call it.

    Return False if there is no checkpoint yet.
    """
    finish_saves(run)
    known = run.changes.known()
    resumed = resume(run.engine, run.directory, known, run.training.stream.fingerprint)
    if resumed is None:
        return False
    state = resumed.state
    passed_over = resumed.passed_over
    run.saver.goes_on_from(state, changed=resumed.differs)
    left_out = {"first_sample": state.cursor, "last_sample": run.state.cursor - 1}
    run.monitor.event(
        "rewind", step=state.step, from_step=run.state.step, passed_over=passed_over, **left_out
    )
    run.state = replace(state, cursor=run.state.cursor)
    return True


def report_stragglers(run: Run, slow_ranks: list[tuple[int, float]]) -> None:
    """Record the ranks that the others wait for; every rank must call it."""
    for rank, ratio in slow_ranks:
        name = [run.engine.mesh.name]
        dist.broadcast_object_list(name, src=rank)
        run.monitor.event(
            "straggler", step=run.state.step, rank=rank, who=name[0], times_as_long=ratio
        )


def require_equal_replicas(run: Run) -> None:
    """Raise StoppedByGuardError on every rank if a rank's values differ from its replicas'.

    Every rank must call it.
    """
    drift = find_drift(run.engine)
    if drift is not None:
        interval = run.config.megagpt.training.drift_check_interval_steps
        raise StoppedByGuardError(
            f"step {run.state.step}: {drift}. Its memory or device is faulty. Replicas are "
            f"compared every {interval} steps: checkpoints saved since the last passed check may "
            "be corrupt; remove them and start again without that device"
        )


def report_validation(run: Run) -> None:
    """Validate and record the losses; every rank must call it."""
    losses: dict[str, float] = {}
    for validation in run.validation:
        found = validation.losses(run.engine, partial(run.pulse.beat, "validating"))
        if validation.name is None:
            losses |= {"val_loss": found.mean, "split_share": validation.share}
            losses |= {f"{LOSS_OF_SOURCE}{name}": loss for name, loss in found.by_source.items()}
        else:
            losses[f"{LOSS_OF_VALIDATION_SET}{validation.name}"] = found.mean
    run.monitor.event("eval", step=run.state.step, **losses)


@torch.no_grad()
def write_samples(run: Run) -> None:
    """Continue each configured prompt and record the text.

    Every rank must call it: ZeRO-3 gathers parameters in each forward.
    """
    prompts = run.config.megagpt.training.sample_prompts
    run.pulse.beat("writing samples")
    try:
        texts = generate(
            partial(pipeline.logits, run.engine),
            run.tokenizer,
            prompts,
            sequence_length=run.config.megagpt.model.sequence_length,
            reread_after=run.config.megagpt.model.reread_after,
            max_new_tokens=SAMPLE_TOKENS,
            temperature=SAMPLE_TEMPERATURE,
            seed=run.state.step,
        )
    except ValueError as error:  # logits are not finite; the guard decides whether to stop
        run.monitor.event("warning", step=run.state.step, message=f"no sample: {error}")
        return
    for prompt, text in zip(prompts, texts, strict=True):
        run.monitor.sample(run.state.step, prompt, text)


def save(run: Run) -> None:
    """Save the state, in the background if configured; every rank must call it."""
    run.pulse.beat("saving")
    report_saves(run, run.saver.save(run.state))


def finish_saves(run: Run) -> None:
    """Wait for a save in the background; every rank must call it before it ends."""
    run.pulse.beat("saving")
    report_saves(run, run.saver.finish())


def report_saves(run: Run, committed: list[Saved]) -> None:
    """Record newly committed checkpoints; a background save commits some steps later."""
    for saved in committed:
        run.monitor.event("save", at_step=run.state.step, **vars(saved))
        if saved.waited_s > 0:
            waited = (
                f"saving step {saved.step} waited {saved.waited_s:.1f} s for the previous "
                f"checkpoint to be written"
            )
            run.monitor.event(
                "warning",
                step=saved.step,
                message=f"{waited}; raise megagpt.checkpoint.interval_steps",
            )


def follow_saves(run: Run, result: pipeline.StepResult) -> None:
    """Prove a resume, record this step for the next resume, and advance a background save.

    Every rank must call it after each step.
    """
    samples = range(run.state.cursor - run.config.train_batch_size, run.state.cursor)
    made = NextStep.of(
        run.state.step, samples, result.loss, result.grad_norm, conditions(run.engine)
    )
    if run.unproven is not None:
        comparison = compare(
            run.unproven, made, step_directory(run.saver.checkpoints, made.step - 1)
        )
        run.monitor.event(
            "proof" if comparison.proven else "warning",
            step=run.state.step,
            message=comparison.message,
        )
        run.unproven = None
    run.saver.follow(made)
    report_saves(run, run.saver.poll())


class Meter:
    """Step times, reported every ``log_interval_steps``; pauses do not count as training.

    A CPU's peak was measured at the start, perhaps while other programs slowed it down. It is
    measured again now and then, and the highest is kept.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reserved_gib = 0.0
        self.steps = 0
        self.paused_s = 0.0
        self.started = time.perf_counter()
        self.opened = self.started
        self.remeasuring_s = 0.0

    def after_step(self, result: pipeline.StepResult) -> None:
        """Count a step, and report if a report is due."""
        self.steps += 1
        total_steps = self.run.config.megagpt.training.total_steps
        if due(
            self.run.config.megagpt.monitor.log_interval_steps, self.run.state.step, total_steps
        ):
            step_time_s = (time.perf_counter() - self.started - self.paused_s) / self.steps
            self._remeasure_peak()
            self.run.monitor.step(self._record(result, step_time_s))
            self._report_reserved()
            self.steps = 0
            self.paused_s = 0.0
            self.started = time.perf_counter()

    def _remeasure_peak(self) -> None:
        run = self.run
        now = time.perf_counter()
        affordable_s = REMEASURING_SHARE * (now - self.opened) - self.remeasuring_s
        if (
            run.peak_flops is None
            or run.engine.device.type != "cpu"
            or affordable_s < CPU_REMEASURING_S
        ):
            return
        run.peak_flops = remeasured_peak_flops(run.engine.device, run.peak_flops)
        self.remeasuring_s += time.perf_counter() - now

    def _report_reserved(self) -> None:
        """Record the memory reserved by the allocator each time it has grown by 1 %.

        The GPU runs out when reserved memory, not allocated memory, fills it.
        """
        peak = peak_memory(self.run.engine.device)
        if peak.reserved is not None and peak.reserved > 1.01 * self.reserved_gib:
            self.reserved_gib = peak.reserved
            sizes = {"allocated_gib": peak.allocated, "reserved_gib": peak.reserved}
            self.run.monitor.event("memory", step=self.run.state.step, **sizes)

    def pause(self, work: Callable[[], None]) -> None:
        """Run work that does not count as training time."""
        started = time.perf_counter()
        work()
        self.paused_s += time.perf_counter() - started

    def _record(self, result: pipeline.StepResult, step_time_s: float) -> StepRecord:
        state = self.run.state
        config = self.run.config
        devices = self.run.engine.mesh.world_size
        tokens_per_s = config.tokens_per_step / step_time_s
        return StepRecord(
            step=state.step,
            tokens=state.tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            step_time_s=step_time_s,
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_device=tokens_per_s / devices,
            mfu=self._mfu(tokens_per_s / devices),
            memory_gib=peak_memory(self.run.engine.device).allocated,
            skipped_steps=state.skipped_steps,
        )

    def _mfu(self, tokens_per_s_per_device: float) -> float | None:
        """Return the MFU, 0 to 1, or None if the peak is unknown.

        A CPU that trains faster than its measured peak shows that the peak is higher, so it is
        unknown.
        """
        if self.run.peak_flops is None:
            return None
        mfu = model_flops_utilisation(
            self.run.config.megagpt.model,
            tokens_per_s_per_device=tokens_per_s_per_device,
            peak_flops_per_s=self.run.peak_flops,
            lora=self.run.config.megagpt.training.lora,
        )
        too_low = mfu > 1 and self.run.engine.device.type == "cpu"
        return None if too_low else mfu
