"""Compare the planner's step times with steps that others have published.

    python -m benchmarks.published_steps

`published_steps.json` holds dense bf16 and fp16 steps with all their settings, each with its
source: every row of 2,048 tokens of llm-foundry's tables, and those of other trainers that state
enough. For each device one number is fitted, the share of its peak that large products reach, on
every second row, so that half of those are predicted too slow and half too fast. The other rows are
predicted with it; no other number is fitted. The planner's default for the device is this number
(`efficiency` in megagpt/planning/cost/devices.json).
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser
from megagpt.config import RunConfig
from megagpt.planning.cost.accelerators import ACCELERATORS
from megagpt.planning.cost.performance import estimate
from megagpt.planning.flops import model_flops_per_token
from megagpt.planning.layout import Layout
from megagpt.planning.plan import assume

DATA = Path(__file__).with_suffix(".json")
RANKS_PER_HOST = 8
DEVICES = ("A100", "H100")  # fitted together with the variants that begin so
HALVINGS = 40


@dataclass(frozen=True)
class Step:
    """A published step: its row, its layout, and the seconds that it took."""

    row: dict[str, Any]
    layout: Layout
    published_s: float

    def predicted_s(self, efficiency: float) -> float:
        """Return the planner's seconds with this share of the device's peak."""
        rates = assume(
            ACCELERATORS[self.row["device"]],
            min(RANKS_PER_HOST, self.row["ranks"]),
            efficiency=efficiency,
            network_gb_per_s=self.row["network_gb_per_s"],
        )
        return estimate(self.layout, rates).step_s

    def error(self, efficiency: float) -> float:
        """Return the relative error of the prediction; below 0: too fast."""
        return self.predicted_s(efficiency) / self.published_s - 1


def published_steps() -> list[Step]:
    """Return every published step."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    return [_step(row, data["models"][row["model"]]) for row in data["steps"]]


def _step(row: dict[str, Any], model: dict[str, Any]) -> Step:
    keys = ("tensor", "pipeline", "sequence", "virtual_stages")
    parallel = {key: row[key] for key in keys if key in row}
    if "virtual_stages" in parallel:
        parallel["schedule"] = "interleaved"
    document = {
        "train_batch_size": row["batch"],
        "train_micro_batch_size_per_gpu": row["micro_batch"],
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": row["zero"]},
        "megagpt": {
            "model": model | {"sequence_length": row["sequence_length"]},
            "parallel": parallel,
            "training": {"total_steps": 1, "recompute": row["recompute"]},
        },
    }
    run = RunConfig.from_json(json.dumps(document))
    layout = Layout.of(run.resolved(world_size=row["ranks"], vocabulary=None, bf16_native=True))
    return Step(row, layout, _published_s(row, layout))


def _published_s(row: dict[str, Any], layout: Layout) -> float:
    """Return the seconds of a step from what was published: seconds, tokens per second, or MFU."""
    if "step_s" in row:
        return float(row["step_s"])
    if "tokens_per_s_per_device" in row:
        return layout.tokens_per_step / (row["tokens_per_s_per_device"] * row["ranks"])
    peak = 1e12 * ACCELERATORS[row["device"]].peak_tflops * row["ranks"] * row["mfu"]
    return layout.tokens_per_step * model_flops_per_token(layout.model) / peak


def fitted_efficiency(steps: list[Step]) -> float:
    """Return the share of the peak with which the median error of these steps is 0."""
    low, high = 0.1, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if statistics.median(step.error(middle) for step in steps) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def of_device(steps: list[Step], device: str) -> tuple[list[Step], list[Step]]:
    """Return a device's steps: every second one to fit, and the others to predict."""
    own = [step for step in steps if step.row["device"].startswith(device)]
    return own[::2], own[1::2]


def main() -> None:
    """Print the errors and write the table."""
    command_parser(description="Compare planned with published step times.").parse_args()
    steps = published_steps()
    rows = []
    for device in DEVICES:
        to_fit, to_predict = of_device(steps, device)
        efficiency = fitted_efficiency(to_fit)
        errors = [abs(step.error(efficiency)) for step in to_predict]
        print(
            f"{device}: efficiency {efficiency:.3f}, fitted on {len(to_fit)} steps; error on the "
            f"other {len(to_predict)}: median {statistics.median(errors):.1%}, worst "
            f"{max(errors):.1%}"
        )
        rows += [_row(step, "fitted", efficiency) for step in to_fit]
        rows += [_row(step, "predicted", efficiency) for step in to_predict]
    write_table("published_steps", "benchmarks.published_steps", rows)


def _row(step: Step, role: str, efficiency: float) -> dict[str, Any]:
    layout = step.layout
    return {
        "device": step.row["device"],
        "model": step.row["model"],
        "ranks": layout.world_size,
        "pipeline": layout.pipeline,
        "tensor": layout.tensor,
        "zero": layout.zero.stage,
        "micro_batch": layout.micro_batch,
        "recompute": layout.recompute,
        "published_s": f"{step.published_s:.4g}",
        "predicted_s": f"{step.predicted_s(efficiency):.4g}",
        "error": f"{step.error(efficiency):+.3f}",
        "role": role,
        "source": step.row["source"],
    }


if __name__ == "__main__":
    main()
