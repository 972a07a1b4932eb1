"""The same few steps, from one seed, under every strategy that these ranks can run.

They are compared with one plain process. Each strategy is a whole engine: mesh, ZeRO stage,
offload, schedule. The file's own comes first.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import document_bounds
from megagpt.common.text import aligned
from megagpt.config import ResolvedConfig
from megagpt.health.agreement import require_agreement
from megagpt.parallel import pipeline
from megagpt.parallel.compat import Piece
from megagpt.parallel.engine import Engine, build_engine, build_mesh, training_device
from megagpt.parallel.pipeline import MicroBatch
from megagpt.parity import plain
from megagpt.parity import tolerance as yardstick
from megagpt.parity.cases import ParityPlan, ParityRequest, plan, remarks_on_own
from megagpt.parity.plain import WEIGHT, PlainRun, samples_of
from megagpt.parity.tolerance import Straying


@dataclass(frozen=True)
class Reference:
    """One plain process in fp32, its rounding in bf16 if that is compared, and the limit."""

    exact: PlainRun
    rounding: Straying | None
    tolerance: float
    limit: Straying


@dataclass(frozen=True)
class Outcome:
    """How far a strategy differs, and the largest share of the weights on any rank."""

    straying: Straying
    held: float


def run(request: ParityRequest) -> bool:
    """Compare and print; return whether all strategies equal the plain process.

    Every rank must call it.
    """
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)  # each strategy would report its Adam again
    require_agreement(request.file)
    planned = plan(request, dist.get_world_size())
    reference = _reference(request, planned.legal[0][1])
    _say(_heading(request, planned))
    if reference.rounding is not None:
        _say(_line(PLAIN_IN_BF16, Outcome(reference.rounding, held=1.0)))
    wrong = 0
    for index, (strategy, config) in enumerate(planned.legal):
        if title := _title(request, planned, index):
            _say(title)
        outcome = _compare(config, reference.exact, request)
        equal = outcome.straying.within(reference.limit)
        _say(
            _line(aligned(strategy.words(), STRATEGY.values()), outcome)
            + ("" if equal else "  DIFFERS")
        )
        wrong += not equal
    _say(_verdict(request, planned, reference, wrong))
    return wrong == 0


def _reference(request: ParityRequest, config: ResolvedConfig) -> Reference:
    """Train the plain process, in bf16 too if that is compared."""
    exact = plain.train(config, request.steps, training_device())
    usual = {"fp32": yardstick.FP32_TOLERANCE, "bf16": yardstick.BF16_TOLERANCE}
    tolerance = usual[request.precision] if request.tolerance is None else request.tolerance
    if request.precision == "fp32":
        return Reference(exact, None, tolerance, yardstick.limit_in_fp32(tolerance))
    rounded = plain.train(config, request.steps, training_device(), torch.bfloat16)
    rounding = yardstick.straying(rounded.losses, rounded.norms, rounded.state[WEIGHT], exact)
    return Reference(
        exact,
        rounding,
        tolerance,
        yardstick.limit_in_bf16(rounding, exact, config.tokens_per_step, tolerance),
    )


def _compare(config: ResolvedConfig, exact: PlainRun, request: ParityRequest) -> Outcome:
    """Train under a strategy; return how far it differs, the same on each rank."""
    engine = build_engine(config, build_mesh(config))
    try:
        results = [
            pipeline.train_step(engine, micro_batches(engine, step))
            for step in range(request.steps)
        ]
        largest, squares, elements = _compare_weights(engine, exact)
    finally:
        engine.close()
    loss = yardstick.largest_difference([result.loss for result in results], exact.losses)
    norm = yardstick.largest_difference([result.grad_norm for result in results], exact.norms)
    held = elements / config.megagpt.model.num_parameters
    worst = torch.tensor([loss, norm, largest, held], device=engine.device).nan_to_num(nan=math.inf)
    total = torch.tensor(squares, dtype=torch.float64, device=engine.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    loss, norm, largest, held = worst.tolist()
    weights = (
        largest if request.precision == "fp32" else yardstick.share_of_changes(float(total), exact)
    )
    return Outcome(Straying(loss, norm, weights), held)


def micro_batches(engine: Engine, step: int) -> list[MicroBatch]:
    """Return this replica's part of a step's global batch, cut as BatchLoader cuts it."""
    config = engine.config
    mesh = engine.mesh
    size = config.train_micro_batch_size_per_gpu
    samples = samples_of(config, step)
    starts = [
        (index * mesh.data_size + mesh.data_rank) * size
        for index in range(config.gradient_accumulation_steps)
    ]
    parts = [samples.part(slice(start, start + size), engine.device) for start in starts]
    return [
        MicroBatch(
            part.tokens,
            part.targets,
            documents=None if part.document_ids is None else document_bounds(part.document_ids),
            dropout_seed=part.dropout_seed,
            positions=part.positions,
        )
        for part in parts
    ]


def _compare_weights(engine: Engine, exact: PlainRun) -> tuple[float, float, int]:
    """Compare the weights that this rank saves with the plain process's.

    Return the largest difference, as a share of the largest change of its whole parameter (NaN if a
    weight is), the sum of all squared differences, and the number of elements that this rank holds.
    """
    shares = [0.0]
    squares = 0.0
    elements = 0
    for bucket in engine.buckets():
        elements += sum(piece.numel for piece in bucket.pieces)
        with bucket.resident(False) as (master, _):
            for piece in bucket.owned_pieces:
                values = master.view(-1)[piece.offset : piece.offset + piece.numel].float().cpu()
                expected = _expected(engine, exact, piece)
                squares += yardstick.squared_distance(values, expected)
                change = float(
                    (exact.state[WEIGHT][piece.name] - exact.start[piece.name]).abs().max()
                )
                off = (values - expected).abs()[_meaningful(engine, piece)]
                if off.numel() and change:
                    shares.append(float(off.max()) / change)
    return float(torch.tensor(shares).max()), squares, elements  # unlike Python's, max keeps a NaN


def _expected(engine: Engine, exact: PlainRun, piece: Piece) -> Tensor:
    """Return the plain process's values of a piece."""
    whole = exact.state[WEIGHT][piece.name].view(engine.logical_shape(piece.name))
    share = whole[tuple(slice(*span) for span in engine.boxes[piece.name])]
    return share.flatten()[piece.start : piece.start + piece.numel]


def _meaningful(engine: Engine, piece: Piece) -> Tensor:
    """Return a mask that is False at the bias of key channels that only move all scores equally.

    Softmax does not see such a bias, so its gradient is rounding noise, which Adam amplifies. It
    sees the bias of channels that are rotated, and of any channel behind a norm or a soft-cap.
    """
    model = engine.config.megagpt.model
    seen = model.qk_norm != "none" or model.score_softcap is not None
    if not piece.name.endswith("qkv.bias") or seen:
        return torch.ones(piece.numel, dtype=torch.bool)
    first = engine.boxes[piece.name][0][0] + piece.start
    rows = torch.arange(first, first + piece.numel)
    queries = model.num_heads // model.num_kv_heads  # they come before their key and value
    is_key = rows // model.head_size % (queries + 2) == queries
    return ~is_key | (rows % model.head_size < model.rotated_size)


# Columns and their widths.
STRATEGY = {
    "pipeline": 8,
    "tensor": 6,
    "ZeRO": 4,
    "optimizer": 9,
    "parameters": 10,
    "other": 36,
}
NUMBERS = {"loss": 8, "norm": 8, "weights": 8, "held": 5}
PLAIN_IN_BF16 = "one plain process in bf16"


def _heading(request: ParityRequest, planned: ParityPlan) -> str:
    config = planned.legal[0][1]
    left_out = f"{planned.left_out}\n\n" if planned.left_out else ""
    strategies = "1 strategy" if len(planned.legal) == 1 else f"{len(planned.legal)} strategies"
    ranks = f"{planned.ranks} ranks ({training_device().type})"
    return (
        f"{left_out}{strategies} on {ranks}, {request.steps} steps of {config.train_batch_size} "
        f"samples of a GPT of {config.megagpt.model.num_parameters:,} parameters in "
        f"{request.precision}, with dropout;\n"
        "differences from one plain PyTorch process in fp32, and the largest share of the weights' "
        "fp32 copies that any rank holds\n"
        "\n"
        f"{_beside(aligned(STRATEGY, STRATEGY.values()), NUMBERS)}"
    )


def _title(request: ParityRequest, planned: ParityPlan, index: int) -> str:
    """Return the title above the file's own row, the first, and above the first of the others."""
    strategy, _ = planned.legal[index]
    if strategy.file is None:
        return "others that these ranks can host" if index == 1 and not planned.left_out else ""
    return "; ".join([f"as in {request.source}", *remarks_on_own(request, planned)])


def _line(strategy: str, outcome: Outcome) -> str:
    straying = outcome.straying
    numbers = [f"{value:.1e}" for value in (straying.loss, straying.norm, straying.weights)]
    return _beside(strategy, [*numbers, f"{outcome.held:.0%}"])


def _beside(strategy: str, numbers: Iterable[str]) -> str:
    """Return the columns of numbers beside those of the strategy."""
    width = sum(STRATEGY.values()) + 2 * len(STRATEGY) - 2
    return f"{strategy:{width}}  {aligned(numbers, NUMBERS.values())}"


def _verdict(request: ParityRequest, planned: ParityPlan, reference: Reference, wrong: int) -> str:
    count = len(planned.legal)
    limit = reference.limit
    if request.precision == "fp32":
        allowed = (
            f"losses and norms within {limit.loss:g}, weights within {limit.weights:g} of "
            f"their largest change"
        )
    else:
        allowed = (
            f"{reference.tolerance:g} times its own difference from fp32 in bf16, or one "
            f"rounding: losses within {limit.loss:.1e}, norms within {limit.norm:.1e}, weights "
            f"within {limit.weights:.1e} of all their change"
        )
    more = (
        [f"{planned.refused} more do not compose and are rejected before launch"]
        if planned.refused
        else []
    )
    more += (
        [f"the strategy of {request.source} was left out, see above"] if planned.left_out else []
    )
    if request.stated_ranks not in (None, planned.ranks):
        more.append(
            f"{request.source} states {request.stated_ranks} ranks; these were {planned.ranks}"
        )
    equal = f"{count - wrong} of {count} strategies equal one plain process ({allowed})"
    return "\n" + "; ".join([equal, *more])


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
