"""The outside reference of the tests: ``megagpt.parity.plain`` for a configuration as a dict,
its parallelism left out.
"""

import json

import torch

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
    return plain.train(resolved, steps, dtype=dtype)
