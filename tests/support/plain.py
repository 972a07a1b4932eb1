"""The outside reference of the tests: ``megagpt.parity.plain`` for a configuration as a dict,
its parallelism left out.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from megagpt import lora
from megagpt.config import RunConfig
from megagpt.parity import plain
from tests.support.configurations import Config


def train(config: Config, steps: int, dtype: torch.dtype = torch.float32) -> plain.PlainRun:
    """Losses, gradient norms before clipping, the weights at the start, weights and moments at
    the end.
    """
    alone = config | {
        "megagpt": {key: value for key, value in config["megagpt"].items() if key != "parallel"}
    }
    resolved = RunConfig.from_json(json.dumps(alone)).resolved(
        world_size=1, vocabulary=None, bf16_native=True
    )
    with adapters_that_act():
        return plain.train(resolved, steps, dtype=dtype)


@contextmanager
def adapters_that_act() -> Iterator[None]:
    """B does not begin at zero: else A hardly moves in three steps, and by rounding in bf16."""

    def drawn(shape: torch.Size) -> torch.Tensor:
        generator = torch.Generator().manual_seed(shape.numel())
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator).bfloat16().float()

    with patch.object(lora, "first_b", drawn):
        yield
