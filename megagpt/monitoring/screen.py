"""What a run shows while it trains: a live table on a terminal, else one line per logged step."""

from __future__ import annotations

import math
import os
import statistics
import textwrap
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol, TextIO

from megagpt.common.text import without_control_characters
from megagpt.monitoring.metrics import Line, StepRecord, named_losses
from megagpt.utils import abandoned_on_failure, human_count, human_duration

if TYPE_CHECKING:  # rich takes 0.1 s to import and only a terminal needs it
    from rich.console import RenderableType
    from rich.panel import Panel
    from rich.table import Table

# The ETA uses the median of these step times, which an evaluation or a save does not move.
ETA_WINDOW_RECORDS = 50
REFRESH_INTERVAL_S = 0.1
UNKNOWN = "n/a"


class Progress:
    """What is known of a run now; both screens are views of it."""

    def __init__(self, *, title: str, total_steps: int, start_step: int) -> None:
        self.title = title
        self.total_steps = total_steps
        self.step = start_step
        self.record: StepRecord | None = None
        # The step and the loss of the newest evaluation; by key those of named sets and sources.
        self.validation: tuple[int, float] | None = None
        self.named: dict[str, tuple[int, float]] = {}
        self.sample = ""
        self._step_times_s: deque[float] = deque(maxlen=ETA_WINDOW_RECORDS)

    def update(self, line: Line) -> None:
        """Take in a step record or an event."""
        event = line.get("event")
        if event is None:
            self.record = StepRecord.from_line(line)
            self.step = self.record.step
            self._step_times_s.append(self.record.step_time_s)
        elif event == "rewind":
            self.step = line["step"]
        elif event == "eval":
            if "val_loss" in line:
                self.validation = _at_step(line, line["val_loss"])
            for key, loss in named_losses(line).items():
                self.named[key] = _at_step(line, loss)
        elif event == "sample":
            self.sample = line["prompt"] + line["text"]

    @property
    def eta(self) -> str:
        """The time left at the median speed of the last records."""
        if not self._step_times_s:
            return UNKNOWN
        return human_duration(
            statistics.median(self._step_times_s) * max(self.total_steps - self.step, 0)
        )


def _at_step(line: Line, loss: float | None) -> tuple[int, float]:
    return line["step"], math.nan if loss is None else loss


class Screen(Protocol):
    """The outlet to the user's screen.

    Any method may raise OSError if the terminal or the pipe is gone.
    """

    name: str
    retried: bool

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


def open_screen(progress: Progress, stream: TextIO) -> Screen:
    """Return the live table on a terminal that can move its cursor, else plain lines."""
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveScreen(progress, stream)
    return PlainScreen(progress, stream)


class PlainScreen:
    """One line per logged step: for files, pipes and the logs of a cluster."""

    name = "screen"
    retried = False

    def __init__(self, progress: Progress, stream: TextIO) -> None:
        self._progress = progress
        self._stream = stream

    def write(self, line: Line) -> None:
        self._progress.update(line)
        text = event_text(line) if "event" in line else self._step_text(StepRecord.from_line(line))
        # One write: ranks share the pipe, and another rank's line could come between two writes.
        with abandoned_on_failure(self._stream):
            self._stream.write(without_control_characters(text) + "\n")
            self._stream.flush()

    def _step_text(self, record: StepRecord) -> str:
        return (
            f"step {record.step}/{self._progress.total_steps}  loss {record.loss:.4f}  "
            f"{human_count(record.tokens_per_s)} tokens/s  MFU {format_mfu(record.mfu)}  ETA "
            f"{self._progress.eta}"
        )

    def close(self) -> None:
        with abandoned_on_failure(self._stream):
            self._stream.flush()


class LiveScreen:
    """A table that is redrawn in place; events scroll by above it.

    It is redrawn from the training thread, at most every `REFRESH_INTERVAL_S`: rich's own thread
    would wake up between kernel launches, and would hold locks across a fork of data workers.
    """

    name = "screen"
    retried = False

    def __init__(self, progress: Progress, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._progress = progress
        self._stream = stream
        self._console = Console(file=stream, highlight=False)
        self._live = Live(progress_panel(progress), console=self._console, auto_refresh=False)
        self._drawn_at_s = 0.0
        with abandoned_on_failure(stream):
            self._live.start(refresh=True)

    def write(self, line: Line) -> None:
        self._progress.update(line)
        with abandoned_on_failure(self._stream):
            self._show(line)

    def _show(self, line: Line) -> None:
        if "event" in line:
            self._console.print(
                without_control_characters(event_text(line)), markup=False, emoji=False
            )
        now_s = time.monotonic()
        if now_s - self._drawn_at_s >= REFRESH_INTERVAL_S:
            self._drawn_at_s = now_s
            self._live.update(progress_panel(self._progress), refresh=True)

    def close(self) -> None:
        """Leave the last state of the table on the terminal and restore the cursor."""
        with abandoned_on_failure(self._stream):
            self._live.update(progress_panel(self._progress))
            self._live.stop()


def event_text(line: Line) -> str:
    """Return an event as a person reads it.

    For example `step 100 eval val_loss 2.4134 on 30 % of the split`. A sample's text is indented
    below.
    """
    heading = f"step {line['step']}  {line['event']}"
    if line["event"] == "sample":
        return f"{heading}  {line['prompt']!r}\n" + textwrap.indent(
            line["prompt"] + line["text"], "    "
        )
    details = (_detail(key, value) for key, value in line.items() if key not in ("event", "step"))
    return "  ".join([heading, *details])


def _detail(key: str, value: object) -> str:
    if key == "split_share" and isinstance(value, float):
        return f"on {100 * value:.3g} % of the split"
    return f"{key} {_short(value)}"


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def progress_panel(progress: Progress) -> Panel:
    """Return the live table: a bar, the numbers in two columns, the newest sample."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    sample = Text(
        without_control_characters(" ".join(progress.sample.split())),
        no_wrap=True,
        overflow="ellipsis",
    )
    parts: list[RenderableType] = [_progress_bar(progress), Text(""), _numbers(progress)]
    if progress.sample:
        parts += [
            Text(""),
            Text.assemble(("sample  ", "dim"), sample, no_wrap=True, overflow="ellipsis"),
        ]
    return Panel(
        Group(*parts), title=Text(progress.title, "bold"), title_align="left", border_style="dim"
    )


def _progress_bar(progress: Progress) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=progress.total_steps, completed=progress.step)
    row.add_row(f"step {progress.step}/{progress.total_steps}", bar, f"ETA {progress.eta}")
    return row


def _numbers(progress: Progress) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2), expand=True)
    for style, ratio in (("dim", 2), ("bold", 3), ("dim", 2), ("", 3)):
        table.add_column(style=style, ratio=ratio, no_wrap=True)
    for row in _rows(progress):
        table.add_row(*row)
    return table


def _rows(progress: Progress) -> list[tuple[str, str, str, str]]:
    """Return two (label, value) pairs per row: results on the left, cost on the right."""
    record = progress.record
    if record is None:
        return [("loss", UNKNOWN, "tokens/s", UNKNOWN)]
    validation = UNKNOWN if progress.validation is None else _loss_text(progress.validation)
    rate = (
        f"{human_count(record.tokens_per_s)} ({human_count(record.tokens_per_s_per_device)} per "
        f"device)"
    )
    return [
        ("loss", f"{record.loss:.4f}", "tokens/s", rate),
        ("val loss", validation, "MFU", format_mfu(record.mfu)),
        ("learning rate", f"{record.learning_rate:.2e}", "memory", f"{record.memory_gib:.2f} GiB"),
        ("grad norm", f"{record.grad_norm:.3f}", "skipped steps", str(record.skipped_steps)),
        *_pairs([(key, _loss_text(found)) for key, found in progress.named.items()]),
    ]


def _loss_text(found: tuple[int, float]) -> str:
    return "{1:.4f} at step {0}".format(*found)


def _pairs(items: list[tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    """Return rows of two items each."""
    padded = [*items, ("", "")]
    return [(*padded[place], *padded[place + 1]) for place in range(0, len(items), 2)]


def format_mfu(mfu: float | None) -> str:
    """Return model FLOPs utilisation in percent."""
    return UNKNOWN if mfu is None else f"{100 * mfu:.1f} %"
