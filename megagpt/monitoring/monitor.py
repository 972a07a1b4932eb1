"""The one object through which the training loop reports.

Every step and every event is one line (a flat object, see `metrics.py`), and every outlet receives
the same lines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from megagpt.health.crash import crash_page
from megagpt.monitoring.metrics import Line, MetricsFile, StepRecord, plain
from megagpt.monitoring.rank_log import open_rank_log
from megagpt.monitoring.samples import SamplesFile
from megagpt.monitoring.screen import Progress, open_screen
from megagpt.monitoring.trackers import TensorboardTracker, WandbTracker
from megagpt.utils import did_you_mean

if TYPE_CHECKING:
    from megagpt.config import RunConfig

__all__ = ["EVENTS", "Monitor", "StepRecord", "crash_page", "open_rank_log"]

EVENTS = (
    "eval",
    "save",
    "resume",
    "change",
    "compile",
    "proof",
    "rewind",
    "skip",
    "sample",
    "stop",
    "straggler",
    "memory",
    "warning",
)

logger = logging.getLogger(__name__)


class Outlet(Protocol):
    """A receiver of lines.

    A failing outlet costs one warning. `retried` says whether it is tried again at the next line (a
    disk may have room again) or closed (a tracker may block for its timeout every time).
    """

    name: str
    retried: bool

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


class Monitor:
    """All outlets of one run; use it as a context manager.

    Every rank makes one, but only the writer's does anything. Only opening can fail the run
    (UserError: the run directory cannot be written): a full disk, a closed terminal or a tracker
    that is down never stops training.
    """

    def __init__(self, openers: Iterable[tuple[str, Callable[[], Outlet]]] = ()) -> None:
        self._outlets: list[Outlet] = []
        self._warned: set[str] = set()
        for name, opener in openers:
            self._guarded(name, partial(self._add, opener))

    @classmethod
    def open(
        cls,
        config: RunConfig,
        run_directory: Path,
        *,
        total_steps: int,
        start_step: int,
        is_writer: bool,
    ) -> Monitor:
        """Open the outlets that `config` asks for.

        Lines of steps after `start_step` are set aside: those steps are repeated.
        """
        if not is_writer:
            return cls()
        progress = Progress(
            title=str(run_directory), total_steps=total_steps, start_step=start_step
        )
        metrics = MetricsFile(run_directory, start_step=start_step)
        openers: list[tuple[str, Callable[[], Outlet]]] = [
            ("metrics.jsonl", lambda: metrics),
            ("samples.txt", lambda: SamplesFile(run_directory)),
        ]
        if config.wandb.enabled:
            openers.append(("wandb", lambda: WandbTracker(config, run_directory)))
        if config.tensorboard.enabled:
            openers.append(
                (
                    "tensorboard",
                    lambda: TensorboardTracker(config, run_directory, start_step=start_step),
                )
            )
        # The screen opens last, so that the others' messages come before the live table, not
        # through it.
        openers.append(("screen", lambda: open_screen(progress, sys.stdout)))
        return cls(openers)

    def step(self, record: StepRecord) -> None:
        self._send(record.as_line())

    def event(self, name: str, *, step: int, **fields: Any) -> None:
        """Record an event out of `EVENTS`.

        An `eval` carries `val_loss` and `split_share`, `source/NAME` for each source of a blend and
        `validation/NAME` for each further validation set.
        Fields are numbers, texts, paths or lists.
        """
        if name not in EVENTS:
            raise ValueError(
                f"event {name!r}: unknown{did_you_mean(name, EVENTS)}; use one of "
                f"{', '.join(EVENTS)}"
            )
        self._send({"event": name, "step": step, **fields})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record `text`, the model's continuation of `prompt` (which `text` does not repeat)."""
        self.event("sample", step=step, prompt=prompt, text=text)

    def close(self) -> None:
        for outlet in reversed(self._outlets):
            self._guarded(outlet.name, outlet.close)
        self._outlets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, opener: Callable[[], Outlet]) -> None:
        self._outlets.append(opener())

    def _send(self, line: Line) -> None:
        line = plain(line)  # not guarded: a value that no line can hold is the caller's mistake
        for outlet in list(self._outlets):
            if not self._guarded(outlet.name, partial(outlet.write, line)) and not outlet.retried:
                self._outlets.remove(outlet)
                self._guarded(outlet.name, outlet.close)  # a live table must restore the terminal

    def _guarded(self, name: str, action: Callable[[], None]) -> bool:
        """Run `action` and return whether it worked.

        Trackers document no closed set of errors, so every Exception counts.
        """
        try:
            action()
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                said = " ".join(str(error).split())  # wandb's errors have several lines
                logger.warning(
                    "%s failed (%s: %s); training continues without it",
                    name,
                    type(error).__name__,
                    said,
                )
            return False
        return True
