"""The guard of a run's numbers: steps that could not be applied, and losses that jump."""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Self

from megagpt.checkpoint.format import GuardMemory
from megagpt.config import ResolvedConfig
from megagpt.parallel.pipeline import StepResult

MOST_SKIPS_IN_A_ROW = 5  # enough for a bad batch; a run that has diverged never recovers
MOST_REWINDS = 3  # of one process; a spike that returns every time is not caused by the data
WINDOW_STEPS = 50
SPIKE_DEVIATIONS = 6.0
# A normal distribution's standard deviation over its median absolute deviation.
DEVIATIONS_PER_MAD = 1.4826
LEAST_SPIKE = 0.5  # nats above the median; smaller jumps are noise whatever the deviation
HOPELESS = 2.0  # times ln(vocabulary), the loss of a uniform guess, with which a run begins


class StoppedByGuardError(Exception):
    """The run must not continue; the message says why and what to try."""


@dataclass(frozen=True)
class Verdict:
    """What to report about a step.

    ``fatal``: the run must end after it. ``rewind``: the run must return to its checkpoint.
    """

    message: str
    fatal: bool = False
    rewind: bool = False


@dataclass
class Guard:
    """Judges one step at a time; equal on every rank, because the losses are.

    ``on_nonfinite`` skip | stop and ``on_spike`` warn | ignore | skip | rewind, as configured.
    """

    on_nonfinite: str
    on_spike: str
    most_skips_in_a_row: int = MOST_SKIPS_IN_A_ROW
    vocabulary: int | None = None
    learning_rate: float | None = None
    skips_in_a_row: int = 0
    rewinds: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    hopeless: bool = False  # the last loss was, and it was said

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self:
        """Return the guard of a run.

        A dynamic loss scale that starts high halves once per step until it fits, after
        ``hysteresis`` overflows that DeepSpeed's loss scaler ignores; so many skips in a row are
        allowed.
        """
        fp16 = config.fp16
        settings = config.megagpt.training
        scale_falls = (
            fp16.initial_scale_power + fp16.hysteresis
            if fp16.enabled and fp16.loss_scale == 0
            else 0
        )
        return cls(
            settings.on_nonfinite,
            settings.on_spike,
            max(MOST_SKIPS_IN_A_ROW, scale_falls),
            config.megagpt.model.vocabulary,
            config.optimizer.params.lr,
        )

    def remember(self, memory: GuardMemory) -> None:
        """Continue from the state of another process's guard, or of this one at an earlier step."""
        self.recent = deque(memory.recent_losses, maxlen=WINDOW_STEPS)
        self.skips_in_a_row = memory.skips_in_a_row

    @property
    def memory(self) -> GuardMemory:
        """The state that the next verdict depends on."""
        return GuardMemory(tuple(self.recent), self.skips_in_a_row)

    @property
    def may_refuse(self) -> bool:
        """Whether a finite loss may forbid its update, which must then wait for the loss."""
        return self.on_spike in ("skip", "rewind")

    def refuses(self, loss: float) -> bool:
        """Return whether the update for this loss must not be made."""
        return self.may_refuse and self._is_spike(loss)

    def judge(self, step: int, result: StepResult) -> Verdict | None:
        """Return what to report about a step, or None.

        A refused loss does not enter the recent losses.
        """
        if not result.applied:
            return (
                self._refused(step, result.loss)
                if self.refuses(result.loss)
                else self._skipped(step, result)
            )
        self.skips_in_a_row = 0
        spike = self.on_spike == "warn" and self._is_spike(result.loss)
        warning = Verdict(self._jump(step, result.loss)) if spike else None
        if math.isfinite(result.loss):
            self.recent.append(result.loss)
        return self._worse_than_guessing(step, result.loss) or warning

    def _worse_than_guessing(self, step: int, loss: float) -> Verdict | None:
        """Return a warning at the first of several losses far above that of a uniform guess."""
        if self.vocabulary is None:
            return None
        guess = math.log(self.vocabulary)
        said = self.hopeless
        self.hopeless = loss > HOPELESS * guess
        if said or not self.hopeless:
            return None
        found = "" if self.learning_rate is None else f" (found {self.learning_rate:g})"
        return Verdict(
            f"step {step}: loss {loss:.3f} is far above ln({self.vocabulary}) = {guess:.3f}, that "
            f"of a uniform guess: the run diverges; lower optimizer.params.lr{found}, or warm up "
            f"longer"
        )

    def _skipped(self, step: int, result: StepResult) -> Verdict:
        self.skips_in_a_row += 1
        wrong = "a gradient" if math.isfinite(result.loss) else "the loss"
        what = f"step {step}: {wrong} is not finite (loss {result.loss}); weights unchanged"
        if self.on_nonfinite == "stop":
            return Verdict(f"{what}; megagpt.training.on_nonfinite is stop", fatal=True)
        if self.skips_in_a_row >= self.most_skips_in_a_row:
            in_a_row = f"{self.skips_in_a_row} steps in a row"
            return Verdict(
                f"{what}; {in_a_row}: lower optimizer.params.lr, or check the data", fatal=True
            )
        return Verdict(what)

    def _refused(self, step: int, loss: float) -> Verdict:
        self.skips_in_a_row += 1
        what = f"{self._jump(step, loss)}; weights unchanged"
        if self.on_spike == "rewind":
            self.rewinds += 1
            if self.rewinds > MOST_REWINDS:
                return Verdict(
                    f"{what}; rewound {MOST_REWINDS} times already: lower optimizer.params.lr",
                    fatal=True,
                )
            return Verdict(what, rewind=True)
        if self.skips_in_a_row >= self.most_skips_in_a_row:
            in_a_row = f"{self.skips_in_a_row} steps in a row"
            return Verdict(
                f"{what}; {in_a_row}: if these losses are right, --set "
                "megagpt.training.on_spike=warn",
                fatal=True,
            )
        return Verdict(what)

    def _is_spike(self, loss: float) -> bool:
        """Return whether a loss is far above the median of the recent ones.

        Median and median deviation, unlike mean and standard deviation, do not follow a spike that
        was accepted.
        """
        if len(self.recent) < WINDOW_STEPS or not math.isfinite(loss):
            return False
        median = statistics.median(self.recent)
        deviation = DEVIATIONS_PER_MAD * statistics.median(
            abs(value - median) for value in self.recent
        )
        return loss >= median + max(SPIKE_DEVIATIONS * deviation, LEAST_SPIKE)

    def _jump(self, step: int, loss: float) -> str:
        median = statistics.median(self.recent)
        return (
            f"step {step}: loss {loss:.3f} jumped from a median of {median:.3f} over "
            f"{len(self.recent)} steps"
        )
