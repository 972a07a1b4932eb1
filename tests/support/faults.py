"""Sabotage, for tests of what a run survives: ``train_with_faults.py`` trains under it.

One environment variable names the faults:

    MEGAGPT_FAULTS="kill@rank=1,step=5; slow@rank=1,step=3,seconds=0.2; spike@step=60"

    kill          SIGKILL to itself in the forward pass
    stop          SIGSTOP to itself in the forward pass
    hang          sleeps for ever in the forward pass
    hang_load     sleeps for ever while it loads samples
    slow          sleeps `seconds` while it loads samples, from `step` on
    disk_full     no file grows past 4 KiB, from `step` on
    nan_loss      a loss of NaN
    inf_gradient  an infinite gradient under a finite loss
    spike         ten times the loss and its gradients
    flip_bit      one bit of a value that replicas share, after the update

Without `rank` a fault strikes all ranks. `kill`, `stop`, `hang` and `hang_load` strike `times` (1)
in the life of a run directory, which remembers them in `logs/faults.txt`, so that a run that is
started again gets past them; what corrupts a loss does not strike again where a rewound run makes
the step again with other samples.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from megagpt.utils import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.train import Run

VARIABLE = "MEGAGPT_FAULTS"
LATCHED = ("kill", "stop", "hang", "hang_load")
IN_FORWARD = ("kill", "stop", "hang", "nan_loss", "inf_gradient", "spike")
WHILE_LOADING = ("hang_load", "slow", "disk_full")
KINDS = (*IN_FORWARD, *WHILE_LOADING, "flip_bit")
FROM_STEP_ON = ("slow", "disk_full")
LARGEST_FILE = 4096
SPIKE = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One item of the variable; ``rank`` None stands for every rank."""

    kind: str
    step: int
    rank: int | None = None
    seconds: float = 0.0
    times: int = 1

    def __str__(self) -> str:
        given = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name != "kind"
        }
        stated = ",".join(f"{key}={value}" for key, value in given.items() if value is not None)
        return f"{self.kind}@{stated}"

    def concerns(self, rank: int, step: int) -> bool:
        """Whether it is due on this rank in this step."""
        later = self.kind in FROM_STEP_ON and step > self.step
        return self.rank in (None, rank) and (step == self.step or later)


def parse(text: str) -> list[Fault]:
    """The faults of a variable's text; raises UserError with all that is wrong with it."""
    faults, errors = [], []
    for item in filter(None, (item.strip() for item in text.split(";"))):
        try:
            faults.append(_parse_one(item))
        except ValueError as error:
            errors.append(f"{VARIABLE}: {item}: {error}")
    if errors:
        raise UserError("\n".join(errors))
    return faults


def _parse_one(item: str) -> Fault:
    match = re.fullmatch(r"(\w+)@(\w+=[\w.]+(?:,\w+=[\w.]+)*)", item)
    if match is None:
        raise ValueError("expected KIND@KEY=NUMBER,..., such as kill@rank=1,step=5")
    kind, values = match[1], dict(pair.split("=") for pair in match[2].split(","))
    if kind not in KINDS:
        raise ValueError(f"unknown fault{did_you_mean(kind, KINDS)}; there are {', '.join(KINDS)}")
    keys = [field.name for field in fields(Fault) if field.name != "kind"]
    if unknown := values.keys() - set(keys):
        raise ValueError(
            f"unknown key {min(unknown)}{did_you_mean(min(unknown), keys)}; "
            f"there are {', '.join(keys)}"
        )
    if "step" not in values:
        raise ValueError("step is missing")
    types = get_type_hints(Fault)
    numbers: dict[str, Any] = {
        key: (float if types[key] is float else int)(value) for key, value in values.items()
    }
    return Fault(kind, **numbers)


def from_environment() -> list[Fault]:
    """What this process is to suffer: nothing, in every run that is not a test."""
    return parse(os.environ.get(VARIABLE, ""))


def sabotage(run: Run, faults: list[Fault]) -> None:
    """Arrange for the faults to strike this rank of a run, and say so on the screen."""
    if not faults:
        return
    saboteur = Saboteur(run, faults)
    if saboteur.rank == 0:
        print(
            f"{VARIABLE} sabotages this run: {'; '.join(map(str, faults))}",
            file=sys.stderr,
            flush=True,
        )
    saboteur.hook()


class Saboteur:
    """Strikes one rank; it hooks into the loader, the model and the engine's update of a single
    run.
    """

    def __init__(self, run: Run, faults: list[Fault]) -> None:
        self.run = run
        self.faults = faults
        self.rank = run.engine.mesh.rank
        self.record = run.directory / "logs" / "faults.txt"
        self.cursors: dict[Fault, int] = {}
        self.strikes: dict[str, Callable[[Fault], None]] = {
            "kill": lambda fault: os.kill(os.getpid(), signal.SIGKILL),
            "stop": lambda fault: os.kill(os.getpid(), signal.SIGSTOP),
            "hang": lambda fault: time.sleep(10**6),
            "hang_load": lambda fault: time.sleep(10**6),
            "slow": lambda fault: time.sleep(fault.seconds),
            "disk_full": lambda fault: _limit_files(),
        }

    def hook(self) -> None:
        """From now on the faults strike."""
        load, update = self.run.training.load, self.run.engine.deepspeed.step

        def load_badly(first: int, step: int | None = None) -> Any:
            self._strike(WHILE_LOADING)
            return load(first, step)

        def update_badly(*arguments: Any) -> None:
            before = self.run.engine.deepspeed.global_steps
            update(*arguments)
            if self.run.engine.deepspeed.global_steps > before and self._due(("flip_bit",)):
                _flip_bit(self.run)

        self.run.training.load = load_badly  # type: ignore[method-assign]
        self.run.engine.deepspeed.step = update_badly
        first, *_ = self.run.engine.chunks
        first.register_forward_hook(self._spoil)
        next(iter(first.blocks.values())).register_forward_hook(self._strike_in_forward)

    def _strike_in_forward(self, module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            self._strike(IN_FORWARD)

    def _spoil(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        for fault in self._due(("nan_loss", "inf_gradient", "spike")):
            if self.cursors.setdefault(fault, self.run.state.cursor) == self.run.state.cursor:
                output = _spoilt(output, fault.kind)
        return output

    def _strike(self, kinds: tuple[str, ...]) -> None:
        for fault in self._due(kinds):
            if fault.kind in self.strikes:
                log.warning("%s strikes: %s", VARIABLE, fault)
                self.strikes[fault.kind](fault)

    def _due(self, kinds: tuple[str, ...]) -> list[Fault]:
        step = self.run.state.step + 1
        due = [
            fault
            for fault in self.faults
            if fault.kind in kinds and fault.concerns(self.rank, step)
        ]
        return [fault for fault in due if fault.kind not in LATCHED or self._first_times(fault)]

    def _first_times(self, fault: Fault) -> bool:
        """Count a strike before it is made: there may be no afterwards."""
        self.record.parent.mkdir(exist_ok=True)
        with self.record.open("a+") as file:
            file.seek(0)
            struck = file.read().splitlines().count(f"rank {self.rank}: {fault}")
            if struck < fault.times:
                print(f"rank {self.rank}: {fault}", file=file)
        return struck < fault.times


def _spoilt(output: Tensor, kind: str) -> Tensor:
    """The output of a forward pass, made worse."""
    if kind == "inf_gradient":
        output.register_hook(lambda gradient: gradient * float("inf"))
        return output
    return output * (float("nan") if kind == "nan_loss" else SPIKE)


def _limit_files() -> None:
    """The operating system refuses what would make a file of this process larger, as on a full
    disk.
    """
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


def _flip_bit(run: Run) -> None:
    """The lowest bit of the first element of the last value that other ranks hold alike."""
    import torch

    from megagpt.health.replicas import all_copies

    *_, (_, copies) = all_copies(run.engine)
    *_, (_, values) = copies
    integers = values.view(-1)[:1].view(torch.int32 if values.element_size() == 4 else torch.int16)
    integers ^= 1
