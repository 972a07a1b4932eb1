"""Draw the pictures of docs/parallelism.md from the planner's own mesh and schedules.

python -m benchmarks.parallelism_figures
"""

import json
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from megagpt.config import RunConfig
from megagpt.planning.layout import Layout
from megagpt.planning.placement import Placement, hosts_of
from megagpt.planning.schedules import actions, bubble, timeline
from megagpt.planning.stages import describe_stage

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
MESH = {"pipeline": 2, "tensor": 2}
RANKS = 8
SLOTS = 4
COLOURS = ("#2b6cb0", "#c05621")  # of the forwards through a rank's stages
LIGHT = ("#bcd4ec", "#f3cfb3")  # of their backwards
TENSOR, PIPE, DATA = "#c05621", "#2f855a", "#6b46c1"
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2))
PIPELINE = 4
MICRO_BATCHES = 8


def main() -> None:
    # The same bytes every time: no dates, no random names.
    pyplot.rcParams |= {"svg.hashsalt": "megagpt", "svg.fonttype": "none", "font.size": 9}
    draw_mesh()
    draw_schedules()


def save(figure: pyplot.Figure, name: str) -> None:
    figure.savefig(FIGURES / name, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)


def draw_mesh() -> None:
    """Draw eight ranks on two hosts: a row for each pipeline rank, a column for data x tensor."""
    layout = example_layout()
    figure, axes = pyplot.subplots(figsize=(8.2, 4.2))
    for place in Placement.of(layout, hosts_of(RANKS, SLOTS)).places:
        x, y = column(place.data, place.tensor), row(place.pipeline)
        axes.add_patch(
            FancyBboxPatch((x, y), 1.4, 0.8, boxstyle="round,pad=0.05", fc="#eef3f8", ec=COLOURS[0])
        )
        axes.text(x + 0.7, y + 0.55, f"rank {place.rank}", ha="center", va="center", weight="bold")
        axes.text(
            x + 0.7,
            y + 0.22,
            f"{place.host}, slot {place.slot}",
            ha="center",
            va="center",
            fontsize=8,
        )
    for stage, layers in enumerate(layout.stages):
        held = describe_stage(layout.model, layers).partition(" (")[0].replace(", ", ",\n")
        axes.text(-0.3, row(stage) + 0.4, f"pipeline {stage}\n{held}", ha="right", va="center")
        for data in range(2):
            arrow(
                axes,
                (column(data, 0) + 1.45, row(stage) + 0.4),
                (column(data, 1) - 0.05, row(stage) + 0.4),
                TENSOR,
            )
        for tensor, below in ((0, 0.25), (1, 0.45)):
            level = row(stage) - below
            arrow(axes, (column(0, tensor) + 0.7, level), (column(1, tensor) + 0.7, level), DATA)
    for data in range(2):
        axes.text(column(data, 1) - 0.3, 1.6, f"data {data}", ha="center", weight="bold")
        for tensor in range(2):
            axes.text(column(data, tensor) + 0.7, 1.15, f"tensor {tensor}", ha="center")
            middle = column(data, tensor) + 1.15
            arrow(axes, (middle, -0.08), (middle, row(1) + 0.88), PIPE)
    legend = {
        TENSOR: "tensor: sums in every block",
        PIPE: "pipeline: hidden states, and their gradients",
        DATA: "data: ZeRO's gathers and reductions",
    }
    for index, (colour, meaning) in enumerate(legend.items()):
        axes.text(0, row(1) - 0.95 - 0.32 * index, meaning, color=colour)
    axes.set(xlim=(-2.0, 8.1), ylim=(row(1) - 1.8, 1.9))
    axes.axis("off")
    save(figure, "mesh.svg")


def column(data: int, tensor: int) -> float:
    """Return the left edge of a rank's box."""
    return 2.0 * (2 * data + tensor) + 0.3 * data


def row(pipeline: int) -> float:
    """Return the lower edge of a rank's box."""
    return -1.9 * pipeline


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "<->", "color": colour, "linewidth": 1.8}
    )


def example_layout() -> Layout:
    """Return GPT-2 on the mesh of the picture."""
    document = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3},
        "megagpt": {
            "model": {"preset": "gpt2-124m"},
            "parallel": MESH,
            "training": {"total_steps": 1},
        },
    }
    run = RunConfig.from_json(json.dumps(document))
    return Layout.of(run.resolved(world_size=RANKS, vocabulary=None, bf16_native=False))


def draw_schedules() -> None:
    """Draw each schedule: four ranks, eight micro-batches, backward twice as long as forward."""
    figure, rows = pyplot.subplots(len(SCHEDULES), 1, figsize=(9.6, 6.0), sharex=True)
    for axes, (schedule, virtual) in zip(rows, SCHEDULES, strict=True):
        orders = actions(schedule, PIPELINE, virtual, MICRO_BATCHES)
        spans = timeline(orders, lambda stage: 1 / virtual, lambda stage: 2 / virtual)  # noqa: B023
        for rank, done in enumerate(spans):
            for span in done:
                chunk = span.action.stage // PIPELINE
                colour = COLOURS[chunk] if span.action.forward else LIGHT[chunk]
                box = (span.start, PIPELINE - 1 - rank), span.end - span.start, 0.92
                axes.add_patch(Rectangle(*box, fc=colour, ec="white", lw=0.8))
                axes.text(
                    (span.start + span.end) / 2,
                    PIPELINE - 0.56 - rank,
                    f"{span.action.micro_batch + 1}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if span.action.forward else "#333333",
                )
        held = f", {virtual} stages a rank" if virtual > 1 else ""
        axes.set_title(f"{schedule}{held}: idle {bubble(spans):.0%}", loc="left", fontsize=10)
        axes.set(ylim=(-0.1, PIPELINE), yticks=[PIPELINE - 0.54 - rank for rank in range(PIPELINE)])
        axes.set_yticklabels([f"rank {rank}" for rank in range(PIPELINE)])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    rows[-1].set(
        xlim=(0, 33.5),
        xticks=[],
        xlabel="time; dark: forward, light: backward; numbers: micro-batches",
    )
    figure.tight_layout()
    save(figure, "schedules.svg")


if __name__ == "__main__":
    main()
