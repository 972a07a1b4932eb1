"""Compare the trainer's pipeline with DeepSpeed's PipelineEngine: ZeRO 1 in fp32, 1F1B.

    python -m benchmarks.peer_pipeline_engine

Both have the same model, data and stages. They run in the same ranks and take turns of one step, so
that a busy machine slows both alike. A ratio is the median over the turns; below 1 the trainer is
faster. Every loss must be equal, or the script fails. DeepSpeed's engine runs on a CPU over gloo
unchanged. It only gets the stages' boundaries, because it would count the embedding's parameters as
work.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser, whole_number

SHAPES = {
    "1M": {
        "num_layers": 6,
        "hidden_size": 96,
        "num_heads": 4,
        "vocab_size": 1024,
        "sequence_length": 64,
    },
    "10M": {
        "num_layers": 6,
        "hidden_size": 320,
        "num_heads": 5,
        "vocab_size": 8192,
        "sequence_length": 256,
    },
}
MICRO_BATCHES = 8
PIPELINE = 2
TOLERANCE = 1e-5  # of a loss, relative; the same sums in another order
Step = Callable[[int], float]  # trains on the global batch of that number and returns its loss


def configuration(shape: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Return a run of that shape over the ranks, as in a JSON file."""
    return {
        "train_batch_size": MICRO_BATCHES * world_size // PIPELINE,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1},
        "megagpt": {
            "model": shape | {"tie_embeddings": False},
            "parallel": {"pipeline": PIPELINE},
            "training": {"total_steps": 1_000_000},
        },
    }


def trainer(config: Any) -> tuple[Any, Step]:
    """Return the trainer's engine and its step."""
    from megagpt.parallel import pipeline
    from megagpt.parallel.engine import build_engine, build_mesh
    from megagpt.parity import compare as parity

    engine = build_engine(config, build_mesh(config))
    return (
        engine,
        lambda number: pipeline.train_step(engine, parity.micro_batches(engine, number)).loss,
    )


def peer(engine: Any) -> tuple[Any, Step]:
    """Return a PipelineEngine and its step, with the layers and stages of the trainer's engine."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from torch import Tensor, nn

    from megagpt.model import GPT, Context, Head, initialise_
    from megagpt.parallel.engine import deepspeed_config, parameter_groups, stage_layers
    from megagpt.parity import compare as parity

    class Layer(nn.Module):
        """An embedding or block as a function of one tensor."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, Context())

    class Last(nn.Module):
        """The head, whose layer returns its input.

        PipelineEngine computes the loss outside the layers, from what the last one returns; here
        the head is both.
        """

        def __init__(self, head: Head) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return x

        def loss(self, x: Tensor, targets: Tensor) -> Tensor:
            return self.head(x, targets)

    class CutAsOurs(PipelineModule):
        def _partition_layers(self, method: str = "") -> None:
            spans = stage_layers(config)
            self.parts = [span.start for span in spans] + [spans[-1].stop]
            self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    config, mesh = engine.config, engine.mesh
    model = initialise_(GPT(config.megagpt.model), config.megagpt.training.seed)
    assert model.embedding is not None
    assert model.head is not None
    names = {parameter: name for name, parameter in model.named_parameters()}
    last = Last(model.head)
    layers = [Layer(model.embedding), *(Layer(block) for block in model.blocks.values()), last]
    with redirect_stdout(StringIO()):
        module = CutAsOurs(layers, num_stages=mesh.pipeline_size, loss_fn=last.loss)
    theirs, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameter_groups(module, names),
        config=deepspeed_config(config, "cpu"),
    )

    def step(number: int) -> float:
        data: Iterator[Any] = ((m.tokens, m.targets) for m in parity.micro_batches(engine, number))
        return float(theirs.train_batch(data))

    return theirs, step


def losses(shape: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Return the losses of the steps by engine; every rank must call it."""
    engine, ours = trainer(resolve(shape))
    other, theirs = peer(engine)
    try:
        return {
            "megagpt": [ours(number) for number in range(steps)],
            type(other).__name__: [theirs(number) for number in range(steps)],
        }
    finally:
        engine.deepspeed.destroy()
        other.destroy()


def resolve(shape: dict[str, Any]) -> Any:
    """Return the resolved configuration of these ranks."""
    import torch.distributed as dist

    from megagpt.config import RunConfig

    world_size = dist.get_world_size()
    text = json.dumps(configuration(shape, world_size))
    return RunConfig.from_json(text).resolved(
        world_size=world_size, vocabulary=None, bf16_native=False
    )


@dataclass(frozen=True)
class Turn:
    """One step: its loss, the seconds until all ranks ended it, all ranks' processor seconds."""

    loss: float
    time_s: float
    processor_s: float


def take_turn(step: Step, number: int) -> Turn:
    """Take a step; every rank must call it."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    started, processor_started = time.perf_counter(), time.process_time()
    loss = step(number)
    processor_s = torch.tensor(time.process_time() - processor_started, dtype=torch.float64)
    dist.all_reduce(processor_s)
    return Turn(loss, time.perf_counter() - started, float(processor_s))


def measure(shape: str, rounds: int) -> dict[str, Any]:
    """Return a row of the table; every rank must call it.

    Raises ValueError if losses differ.
    """
    logging.disable(logging.WARNING)
    engine, ours = trainer(resolve(SHAPES[shape]))
    other, theirs = peer(engine)
    turns = [(take_turn(ours, number), take_turn(theirs, number)) for number in range(rounds + 2)]
    for number, (own, peers) in enumerate(turns):
        if abs(own.loss - peers.loss) > TOLERANCE * peers.loss:
            raise ValueError(
                f"step {number}: the trainer's loss is {own.loss}, PipelineEngine's {peers.loss}"
            )
    engine.deepspeed.destroy()
    other.destroy()
    turns = turns[2:]  # the first two warm up
    own_s, other_s = ([turn.time_s for turn in of] for of in zip(*turns, strict=True))
    time_ratio = statistics.median(own.time_s / peers.time_s for own, peers in turns)
    processor_ratio = statistics.median(own.processor_s / peers.processor_s for own, peers in turns)
    return {
        "parameters": shape,
        "mesh": f"pipeline {engine.mesh.pipeline_size} x data {engine.mesh.data_size}",
        "megagpt_step_s": f"{statistics.median(own_s):.3f}",
        "pipeline_engine_step_s": f"{statistics.median(other_s):.3f}",
        "step_time_ratio": f"{time_ratio:.3f}",
        "processor_time_ratio": f"{processor_ratio:.3f}",
    }


def main() -> None:
    from megagpt.parity import local_ranks

    parser = command_parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole_number(1), default=20)
    arguments = parser.parse_args()
    jobs = [
        (ranks, measure, shape, arguments.rounds)
        for ranks in (PIPELINE, 2 * PIPELINE)
        for shape in SHAPES
    ]
    write_table(
        "peer_pipeline_engine",
        "benchmarks.peer_pipeline_engine",
        [local_ranks.start(*job) for job in jobs],
    )


if __name__ == "__main__":
    main()
