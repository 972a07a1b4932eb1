"""Draw the pictures of docs/parallelism.md from the planner's own mesh and schedules.

python -m benchmarks.parallelism_figures
"""

import json
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

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
# Of the picture of schedules, in pixels: a forward is a unit long, the longest schedule 33 units.
UNIT, ROW_HEIGHT, PANEL_HEIGHT, LEFT = 20, 24, 132, 44
WIDTH = LEFT + 34 * UNIT


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
    """Draw each schedule: four ranks, eight micro-batches, backward twice as long as forward.

    Written as plain SVG: matplotlib takes eight times as many bytes for two hundred boxes.
    """
    panels = [panel(*schedule) for schedule in SCHEDULES]
    height = PANEL_HEIGHT * len(panels) + 24
    below = "time; dark: forward, light: backward; numbers: micro-batches"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="9">',
        "<style>.dark{fill:#fff}.light{fill:#333}.number{text-anchor:middle}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        *(
            f'<g transform="translate(0 {PANEL_HEIGHT * index})">{drawn}</g>'
            for index, drawn in enumerate(panels)
        ),
        f'<text x="{WIDTH / 2:g}" y="{height - 8}" class="number" font-size="10">{below}</text>',
        "</svg>",
    ]
    (FIGURES / "schedules.svg").write_text("\n".join(lines) + "\n")


def panel(schedule: str, virtual: int) -> str:
    """Return the SVG of one schedule: a row of boxes for each rank, below its title."""
    orders = actions(schedule, PIPELINE, virtual, MICRO_BATCHES)
    spans = timeline(orders, lambda stage: 1 / virtual, lambda stage: 2 / virtual)
    held = f", {virtual} stages a rank" if virtual > 1 else ""
    title = f"{schedule}{held}: idle {bubble(spans):.0%}"
    parts = [f'<text x="{LEFT}" y="15" font-size="11">{title}</text>']
    for rank, done in enumerate(spans):
        top = 22 + ROW_HEIGHT * rank
        middle = top + ROW_HEIGHT / 2 + 3
        parts.append(f'<text x="4" y="{middle:g}" class="light">rank {rank}</text>')
        for span in done:
            shade = COLOURS if span.action.forward else LIGHT
            text = "dark" if span.action.forward else "light"
            left = LEFT + UNIT * span.start
            width = UNIT * (span.end - span.start)
            parts.append(
                f'<rect x="{left:g}" y="{top}" width="{width - 1:g}" height="{ROW_HEIGHT - 2}" '
                f'fill="{shade[span.action.stage // PIPELINE]}"/>'
                f'<text x="{left + width / 2:g}" y="{middle:g}" class="{text} number">'
                f"{span.action.micro_batch + 1}</text>"
            )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
