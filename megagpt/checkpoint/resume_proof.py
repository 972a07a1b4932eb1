"""Proof that a resume continues the saved run: repeat the step after the save and compare.

    checkpoints/step_00000100/next_step.json    samples, loss and gradient norm of step 101, sealed

The loss of a step depends on every weight, on the samples and on the dropout masks, and is known
before the update, so almost any error of a resume changes its bits. It does not depend on Adam's
moments; the SHA-256 of their files covers those.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Self

from pydantic.dataclasses import dataclass

from megagpt.checkpoint.format import FORMAT_VERSION, STRICT, Count, TrainState, read_sealed, sealed
from megagpt.utils import write_atomically

log = logging.getLogger(__name__)

NEXT_STEP = "next_step.json"
# Relative; another mesh sums in another order.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}


@dataclass(frozen=True, config=STRICT)
class NextStep:
    """The result of the step after a checkpoint, on samples [first_sample, last_sample].

    Numbers that are not finite are None, as is the norm of a step that was refused before its norm
    was computed. ``conditions`` is what its bits depend on.
    """

    step: Count
    first_sample: Count
    last_sample: Count
    loss: float | None
    grad_norm: float | None
    conditions: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls, step: int, samples: range, loss: float, grad_norm: float, conditions: Mapping[str, Any]
    ) -> Self:
        """Return the record of a step that was just made."""
        return cls(
            step, samples[0], samples[-1], _finite(loss), _finite(grad_norm), dict(conditions)
        )

    @classmethod
    def read(cls, checkpoint: Path) -> Self | None:
        """Return the record beside a checkpoint, or None if there is none.

        Raise DamagedCheckpointError.
        """
        return (
            read_sealed(cls, checkpoint, NEXT_STEP) if (checkpoint / NEXT_STEP).exists() else None
        )

    def follows(self, state: TrainState) -> bool:
        """Return whether the step began with that state.

        False after a rewind, which skips samples.
        """
        return (self.step, self.first_sample) == (state.step + 1, state.cursor)

    def write_once(self, checkpoint: Path) -> None:
        """Write the record beside a checkpoint that has none.

        If the disk refuses, only the proof is lost.
        """
        path = checkpoint / NEXT_STEP
        try:
            if checkpoint.is_dir() and not path.exists():
                write_atomically(path, sealed(asdict(self)))
        except OSError as error:
            log.warning("%s: not written (%s); a resume from it cannot be proven", path, error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@plain_dataclass(frozen=True)
class Comparison:
    """The comparison of a step with its record.

    ``message`` is for the screen, and says what to do if they differ.
    """

    proven: bool
    message: str


def compare(recorded: NextStep, replayed: NextStep, checkpoint: Path) -> Comparison:
    """Return whether a resumed run repeated the recorded step.

    Under the same conditions on a CPU, equal to the last bit; otherwise within ``TOLERANCES`` of
    the less precise of the two.
    """
    if (recorded.step, recorded.first_sample) != (replayed.step, replayed.first_sample):
        return _differs(
            f"step {recorded.step} read samples from {recorded.first_sample}",
            recorded,
            replayed,
            checkpoint,
        )
    exact = (
        recorded.conditions == replayed.conditions and replayed.conditions.get("device") == "cpu"
    )
    bound = 0.0 if exact else max(_tolerance(recorded), _tolerance(replayed))
    difference = max(
        _difference(recorded.loss, replayed.loss), _norm_difference(recorded, replayed)
    )
    if difference > bound:
        return _differs(
            f"expected {'the same bits' if exact else f'within {bound:g}'}",
            recorded,
            replayed,
            checkpoint,
        )
    agreement = (
        "to the last bit" if difference == 0 else f"within {difference:.1e} (allowed {bound:g})"
    )
    return Comparison(
        True,
        f"resume proven: step {replayed.step} gives loss {replayed.loss} and gradient norm "
        f"{replayed.grad_norm} as before, {agreement}",
    )


def _difference(before: float | None, now: float | None) -> float:
    """Return the relative difference; infinite if only one of them is finite."""
    if before is None or now is None:
        return 0.0 if before is now else math.inf
    return abs(before - now) / max(abs(before), abs(now), 1e-30)


def _norm_difference(recorded: NextStep, replayed: NextStep) -> float:
    """Return the relative difference of the norms; 0 if one is unknown.

    A guard may have refused the step on one side before its norm was computed.
    """
    refused = recorded.grad_norm is None or replayed.grad_norm is None
    return 0.0 if refused else _difference(recorded.grad_norm, replayed.grad_norm)


def _tolerance(of: NextStep) -> float:
    return TOLERANCES.get(str(of.conditions.get("precision")), max(TOLERANCES.values()))


def _differs(expected: str, recorded: NextStep, replayed: NextStep, checkpoint: Path) -> Comparison:
    """Return the failed comparison: both results, and what to do."""
    return Comparison(
        False,
        f"RESUME NOT PROVEN: step {replayed.step} now gives loss {replayed.loss}, gradient norm "
        f"{replayed.grad_norm} from sample {replayed.first_sample}; the run that saved "
        f"{checkpoint.name} had loss {recorded.loss}, gradient norm {recorded.grad_norm} "
        f"({expected}). The weights are not those that were saved, or this machine computes "
        f"differently; stop the run, move {checkpoint} away and start again to resume from the "
        "checkpoint before it",
    )
