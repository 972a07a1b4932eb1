"""What ranks do in the tests of signals, guards, drift and hangs: whole runs that something
happens to.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megagpt import train as loop
from megagpt.health.guard import StoppedByGuardError
from megagpt.health.stragglers import StragglerWatch
from megagpt.parallel import timeouts as waits
from megagpt.rundir.signals import StopRequest
from megagpt.train import Run
from tests.support import faults as sabotage
from tests.support.configurations import Config
from tests.support.jobs.checkpoint import started
from tests.support.jobs.training import held_state


def train_with_requests(
    config: Config,
    directory: Path,
    rank: int,
    requests: dict[int, StopRequest],
    during: str = "training",
) -> dict[str, Any]:
    """Train while one rank is told something in the middle of some steps, or of the
    ``validation`` after them.
    """
    with started(config, directory) as run:
        if run.engine.mesh.rank == rank:
            request_while_loading(run, requests, during)
        request = loop.train(run)
        return {"request": request, "state": run.state, "at_end": held_state(run.engine)}


def request_while_loading(run: Run, requests: dict[int, StopRequest], during: str) -> None:
    """As a signal would: between the loading of a step's samples, or of a validation's, and its
    end.
    """
    loader = run.training if during == "training" else run.validation[0].loader
    load = loader.load

    def load_and_wish(first: int, step: int | None = None) -> Any:
        if (now := step or run.state.step) in requests:
            run.requests.add(requests[now])
        return load(first, step)

    loader.load = load_and_wish


class RecordedClock:
    """Stands for a GPU's stream: it goes on by what the test says, while the host takes no time."""

    every = 1

    def __init__(self) -> None:
        self.now_s = 0.0

    def mark(self) -> float:
        return self.now_s

    def between_s(self, earlier: float, later: float) -> float:
        return later - earlier

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def named_by_a_device(
    work_s: list[float], steps: int, by_host: bool
) -> list[list[tuple[int, float]]]:
    """Who is named after each step, where each rank's stream works this long and then waits for
    the slowest.
    """
    clock, rank, world_size = RecordedClock(), dist.get_rank(), dist.get_world_size()
    mesh: Any = SimpleNamespace(
        device_mesh=SimpleNamespace(mesh=torch.arange(world_size).view(1, world_size, 1))
    )
    watch = StragglerWatch(mesh, torch.device("cpu"), waits.HostClock() if by_host else clock)
    wait_on_device = waits.timed(clock.advance)
    named = []
    for _ in range(steps):
        watch.begin_step()
        clock.advance(work_s[rank])
        wait_on_device(max(work_s) - work_s[rank])
        watch.end_step()
        sums = torch.tensor(watch.share(), dtype=torch.float64)
        if sums.numel():
            dist.all_reduce(sums)
        named.append(watch.named(sums.tolist()))
    return named


def train_sabotaged(config: Config, directory: Path, faults: str) -> dict[str, Any]:
    """Train under faults (see ``tests.support.faults``) to the end, or to where a guard stops."""
    with started(config, directory) as run:
        sabotage.sabotage(run, sabotage.parse(faults))
        outcome: dict[str, Any] = {}
        try:
            loop.train(run)
        except StoppedByGuardError as error:
            outcome["stopped"] = str(error)
        return outcome | {"state": run.state, "at_end": held_state(run.engine)}
