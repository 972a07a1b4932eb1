"""What ranks do in the tests of host reads: a whole run, in which reads of tensors are counted.

On a GPU each of these waits until the device has reached it. On a CPU, where these tests run,
every tensor counts as one on a device.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megagpt import train as loop
from tests import REPOSITORY
from tests.support.configurations import Config
from tests.support.jobs.checkpoint import started

DEEPSPEED = Path(deepspeed.__file__).parent
READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__bool__,
    Tensor.nonzero,
    torch.equal,
    torch.allclose,
}


class HostReads(TorchFunctionMode):
    """``by_step[step]`` counts the reads in ``megagpt/...:line`` and ``deepspeed/...:line``.

    What neither of them asks for, such as the tests, does not count.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        super().__init__()
        self.step = step
        self.by_step: dict[int, Counter[str]] = defaultdict(Counter)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in READS and (place := _asker()) is not None:
            self.by_step[self.step()][place] += 1
        return function(*args, **(kwargs or {}))


def _asker() -> str | None:
    """The innermost line of this project or of DeepSpeed that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(DEEPSPEED):
            return f"deepspeed/{path.relative_to(DEEPSPEED)}:{frame.f_lineno}"
        for package in ("megagpt", "kernels"):
            if path.is_relative_to(REPOSITORY / package):
                return f"{path.relative_to(REPOSITORY)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def reads_by_step(config: Config, directory: Path) -> dict[int, Counter[str]]:
    """Train to the end; return what was read after so many whole steps, by line."""
    with started(config, directory) as run:
        with HostReads(lambda: run.state.step) as seen:
            loop.train(run)
        return dict(seen.by_step)
