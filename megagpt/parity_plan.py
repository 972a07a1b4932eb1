"""What `launch/parity.py` was asked to compare, and what of that these ranks can train. No torch: known at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megagpt.config import ResolvedConfig, RunConfig
from megagpt.planner import refusals
from megagpt.small_run import resolved, small_document
from megagpt.strategies import Strategy, own_strategy, strategies
from megagpt.utils import UserError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Request:
    """What the user asks for: the configuration, the name of its file, and how to compare.

    ``tolerance`` in fp32: of a loss or norm, relative; in bf16: times what a plain process strays; None: the usual.
    """

    file: RunConfig
    source: str
    steps: int = 3
    precision: Precision = "fp32"
    tolerance: float | None = None
    nvme_path: str | None = None
    own_only: bool = False

    @property
    def disk(self) -> str | None:
        """Where offload to NVMe goes: as asked for, else as the file says."""
        zero = self.file.zero_optimization
        sections = (zero.offload_optimizer, zero.offload_param)
        return self.nvme_path or next((part.nvme_path for part in sections if part and part.nvme_path), None)


@dataclass(frozen=True)
class Plan:
    """The strategies to train, the file's own first, each with its configuration; how many more do not compose; and
    why the file's own is left out, empty where it is not."""

    legal: list[tuple[Strategy, ResolvedConfig]]
    refused: int
    left_out: str


def plan(request: Request, world_size: int) -> Plan:
    """What to train on so many ranks. Raises UserError where the file's own is all that is wanted, and impossible."""
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
    return Plan(legal, len(tried) - len(legal), left_out)


def _described(request: Request, tried: list[Strategy], world_size: int) -> list[tuple[Strategy, ResolvedConfig]]:
    document = small_document(request.file, tried, world_size, request.steps, request.precision)
    return [(strategy, resolved(document, strategy, world_size, request.disk)) for strategy in tried]


def _other_ranks_needed(request: Request, own: Strategy, world_size: int) -> str:
    """What to type where these ranks are no whole number of the file's replicas; else nothing."""
    replica, stated = own.tensor * own.pipeline, request.file.megagpt.parallel.world_size
    if world_size % replica == 0:
        return ""
    ranks = min(stated or 2 * replica, 2 * replica)  # with a single replica, ZeRO would have nothing to cut
    says = f" (it states {stated})" if stated else ""
    return (
        f"{request.source}: tensor {own.tensor} x pipeline {own.pipeline} needs a multiple of {replica} ranks{says}, "
        f"and here are {world_size}: its own strategy is left out. To try it: --ranks {ranks}, or as many by a launcher"
    )


def _refused(request: Request, config: ResolvedConfig, world_size: int) -> str:
    """Why the small run is refused, and whether it would not be in the other precision."""
    other: Precision = "fp32" if request.precision == "bf16" else "bf16"
    own = own_strategy(request.file)
    ((_, otherwise),) = _described(replace(request, precision=other), [own], world_size)
    remedy = f"--precision {other}"
    if refusals(otherwise):
        remedy = f"python launch/plan.py --deepspeed_config {request.source} (what would be legal)"
    why = refusals(config)[0].line(config)
    return f"{request.source}: {why}: its own strategy is left out. To try it: {remedy}"
