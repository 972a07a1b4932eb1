"""What a configuration would do on given hosts: legality, placement, memory, speed, alternatives.

No torch and no device: everything follows from the configuration, the hosts and the assumptions
that the plan prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megagpt.cluster.hosts import Host, world_size
from megagpt.config import ConfigError, ResolvedConfig, RunConfig, load_config
from megagpt.planning.alternatives import alternatives, set_items
from megagpt.planning.cost.accelerators import Accelerator
from megagpt.planning.cost.communication import Communication, communication
from megagpt.planning.cost.memory import RankMemory, rank_memory
from megagpt.planning.cost.model_states import shard_of
from megagpt.planning.cost.performance import Assumptions, Estimate, estimate
from megagpt.planning.layout import Layout, Pins
from megagpt.planning.legality import World, any_samples, judge, precision_notes, problems
from megagpt.planning.placement import Placement, ranks_by_host
from megagpt.planning.rules import can_be_cut
from megagpt.schema.model import GPT2_VOCABULARY
from megagpt.utils import GIB, UserError

LINK_SHARE = 0.7  # share of a link's data-sheet speed that collectives reach
# share of a device's peak that large 16-bit products and attention reach, if none was fitted
EFFICIENCY = 0.5
NETWORK_GB_PER_S = 40.0  # one 400 Gbit/s adapter a device
HOST_MEMORY_GB_PER_S = 200.0
NVME_GB_PER_S = 10.0
HOST_MEMORY_GIB = 1024.0
RESERVE_GIB = 6.0


@dataclass(frozen=True)
class Limits:
    """Available memory of a device and of a host in GiB.

    `reserve_gib` of the device is not available to us: the CUDA context, NCCL's buffers,
    fragmentation of the allocator. `shared`: the devices are CPUs, whose memory is the host's, and
    nothing is page-locked. `pins`: who page-locks host memory otherwise.
    """

    device_gib: float
    host_gib: float = HOST_MEMORY_GIB
    reserve_gib: float = RESERVE_GIB
    shared: bool = False
    pins: Pins = "torch"


@dataclass(frozen=True)
class Alternative:
    """A layout that fits, and the `--set` items that select it."""

    items: list[str]
    estimate: Estimate
    peak_gib: float


@dataclass(frozen=True)
class Plan:
    """The result of planning.

    `notes` are lines on what the file says without effect or leaves open, `refusals` those of
    planning/rules.py; `memory` and `sent` have one entry a pipeline rank. `steps` of the run are
    None if they follow from data that are not prepared.
    """

    source: str
    config: ResolvedConfig
    notes: list[str]
    refusals: list[str]
    layout: Layout
    hosts: Sequence[Host]
    placement: Placement
    memory: list[RankMemory]
    sent: list[Communication]
    estimate: Estimate
    limits: Limits
    assumed: Assumptions
    steps: int | None = None
    alternatives: list[Alternative] = field(default_factory=list)

    @property
    def fits_device(self) -> bool:
        """Whether every rank's peak leaves the reserve free."""
        return all(fits_device(rank, self.limits) for rank in self.memory)

    @property
    def fits_host(self) -> bool:
        """Whether every host has enough memory for its ranks."""
        return self.host_gib <= self.limits.host_gib

    @property
    def device_gib(self) -> float:
        """The most device memory that a rank uses, in GiB."""
        return max(rank.peak.device for rank in self.memory) / GIB

    @property
    def host_gib(self) -> float:
        """The most host memory that the ranks of one host use, in GiB."""
        return host_gib(self.layout, self.memory, self.hosts, shared=self.limits.shared)

    @property
    def good(self) -> bool:
        """Whether the run is legal and fits."""
        return not self.refusals and self.fits_device and self.fits_host


def host_gib(
    layout: Layout, memory: Sequence[RankMemory], hosts: Sequence[Host], *, shared: bool = False
) -> float:
    """Return the most host memory that the ranks of one host use, in GiB.

    `memory` has an entry a pipeline rank. `shared`: what is on the devices is in it too.
    """
    peaks = [rank.peak for rank in memory]
    used = [peak.host + (peak.device if shared else 0) for peak in peaks]
    if not any(used):
        return 0.0
    by_host = (
        sum(count * used[rank] for rank, count in ranks.items())
        for ranks in ranks_by_host(layout, hosts)
    )
    return max(by_host) / GIB


def fits_device(memory: RankMemory, limits: Limits) -> bool:
    """Return whether a rank's peak leaves the reserve free; memory of a host is its own matter."""
    if limits.shared:
        return True
    return memory.peak.device / GIB <= limits.device_gib - limits.reserve_gib


def assume(device: Accelerator, ranks_per_host: int, **given: Any) -> Assumptions:
    """Return the rates of a device's data sheet, reduced to what programs reach.

    Values in `given` replace them, unless None.
    """
    assumed = Assumptions(
        peak_tflops=device.peak_tflops,
        efficiency=device.efficiency or EFFICIENCY,
        link_gb_per_s=LINK_SHARE * device.link_gb_per_s,
        network_gb_per_s=NETWORK_GB_PER_S,
        host_gb_per_s=LINK_SHARE * device.host_gb_per_s,
        host_memory_gb_per_s=HOST_MEMORY_GB_PER_S,
        nvme_gb_per_s=NVME_GB_PER_S,
        device_memory_gb_per_s=LINK_SHARE * device.memory_gb_per_s,
        ranks_per_host=ranks_per_host,
    )
    return replace(assumed, **{name: value for name, value in given.items() if value is not None})


def make_plan(
    path: str,
    overrides: Sequence[str],
    hosts: Sequence[Host],
    limits: Limits,
    assumed: Assumptions,
    *,
    bf16_native: bool = True,
) -> Plan:
    """Plan a configuration file on these hosts.

    `bf16_native`: the devices multiply bf16 matrices in hardware. Raises ConfigError if the
    configuration is impossible on this number of ranks.
    """
    written = load_config(path, overrides, for_plan=True)
    world, more = world_and_notes(written, world_size(list(hosts)), bf16_native)
    notes = [*written.notes, *more]
    verdict = judge(written, world)
    refused = problems(written, world)
    config = verdict.config
    if verdict.impossible or not isinstance(config, ResolvedConfig) or not can_be_cut(config):
        raise ConfigError(f"{path}: {line}" for line in refused)
    notes += precision_notes(written, config)
    plan = _plan(path, config, notes, refused, hosts, limits, assumed)
    if world.samples is not any_samples or written.megagpt.training.total_epochs is None:
        plan = replace(plan, steps=config.megagpt.training.total_steps)
    return (
        plan
        if plan.good
        else replace(plan, alternatives=_alternatives(plan, path, overrides, written, world))
    )


def world_and_notes(written: RunConfig, ranks: int, bf16_native: bool) -> tuple[World, list[str]]:
    """Return a world of such devices, and lines on what it assumes."""
    world = replace(world_of(written, ranks), bf16_native=bf16_native)
    world, notes = _with_epochs(written, world)
    model = written.megagpt.model
    if world.vocabulary or model.vocab_size or model.vocabulary or model.published_vocabulary:
        return world, notes
    note = (
        f"megagpt.model.vocab_size: not given, and the data are not prepared; planned with "
        f"GPT-2's {GPT2_VOCABULARY}"
    )
    return replace(world, vocabulary=GPT2_VOCABULARY), [*notes, note]


def world_of(written: RunConfig, ranks: int) -> World:
    """Return a world of GPUs that compute in bf16.

    The vocabulary is that of the configuration or of its preset, else that of the data.
    """
    return World(ranks, _vocabulary_here(written), bf16_native=True)


def _with_epochs(written: RunConfig, world: World) -> tuple[World, list[str]]:
    """Return the world with the samples of an epoch if asked, and a note if they are unknown."""
    if written.megagpt.training.total_epochs is None:
        return world, []
    from megagpt.planning.epochs import counted_samples  # numpy

    samples = counted_samples()
    try:
        samples(written)
    except UserError as error:
        reason = str(error).partition("; ")[0]
        return world, [
            f"megagpt.training.total_epochs: the number of steps is not known ({reason})"
        ]
    return replace(world, samples=samples), []


def _vocabulary_here(written: RunConfig) -> int | None:
    """Return the vocabulary of the prepared data, or None.

    The data are read only if nothing else tells it, because that imports numpy.
    """
    model = written.megagpt.model
    if model.vocab_size or model.vocabulary or model.published_vocabulary:
        return None
    from megagpt.data.token_files.declared import Declared
    from megagpt.data.token_files.opening import manifest_of

    try:
        return max(
            manifest_of(Path(source.path), Declared.by(written.megagpt)).vocabulary
            for source in written.megagpt.data.sources
        )
    except UserError:
        return None


def layout_of(config: ResolvedConfig, limits: Limits) -> Layout:
    """Return the layout of a run on devices with these limits."""
    return Layout.of(config, pins="nobody" if limits.shared else limits.pins)


def _plan(
    path: str,
    config: ResolvedConfig,
    notes: list[str],
    refused: list[str],
    hosts: Sequence[Host],
    limits: Limits,
    assumed: Assumptions,
) -> Plan:
    layout = layout_of(config, limits)
    ranks = range(layout.pipeline)
    return Plan(
        source=path,
        config=config,
        notes=notes,
        refusals=refused,
        layout=layout,
        hosts=hosts,
        placement=Placement.of(layout, hosts),
        memory=[rank_memory(layout, rank) for rank in ranks],
        sent=[communication(layout, rank, shard_of(layout, rank)) for rank in ranks],
        estimate=estimate(layout, assumed),
        limits=limits,
        assumed=assumed,
    )


def _alternatives(
    plan: Plan, path: str, overrides: Sequence[str], written: RunConfig, world: World
) -> list[Alternative]:
    """Return alternatives that fit.

    Each is read again from the file with its `--set` items, so that what is printed works.
    """
    limits = plan.limits

    def items_of(layout: Layout) -> list[str]:
        return set_items(written, layout)

    def legal(layout: Layout) -> bool:
        try:
            verdict = judge(
                load_config(path, [*overrides, *items_of(layout)], for_plan=True), world
            )
        except ConfigError:
            return False
        if verdict.refused or verdict.impossible:
            return False
        assert isinstance(verdict.config, ResolvedConfig)  # nothing was impossible
        return layout_of(verdict.config, limits) == layout

    def fits(memory: RankMemory) -> bool:
        in_host = memory.peak.host / GIB * plan.assumed.ranks_per_host
        return fits_device(memory, limits) and in_host <= limits.host_gib

    found = alternatives(plan.layout, plan.assumed, fits, legal)
    return [_alternative(layout, items_of(layout), plan.assumed) for layout in found]


def _alternative(layout: Layout, items: list[str], assumed: Assumptions) -> Alternative:
    peak = max(rank_memory(layout, rank).peak.device for rank in range(layout.pipeline))
    return Alternative(items, estimate(layout, assumed), peak / GIB)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan for machines: bytes and seconds, hosts and ranks, nothing rounded."""
    return {
        "legal": not plan.refusals,
        "fits": plan.fits_device and plan.fits_host,
        "notes": plan.notes,
        "refusals": plan.refusals,
        "total_steps": plan.steps,
        "mesh": {
            "pipeline": plan.layout.pipeline,
            "data": plan.layout.data,
            "tensor": plan.layout.tensor,
        },
        "places": [place._asdict() for place in plan.placement.places],
        "split_tensor_groups": [
            [place.rank for place in group] for group in plan.placement.split_tensor_groups()
        ],
        "memory": [
            {
                "pipeline_rank": memory.pipeline_rank,
                "peak_bytes": vars(memory.peak),
                "peak_phase": memory.peak_phase,
                "bytes": {name: vars(size) for name, size in memory.lines()},
            }
            for memory in plan.memory
        ],
        "host_gib": plan.host_gib,
        "limits": vars(plan.limits),
        "bytes_sent_per_step": [vars(sent) for sent in plan.sent],
        "estimate": vars(plan.estimate),
        "assumptions": vars(plan.assumed),
        "alternatives": [
            {"set": other.items, "peak_gib": other.peak_gib, "estimate": vars(other.estimate)}
            for other in plan.alternatives
        ],
    }
