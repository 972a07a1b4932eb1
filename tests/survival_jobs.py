"""What ranks do in the tests of signals, guards, drift and hangs: whole runs that something happens to."""

from pathlib import Path
from typing import Any

from megagpt import faults as sabotage
from megagpt import train as loop
from megagpt.guard import StoppedByGuardError
from megagpt.signals import Wish
from megagpt.train import Run
from tests.checkpoint_jobs import started
from tests.configurations import Config
from tests.jobs import held_state


def train_with_wishes(
    config: Config, directory: Path, rank: int, wishes: dict[int, Wish], during: str = "training"
) -> dict[str, Any]:
    """Train while one rank is told something in the middle of some steps, or of the ``validation`` after them."""
    with started(config, directory) as run:
        if run.engine.mesh.rank == rank:
            wish_while_loading(run, wishes, during)
        wish = loop.train(run)
        return {"wish": wish, "state": run.state, "at_end": held_state(run.engine)}


def wish_while_loading(run: Run, wishes: dict[int, Wish], during: str) -> None:
    """As a signal would: between the loading of a step's samples, or of a validation's, and its end."""
    loader = getattr(run, during)
    load = loader.load

    def load_and_wish(first: int, step: int | None = None) -> Any:
        if (now := step or run.state.step) in wishes:
            run.wishes.add(wishes[now])
        return load(first, step)

    loader.load = load_and_wish


def train_sabotaged(config: Config, directory: Path, faults: str) -> dict[str, Any]:
    """Train under faults (see ``megagpt.faults``) to the end, or to where a guard stops."""
    with started(config, directory) as run:
        sabotage.sabotage(run, sabotage.parse(faults))
        outcome: dict[str, Any] = {}
        try:
            loop.train(run)
        except StoppedByGuardError as error:
            outcome["stopped"] = str(error)
        return outcome | {"state": run.state, "at_end": held_state(run.engine)}
