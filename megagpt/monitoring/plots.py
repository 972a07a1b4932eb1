"""The curves of a run as SVG pictures: one figure per quantity, over the steps."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from megagpt.monitoring.metrics import History, StepRecord, named_losses
from megagpt.utils import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1f5fa8"
ACCENT = "#d1662b"
FAINT = "#8a929c"
ALARM = "#b3261e"
# Left, bottom, right, top: room for tick labels and the title.
MARGINS_INCHES = (0.6, 0.5, 0.15, 0.3)
MOST_POINTS = 500  # more than a screen shows; the band shows what averaging hides

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text: smaller files that can be searched
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """A quantity of the step records: its name, how it is read, its scale."""

    title: str
    value: Callable[[StepRecord], float | None]
    scale: Literal["from zero", "free", "logarithmic"] = "from zero"
    tick: Callable[[float], str] = "{:g}".format


NAMED_LOSSES = "loss by validation set and source"
LOSS = Plot("loss", lambda record: record.loss, scale="free")
SMALL_PLOTS = (
    Plot("gradient norm", lambda record: record.grad_norm, scale="logarithmic"),
    Plot("learning rate", lambda record: record.learning_rate),
    Plot("tokens/s", lambda record: record.tokens_per_s, tick=human_count),
    Plot("MFU, %", lambda record: None if record.mfu is None else 100 * record.mfu),
    Plot("step time, s", lambda record: record.step_time_s),
    Plot("memory, GiB", lambda record: record.memory_gib),
)


@dataclass(frozen=True)
class Curve:
    """A thinned series: the mean, the lowest and the highest value of each bucket of steps."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def thinned(points: Sequence[tuple[int, float | None]], most: int = MOST_POINTS) -> Curve:
    """Return `points` (step, value) in at most `most` buckets.

    Values that are None or not finite are left out.
    """
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    size = max(1, math.ceil(len(finite) / most))
    buckets = [finite[start : start + size] for start in range(0, len(finite), size)]
    values = [[value for _, value in bucket] for bucket in buckets]
    return Curve(
        steps=[sum(step for step, _ in bucket) / len(bucket) for bucket in buckets],
        mean=[sum(bucket) / len(bucket) for bucket in values],
        low=[min(bucket) for bucket in values],
        high=[max(bucket) for bucket in values],
    )


def loss_picture(history: History) -> bytes:
    """Return training and validation loss as SVG, with resumes and skipped steps marked."""

    def draw(axes: Axes) -> None:
        _draw_curve(axes, LOSS, history.steps, label="training")
        evaluations = [
            (event["step"], event.get("val_loss")) for event in history.events_named("eval")
        ]
        validation = thinned(evaluations)
        if validation.steps:
            axes.plot(
                validation.steps,
                validation.mean,
                color=ACCENT,
                marker="o",
                markersize=3,
                label="validation",
            )
        _mark_events(axes, history)
        axes.legend(loc="upper right")

    return _svg(draw, LOSS.title, width_inches=11.2, height_inches=3.6)


def named_losses_picture(history: History) -> bytes | None:
    """Return the losses of further validation sets and of sources as SVG, None without."""
    points: dict[str, list[tuple[int, float | None]]] = {}
    for event in history.events_named("eval"):
        for key, loss in named_losses(event).items():
            points.setdefault(key, []).append((event["step"], loss))
    if not points:
        return None

    def draw(axes: Axes) -> None:
        for key, own in points.items():
            curve = thinned(own)
            axes.plot(curve.steps, curve.mean, marker="o", markersize=3, label=key)
        axes.legend(loc="upper right")

    return _svg(draw, NAMED_LOSSES, width_inches=11.2, height_inches=3.6)


def small_pictures(history: History) -> list[tuple[str, bytes]]:
    """Return (title, SVG) of every other known quantity; MFU may be missing."""
    return [
        (
            plot.title,
            _svg(partial(_draw_curve, plot=plot, records=history.steps), plot.title, 5.5, 2.5),
        )
        for plot in SMALL_PLOTS
        if _curve(plot, history.steps).steps
    ]


def _curve(plot: Plot, records: Sequence[StepRecord]) -> Curve:
    return thinned([(record.step, plot.value(record)) for record in records])


def _draw_curve(
    axes: Axes, plot: Plot, records: Sequence[StepRecord], label: str | None = None
) -> None:
    from matplotlib.ticker import LogLocator

    curve = _curve(plot, records)
    axes.fill_between(curve.steps, curve.low, curve.high, color=INK, alpha=0.25, linewidth=0)
    axes.plot(curve.steps, curve.mean, color=INK, linewidth=1.4, label=label)
    if plot.scale == "logarithmic" and min(curve.low, default=0) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(lambda value, _: plot.tick(value))
    elif plot.scale == "from zero":
        # Room above a flat line, and a span if all values are zero.
        axes.set_ylim(0, 1.08 * max(curve.high) or 1)
    axes.yaxis.set_major_formatter(lambda value, _: plot.tick(value))


def _mark_events(axes: Axes, history: History) -> None:
    for index, event in enumerate(history.events_named("resume")):
        axes.axvline(
            event["step"], color=FAINT, linestyle=":", label="_resume" if index else "resume"
        )
    skips = [event["step"] for event in history.events_named("skip")]
    if skips:
        top = axes.get_xaxis_transform()
        axes.plot(
            skips,
            [0.02] * len(skips),
            "^",
            color=ALARM,
            transform=top,
            label="skipped step",
            clip_on=False,
        )


def _svg(
    draw: Callable[[Axes], None], title: str, width_inches: float, height_inches: float
) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width_inches, height_inches))
        left, bottom, right, top = MARGINS_INCHES  # fixed, so that the axes of a column align
        axes = figure.add_axes(
            (
                left / width_inches,
                bottom / height_inches,
                1 - (left + right) / width_inches,
                1 - (bottom + top) / height_inches,
            )
        )
        draw(axes)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step")
        output = io.BytesIO()
        figure.savefig(output, format="svg", metadata={"Date": None})
    return output.getvalue()
