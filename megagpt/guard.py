"""Watches over a run's numbers: steps that could not be applied, losses that jump."""

import math
from collections import deque
from dataclasses import dataclass, field

from megagpt.pipeline import StepResult

MOST_SKIPS_IN_A_ROW = 5  # dynamic loss scales halve a few times at a start; a run that has diverged never recovers
WINDOW_STEPS = 50
SPIKE_DEVIATIONS = 6.0
LEAST_SPIKE = 0.5  # nats above the mean; smaller jumps are noise whatever the deviation


class StoppedByGuardError(Exception):
    """The run must not go on; the message says why and what to try."""


@dataclass
class Guard:
    """One step's verdict at a time. ``on_nonfinite`` skip | stop, ``on_spike`` warn | ignore, as configured."""

    on_nonfinite: str
    on_spike: str
    skips_in_a_row: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))

    def judge(self, step: int, result: StepResult) -> str | None:
        """None, or a warning to report; raises StoppedByGuardError where the run has to end."""
        if not result.applied:
            return self._skipped(step, result)
        self.skips_in_a_row = 0
        warning = self._spike(step, result.loss) if self.on_spike == "warn" else None
        self.recent.append(result.loss)
        return warning

    def _skipped(self, step: int, result: StepResult) -> str:
        self.skips_in_a_row += 1
        what = f"step {step}: a gradient is not finite (loss {result.loss}); weights unchanged"
        if self.on_nonfinite == "stop":
            raise StoppedByGuardError(f"{what}; megagpt.training.on_nonfinite is stop")
        if self.skips_in_a_row >= MOST_SKIPS_IN_A_ROW:
            raise StoppedByGuardError(
                f"{what}; {self.skips_in_a_row} steps in a row: lower optimizer.params.lr, or look at the data"
            )
        return what

    def _spike(self, step: int, loss: float) -> str | None:
        if len(self.recent) < WINDOW_STEPS:
            return None
        mean = sum(self.recent) / len(self.recent)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in self.recent) / len(self.recent))
        if loss < mean + max(SPIKE_DEVIATIONS * deviation, LEAST_SPIKE):
            return None
        return f"step {step}: loss {loss:.3f} jumped from a mean of {mean:.3f} over {len(self.recent)} steps"
