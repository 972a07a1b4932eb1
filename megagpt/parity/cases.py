"""What `launch/parity.py` is asked to compare, and what of it these ranks can train.

It needs no torch, so it answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megagpt.config import ResolvedConfig, RunConfig, unexpected_world
from megagpt.parity.small_run import further_keys, left_out_key, resolved, small_document
from megagpt.parity.strategies import Strategy, own_strategy, strategies
from megagpt.planning.rules import refusals
from megagpt.utils import UserError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ParityRequest:
    """The user's request: the configuration, the name of its file, and how to compare.

    ``tolerance``: in fp32, of a loss or norm, relative; in bf16, as a multiple of a plain process's
    rounding; None: the default. ``gpus``: the GPUs of this machine if it starts the ranks; 0: on
    its CPU, any number of ranks; None: a launcher starts them.
    """

    file: RunConfig
    source: str
    steps: int = 3
    precision: Precision = "fp32"
    tolerance: float | None = None
    nvme_path: str | None = None
    own_only: bool = False
    gpus: int | None = None

    @property
    def stated_ranks(self) -> int | None:
        """The number of ranks that the file states."""
        return self.file.megagpt.parallel.world_size

    def on_ranks(self, ranks: int) -> str:
        """Return what to type for another number of ranks."""
        launched = (
            f"deepspeed --hostfile hosts launch/parity.py --deepspeed_config {self.source} "
            f"--ranks {ranks}"
        )
        if self.gpus is not None and (self.gpus == 0 or ranks <= self.gpus):
            return f"--ranks {ranks}, or with that many slots in the hostfile {launched}"
        return f"with that many slots in the hostfile {launched}"

    @property
    def disk(self) -> str | None:
        """The path of offload to NVMe: as asked for, else as in the file."""
        zero = self.file.zero_optimization
        sections = (zero.offload_optimizer, zero.offload_param)
        return self.nvme_path or next(
            (part.nvme_path for part in sections if part and part.nvme_path), None
        )


@dataclass(frozen=True)
class ParityPlan:
    """What to train on this number of ranks.

    ``legal`` has the strategies with their configurations, the file's own first. ``refused`` counts
    those that do not compose. ``left_out`` says why the file's own is not among them; empty if it
    is.
    """

    ranks: int
    legal: list[tuple[Strategy, ResolvedConfig]]
    refused: int
    left_out: str


def require_devices(request: ParityRequest, ranks: int) -> None:
    """Raise UserError if there are fewer GPUs than ranks; on a CPU any number is fine."""
    if request.gpus and ranks > request.gpus:
        raise UserError(
            f"--ranks {ranks}: too many (found {request.gpus} GPUs, need one per rank); type "
            f"--ranks {request.gpus}, or {request.on_ranks(ranks)}; on the CPU: "
            f"CUDA_VISIBLE_DEVICES= python launch/parity.py --ranks {ranks}"
        )


def require_launched(
    request: ParityRequest, asked: int | None, signs: list[str], world_size: int
) -> None:
    """Raise UserError unless a launcher started the ranks asked for or stated in the file.

    Otherwise a host may be missing. ``signs`` are the variables that show the launcher. A number
    that the file's own mesh does not divide is not expected.
    """
    if asked not in (None, world_size):
        raise UserError(
            f"--ranks {asked}: a launcher has started {world_size} ({', '.join(signs)}); leave "
            f"--ranks out, or start {asked} with the launcher; to start them on this machine "
            f"without it: unset {' '.join(signs)}"
        )
    parallel = request.file.megagpt.parallel
    if asked or (request.stated_ranks or 0) % parallel.model_parallel_size:
        return
    if (unexpected := unexpected_world(parallel, world_size)) is not None:
        raise UserError(
            f"{unexpected.line(request.source)}, or compare on these anyway: --ranks {world_size}"
        )


def plan(request: ParityRequest, world_size: int) -> ParityPlan:
    """Return what to train on this number of ranks.

    Raise UserError if only the file's own strategy is wanted and it is impossible.
    """
    own = own_strategy(request.file)
    left_out = _other_ranks_needed(request, own, world_size)
    tried = [] if left_out else [own]
    if not request.own_only:
        tried += strategies(world_size, request.disk is not None, request.file.megagpt.model)
    found = _described(request, tried, world_size) if tried else []
    legal = [(strategy, config) for strategy, config in found if not refusals(config)]
    if not left_out and not (legal and legal[0][0].file):
        left_out = _refused(request, found[0][1], world_size)
    if request.own_only and left_out:
        raise UserError(left_out)
    return ParityPlan(world_size, legal, len(tried) - len(legal), left_out)


def remarks_on_own(request: ParityRequest, planned: ParityPlan) -> list[str]:
    """Return remarks on the file's own strategy that the columns of the table do not show."""
    strategy, config = planned.legal[0]
    remarks = ["with " + ", ".join(keys)] if (keys := further_keys(strategy, config)) else []
    if (key := left_out_key(strategy, config)) is not None:
        remarks.append(
            f"without its {key}, which would give the small model's stages different numbers of "
            f"tiles"
        )
    if request.stated_ranks not in (None, planned.ranks):
        remarks.append(f"it states {request.stated_ranks} ranks")
    if request.file.bf16.enabled is True and request.precision == "fp32":
        remarks.append("it computes in bf16; try --precision bf16 too")
    if request.file.fp16.enabled is True:
        remarks.append("it computes in fp16, which is not compared")
    return remarks


def _described(
    request: ParityRequest, tried: list[Strategy], world_size: int
) -> list[tuple[Strategy, ResolvedConfig]]:
    document = small_document(request.file, tried, world_size, request.steps, request.precision)
    return [
        (strategy, resolved(document, strategy, world_size, request.disk)) for strategy in tried
    ]


def _other_ranks_needed(request: ParityRequest, own: Strategy, world_size: int) -> str:
    """Return what to type if the file's replicas do not divide these ranks, else ""."""
    replica = own.tensor * own.pipeline
    stated = request.stated_ranks
    if world_size % replica == 0:
        return ""
    only_one = stated == replica or replica <= (request.gpus or 0) < 2 * replica
    # With a single replica ZeRO has nothing to partition.
    ranks = replica if only_one else 2 * replica
    says = f" (it states {stated})" if stated else ""
    return (
        f"{request.source}: its own strategy is left out: tensor {own.tensor} x pipeline "
        f"{own.pipeline} does not fit (found {world_size} ranks, need a multiple of "
        f"{replica}{says}); to try it: {request.on_ranks(ranks)}"
    )


def _refused(request: ParityRequest, config: ResolvedConfig, world_size: int) -> str:
    """Return why the small run is refused, and whether it is legal in the other precision."""
    other: Precision = "fp32" if request.precision == "bf16" else "bf16"
    own = own_strategy(request.file)
    ((_, otherwise),) = _described(replace(request, precision=other), [own], world_size)
    remedy = f"--precision {other}"
    if refusals(otherwise):
        remedy = f"python launch/plan.py --deepspeed_config {request.source} (what would be legal)"
    why = refusals(config)[0].line(config)
    return f"{request.source}: its own strategy is left out: {why}; to try it: {remedy}"
