"""Watches over a run's numbers: steps that could not be applied, losses that jump."""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Self

from megagpt.config import ResolvedConfig
from megagpt.pipeline import StepResult

MOST_SKIPS_IN_A_ROW = 5  # one bad batch is survived; a run that has diverged never recovers
WINDOW_STEPS = 50
SPIKE_DEVIATIONS = 6.0
LEAST_SPIKE = 0.5  # nats above the mean; smaller jumps are noise whatever the deviation


class StoppedByGuardError(Exception):
    """The run must not go on; the message says why and what to try."""


@dataclass(frozen=True)
class Verdict:
    """What to report of a step; ``fatal`` where the run has to end after that."""

    message: str
    fatal: bool = False


@dataclass
class Guard:
    """One step's verdict at a time. ``on_nonfinite`` skip | stop, ``on_spike`` warn | ignore, as configured."""

    on_nonfinite: str
    on_spike: str
    most_skips_in_a_row: int = MOST_SKIPS_IN_A_ROW
    skips_in_a_row: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self:
        """The guard of a run; a dynamic loss scale that starts high halves once a step until it fits.

        DeepSpeed's loss scaler first lets ``hysteresis`` overflows go by.
        """
        fp16, settings = config.fp16, config.megagpt.training
        scale_falls = fp16.initial_scale_power + fp16.hysteresis if fp16.enabled and fp16.loss_scale == 0 else 0
        return cls(settings.on_nonfinite, settings.on_spike, max(MOST_SKIPS_IN_A_ROW, scale_falls))

    def judge(self, step: int, result: StepResult) -> Verdict | None:
        """None where there is nothing to say."""
        if not result.applied:
            return self._skipped(step, result)
        self.skips_in_a_row = 0
        warning = self._spike(step, result.loss) if self.on_spike == "warn" else None
        self.recent.append(result.loss)
        return warning

    def _skipped(self, step: int, result: StepResult) -> Verdict:
        self.skips_in_a_row += 1
        what = f"step {step}: a gradient is not finite (loss {result.loss}); weights unchanged"
        if self.on_nonfinite == "stop":
            return Verdict(f"{what}; megagpt.training.on_nonfinite is stop", fatal=True)
        if self.skips_in_a_row >= self.most_skips_in_a_row:
            in_a_row = f"{self.skips_in_a_row} steps in a row"
            return Verdict(f"{what}; {in_a_row}: lower optimizer.params.lr, or look at the data", fatal=True)
        return Verdict(what)

    def _spike(self, step: int, loss: float) -> Verdict | None:
        if len(self.recent) < WINDOW_STEPS:
            return None
        mean = sum(self.recent) / len(self.recent)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in self.recent) / len(self.recent))
        if loss < mean + max(SPIKE_DEVIATIONS * deviation, LEAST_SPIKE):
            return None
        return Verdict(f"step {step}: loss {loss:.3f} jumped from a mean of {mean:.3f} over {len(self.recent)} steps")
