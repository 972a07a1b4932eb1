"""The same few steps, from one seed, under every strategy that these ranks can host, against one plain process.

Each strategy is a whole engine: mesh, ZeRO stage, offload, schedule. What `planner.py` refuses is counted, not tried.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt import boxes, pipeline, plain
from megagpt.agreement import require_agreement
from megagpt.config import ResolvedConfig, RunConfig
from megagpt.engine import Engine, build_engine, build_mesh, training_device
from megagpt.pipeline import MicroBatch
from megagpt.plain import PlainRun, document_ids, dropout_seeds, global_batch
from megagpt.planner import refusals

TOLERANCE = 1e-4  # of a loss or norm; fp32 sums in another order were seen to differ by 1e-6
OF_WEIGHTS = 100  # times that, of a parameter's largest change: Adam divides small differences by small numbers
MOST_TENSOR, MOST_PIPELINE = 8, 8  # the model has as many key-value heads, and twice as many blocks
HEAD_SIZE = 8
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Strategy:
    """One way to train: the ``parallel`` section, the ZeRO stage, where optimizer and parameters lie."""

    parallel: dict[str, Any]
    stage: int
    optimizer: str = "none"
    parameters: str = "none"

    def words(self) -> list[str]:
        """A row's first columns."""
        mesh = [str(self.parallel.get(axis, 1)) for axis in ("pipeline", "tensor")]
        names = {"schedule", "virtual_stages", "sequence", "gradient_reduction"}
        rest = [f"{key}={value}" for key, value in self.parallel.items() if key in names]
        places = ["device" if place == "none" else place for place in (self.optimizer, self.parameters)]
        return [*mesh, str(self.stage), *places, " ".join(rest) or "-"]


@dataclass(frozen=True)
class Difference:
    """The largest relative differences from the plain process, and the largest share of the weights on any rank."""

    loss: float
    norm: float
    weights: float
    held: float

    def within(self, tolerance: float) -> bool:
        """False for what is not a number, too."""
        return self.loss <= tolerance and self.norm <= tolerance and self.weights <= OF_WEIGHTS * tolerance


def strategies(world_size: int, nvme: bool) -> Iterator[Strategy]:
    """Every mesh of so many ranks with every ZeRO stage and offload, and each mesh's other schedules once."""
    places = ("none", "cpu", "nvme") if nvme else ("none", "cpu")
    for tensor in _divisors(world_size, MOST_TENSOR):
        for stages in _divisors(world_size // tensor, MOST_PIPELINE):
            mesh = {"pipeline": stages, "tensor": tensor}
            for stage in range(4):
                yield from (Strategy(mesh, stage, optimizer) for optimizer in places)
            yield from (Strategy(mesh, 3, optimizer, "cpu") for optimizer in places)
            other: list[dict[str, Any]] = []
            if stages > 1:
                other += [{"schedule": "gpipe"}, {"schedule": "interleaved", "virtual_stages": 2}]
                other += [{"gradient_reduction": "per_micro_batch"}]
            if tensor > 1:
                other += [{"sequence": True}]
            yield from (Strategy(mesh | keys, stage) for keys in other for stage in range(4))


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]


def small(config: RunConfig, world_size: int, steps: int) -> dict[str, Any]:
    """The configuration's kind of model and optimizer, in fp32, small and the same for every strategy of a world."""
    model, adam = config.megagpt.model, config.optimizer.params
    kind = {key: getattr(model, key) for key in ("position", "norm", "activation", "bias", "tie_embeddings")}
    queries = 1 if model.num_kv_heads == model.num_heads else 2  # a key-value head, one for each tensor rank
    shape = {
        "vocab_size": 256,
        "vocabulary": 250,
        "num_layers": 2 * min(world_size, MOST_PIPELINE),
        "hidden_size": queries * MOST_TENSOR * HEAD_SIZE,
        "num_heads": queries * MOST_TENSOR,
        "num_kv_heads": MOST_TENSOR,
        "sequence_length": 16,
        "dropout": 0.1,
    }
    return {
        "train_batch_size": 2 * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": list(adam.betas), "weight_decay": adam.weight_decay},
        },
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": False},
        "megagpt": {
            "model": shape | kind,
            "data": {"document_mask": config.megagpt.data.document_mask},
            "training": {"total_steps": steps, "seed": config.megagpt.training.seed},
        },
    }


def resolved(document: dict[str, Any], strategy: Strategy, world_size: int, nvme_path: str | None) -> ResolvedConfig:
    """The small run under a strategy; ConfigError where that cannot even be described."""
    zero: dict[str, Any] = {"stage": strategy.stage}
    if strategy.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0}  # small parameters too are cut
    for section, place in (("offload_optimizer", strategy.optimizer), ("offload_param", strategy.parameters)):
        if place != "none":
            zero[section] = {"device": place} | ({"nvme_path": nvme_path} if place == "nvme" else {})
    own = document | {"zero_optimization": zero, "megagpt": document["megagpt"] | {"parallel": strategy.parallel}}
    return RunConfig.from_json(json.dumps(own)).resolved(world_size=world_size, vocabulary=None, bf16_native=False)


def run(config: RunConfig, steps: int, nvme_path: str | None, tolerance: float = TOLERANCE) -> bool:
    """Compare and print; every rank must call it. Whether all strategies equal the plain process."""
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)  # each strategy would say again what Adam it has
    require_agreement(config)
    world_size = dist.get_world_size()
    document = small(config, world_size, steps)
    found = [(s, resolved(document, s, world_size, nvme_path)) for s in strategies(world_size, nvme_path is not None)]
    legal = [(strategy, own) for strategy, own in found if not refusals(own)]
    reference = plain.train(legal[0][1], steps, training_device())
    _say(_heading(legal[0][1], steps))
    differences = []
    for strategy, own in legal:
        differences.append(_compare(own, reference, steps))
        _say(_row(strategy, differences[-1], tolerance))
    wrong = sum(not difference.within(tolerance) for difference in differences)
    _say(f"\n{len(legal) - wrong} of {len(legal)} strategies equal one plain process (losses and norms within "
         f"{tolerance:g}, weights within {OF_WEIGHTS * tolerance:g} of their largest change); "
         f"{len(found) - len(legal)} more do not compose and would be refused before launch")  # fmt: skip
    return wrong == 0


def _compare(config: ResolvedConfig, reference: PlainRun, steps: int) -> Difference:
    """Train under a strategy; the largest differences over all ranks, the same on each."""
    engine = build_engine(config, build_mesh(config))
    try:
        results = [pipeline.train_step(engine, micro_batches(engine, step)) for step in range(steps)]
        weights, elements = _weight_difference(engine, reference)
    finally:
        engine.close()
    loss = max(_relative(r.loss, expected) for r, expected in zip(results, reference.losses, strict=True))
    norm = max(_relative(r.grad_norm, expected) for r, expected in zip(results, reference.norms, strict=True))
    own = torch.tensor([loss, norm, weights, elements / config.megagpt.model.num_parameters], device=engine.device)
    own = own.nan_to_num(nan=math.inf)
    dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return Difference(*own.tolist())


def micro_batches(engine: Engine, step: int) -> list[MicroBatch]:
    """This replica's part of a step's global batch, cut as BatchLoader cuts it."""
    config, mesh = engine.config, engine.mesh
    model, size = config.megagpt.model, config.train_micro_batch_size_per_gpu
    samples, length = config.train_batch_size, model.sequence_length
    tokens, targets = global_batch(step, samples, length, model.vocabulary)
    documents = document_ids(step, samples, length) if config.megagpt.data.document_mask else None
    seeds = dropout_seeds(step, samples) if model.dropout else None
    starts = [(index * mesh.data_size + mesh.data_rank) * size for index in range(config.gradient_accumulation_steps)]
    cuts = [slice(start, start + size) for start in starts]
    return [
        MicroBatch(
            tokens[cut].to(engine.device),
            targets[cut].to(engine.device),
            document_ids=None if documents is None else documents[cut].to(engine.device),
            dropout_seed=None if seeds is None else seeds[cut].to(engine.device),
        )
        for cut in cuts
    ]


def _weight_difference(engine: Engine, reference: PlainRun) -> tuple[float, int]:
    """The largest difference by parameter of the weights that this rank saves, and how many elements it holds."""
    difference, elements = 0.0, 0
    for bucket in engine.buckets():
        elements += sum(piece.numel for piece in bucket.pieces)
        with bucket.resident(False) as (master, _):
            for piece in bucket.owned_pieces:
                values = master.view(-1)[piece.offset : piece.offset + piece.numel].float().cpu()
                place = (piece.name, engine.boxes[piece.name], piece.start, piece.numel)
                difference = max(difference, _largest(values, engine, reference, *place))
    return difference, elements


def _largest(
    values: Tensor, engine: Engine, reference: PlainRun, name: str, box: boxes.Box, start: int, numel: int
) -> float:
    """The largest difference of a piece, as a share of the largest change of its whole parameter."""
    expected, before = reference.state[plain.WEIGHT][name], reference.start[name]
    change = float((expected - before).abs().max())
    shape = engine.logical_shape(name)
    own = expected.view(shape)[tuple(slice(*span) for span in box)].flatten()[start : start + numel]
    off = (values - own).abs()
    if name.endswith("qkv.bias"):
        # A key's bias moves all scores of a query alike: its gradient is rounding noise, which Adam blows up.
        rows = torch.arange(box[0][0] + start, box[0][0] + start + numel)
        model = engine.config.megagpt.model
        queries = model.num_heads // model.num_kv_heads  # which lie before their key and their value
        off = off[(rows // HEAD_SIZE) % (queries + 2) != queries]
    return float(off.max()) / change if off.numel() and change else 0.0


def _relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


HEADINGS = ["pipeline", "tensor", "ZeRO", "optimizer", "parameters", "other", "loss", "norm", "weights", "held"]
WIDTHS = [8, 6, 4, 9, 10, 36, 8, 8, 8, 5]


def _heading(config: ResolvedConfig, steps: int) -> str:
    model = config.megagpt.model
    return (
        f"{dist.get_world_size()} ranks ({training_device().type}), {steps} steps of {config.train_batch_size} samples "
        f"of a GPT of {model.num_parameters:,} parameters in fp32, with dropout;\ndifferences from one plain PyTorch "
        f"process, and the largest share of the weights' fp32 copies that any rank holds\n\n{_aligned(HEADINGS)}"
    )


def _row(strategy: Strategy, difference: Difference, tolerance: float) -> str:
    numbers = [f"{value:.1e}" for value in (difference.loss, difference.norm, difference.weights)]
    verdict = "" if difference.within(tolerance) else "  DIFFERS"
    return _aligned([*strategy.words(), *numbers, f"{difference.held:.0%}"]) + verdict


def _aligned(words: Iterable[str]) -> str:
    return "  ".join(word.ljust(width) for word, width in zip(words, WIDTHS, strict=True)).rstrip()


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
