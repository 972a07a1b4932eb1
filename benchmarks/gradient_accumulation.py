"""Measure the error of a step's gradient in bf16, with micro-batches summed in bf16 and in fp32.

    python -m benchmarks.gradient_accumulation

The error is the norm of the difference from the gradient that one plain process computes in fp64
with the same weights, relative to that gradient's norm. Two pipeline ranks; ZeRO 2 untied, or ZeRO
3 tied. The model is tiny, because a CPU multiplies slowly in bf16.
"""

import json
import logging
from typing import Any

from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser

MICRO_BATCHES = (1, 4, 8, 16, 32, 64)
RANKS = 2
WAYS = {  # gradient_reduction, grad_accum_dtype, ZeRO stage; tied at 3
    "bf16_per_step": ("per_step", None, 2),
    "bf16_per_micro_batch": ("per_micro_batch", None, 2),
    "fp32_per_micro_batch": ("per_micro_batch", "fp32", 2),
    "tied_bf16_per_step": ("per_step", None, 3),
    "tied_fp32_per_micro_batch": ("per_micro_batch", "fp32", 3),
}
SHAPE = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_heads": 4,
    "vocab_size": 256,
    "sequence_length": 32,
}


def configuration(
    micro_batches: int, reduction: str, accumulate_in: str | None, stage: int
) -> dict[str, Any]:
    """Return a step of this number of micro-batches."""
    return {
        "train_batch_size": micro_batches,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": accumulate_in} if accumulate_in else {},
        "zero_optimization": {"stage": stage},
        "megagpt": {
            "model": SHAPE | {"tie_embeddings": stage == 3},
            "parallel": {"pipeline": RANKS, "gradient_reduction": reduction},
            "training": {"total_steps": 1},
        },
    }


def exact_gradients(config: Any) -> dict[str, Any]:
    """Return the gradients of the global batch's mean loss in fp64, from the bf16 weights."""
    import torch

    from megagpt.model import GPT, initialise_
    from megagpt.parity import plain

    shape = config.megagpt.model
    model = initialise_(GPT(shape), config.megagpt.training.seed).to(torch.bfloat16).double()
    samples = config.train_batch_size
    tokens, targets = plain.global_batch(0, samples, shape.sequence_length, shape.vocabulary)
    for own in range(samples):
        (model(tokens[own : own + 1], targets[own : own + 1]) / samples).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(micro_batches: int, way: tuple[str, str | None, int]) -> float:
    """Return the error of a step's gradient over all parameters; every rank must call it."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from megagpt.config import RunConfig
    from megagpt.parallel import pipeline
    from megagpt.parallel.engine import build_engine, build_mesh
    from megagpt.parity import compare as parity
    from megagpt.planning.legality import World, require_legal

    run = RunConfig.from_json(json.dumps(configuration(micro_batches, *way)))
    world = World(RANKS, vocabulary=None, bf16_native=True)
    require_legal(run, world=world)
    config = world.resolve(run)
    engine = build_engine(config, build_mesh(config))
    pipeline.accumulate(engine, parity.micro_batches(engine, 0))
    exact = exact_gradients(config)
    squares = torch.zeros(2, dtype=torch.float64)
    for parameter, name in engine.names.items():
        found = safe_get_full_grad(parameter).double()
        squares += torch.stack(((found - exact[name]).square().sum(), exact[name].square().sum()))
    engine.close()
    dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())


def measure() -> list[dict[str, Any]]:
    """Return the rows of the table; every rank must call it."""
    logging.disable(logging.WARNING)
    return [
        {"micro_batches": count}
        | {name: f"{relative_error(count, way):.2e}" for name, way in WAYS.items()}
        for count in MICRO_BATCHES
    ]


def main() -> None:
    from megagpt.parity import local_ranks

    command_parser(description=__doc__.splitlines()[0]).parse_args()
    write_table(
        "gradient_accumulation",
        "benchmarks.gradient_accumulation",
        local_ranks.start(RANKS, measure),
    )


if __name__ == "__main__":
    main()
