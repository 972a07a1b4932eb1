"""A search as users ask for it: for a configuration file, or for a preset without one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megagpt.cluster.hosts import Host, world_size
from megagpt.config import (
    ConfigError,
    ModelConfig,
    ResolvedConfig,
    RunConfig,
    load_config,
    unexpected_world,
)
from megagpt.planning.cost.accelerators import Accelerator
from megagpt.planning.cost.performance import Assumptions
from megagpt.planning.layout import Layout
from megagpt.planning.legality import World
from megagpt.planning.plan import Limits, Plan, layout_of, make_plan, world_and_notes
from megagpt.planning.search.best import Found, Search
from megagpt.planning.search.space import Space

# Table 2.1 of the GPT-3 paper (arXiv 2005.14165): tokens of a step up to so many parameters.
BATCH_TOKENS = ((1e9, 500_000), (5e9, 1_000_000), (2e10, 2_000_000), (float("inf"), 3_200_000))
# Hoffmann et al. 2022 (arXiv 2203.15556): about 20 tokens a parameter use the least arithmetic.
TOKENS_A_PARAMETER = 20
RATE = 3e-4  # Llama 3's for 8B (arXiv 2407.21783, table 3); smaller models learn faster
WARM_UP_SHARE = 50  # one step in 50 warms up
MOST_WARM_UP = 2000
# one rank, one sequence a micro-batch: what every layout of the search replaces
NEUTRAL = (
    *("megagpt.parallel.tensor=1", "megagpt.parallel.pipeline=1", "megagpt.parallel.schedule=1f1b"),
    *("megagpt.parallel.virtual_stages=1", "megagpt.parallel.sequence=false"),
    *("megagpt.parallel.gradient_reduction=null", "megagpt.parallel.world_size=null"),
    *("gradient_accumulation_steps=null", "train_micro_batch_size_per_gpu=1"),
)


@dataclass(frozen=True)
class Answer:
    """The result of a search.

    `own` is the plan of the configuration itself; without one, `own_problem` says why it cannot
    be planned. Both are absent if there is no file.
    """

    source: str
    written: RunConfig
    notes: list[str]
    hosts: Sequence[Host]
    limits: Limits
    assumed: Assumptions
    model: ModelConfig
    batch: int
    found: list[Found]
    own: Plan | None = None
    own_problem: str = ""

    @property
    def ranks(self) -> int:
        """All ranks."""
        return world_size([*self.hosts])


def search_file(
    path: str,
    overrides: Sequence[str],
    hosts: Sequence[Host],
    limits: Limits,
    assumed: Assumptions,
    *,
    bf16_native: bool = True,
) -> Answer:
    """Search the fastest layouts of a configuration file's model and batch on these hosts.

    Raises ConfigError if the file is wrong in itself.
    """
    written = load_config(path, overrides, for_plan=True)
    answer = _search(written, path, hosts, limits, assumed, bf16_native)
    try:
        own = make_plan(path, overrides, hosts, limits, assumed, bf16_native=bf16_native)
    except ConfigError as error:
        return replace(answer, own_problem="; ".join(error.errors))
    return replace(answer, own=own)


def search_preset(
    preset: str,
    overrides: Sequence[str],
    hosts: Sequence[Host],
    limits: Limits,
    assumed: Assumptions,
    *,
    device: Accelerator,
    tokens: int | None = None,
) -> Answer:
    """Search the fastest layouts of a published shape, with a batch of usual size."""
    ranks = world_size([*hosts])
    document = _document(preset, ranks, device)
    draft = RunConfig.from_json(json.dumps(document)).changed([*overrides, *NEUTRAL])
    world, _ = world_and_notes(draft, 1, device.bf16_native)
    model = world.resolve(draft).megagpt.model
    batch = _usual_batch(model, ranks)
    tokens = tokens or TOKENS_A_PARAMETER * model.num_parameters
    warm_up = tokens // (WARM_UP_SHARE * batch * model.sequence_length)
    document["train_batch_size"] = batch
    document["scheduler"]["params"]["warmup_num_steps"] = min(MOST_WARM_UP, max(2, warm_up))
    document["megagpt"]["training"] = {"total_tokens": tokens}
    written = RunConfig.from_json(json.dumps(document)).changed(overrides)
    return _search(written, preset, hosts, limits, assumed, device.bf16_native)


def _document(preset: str, ranks: int, device: Accelerator) -> dict[str, Any]:
    """Return a run of a preset, which `--write` completes to a file that trains."""
    formats = {"bf16": device.bf16_native, "fp16": not (device.bf16_native or device.is_host)}
    return {
        "train_batch_size": ranks,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": RATE, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_num_steps": MOST_WARM_UP,
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
        "gradient_clipping": 1.0,
        **{name: {"enabled": True} for name, enabled in formats.items() if enabled},
        "zero_optimization": {"stage": 1},
        "megagpt": {
            "model": {"preset": preset},
            "parallel": {"world_size": ranks},
            "training": {"total_steps": MOST_WARM_UP},
        },
    }


def _usual_batch(model: ModelConfig, ranks: int) -> int:
    """Return sequences of a step: a multiple of the ranks, near the GPT-3 paper's tokens."""
    tokens = next(size for most, size in BATCH_TOKENS if model.num_parameters < most)
    return ranks * max(1, round(tokens / (model.sequence_length * ranks)))


def _search(
    written: RunConfig,
    source: str,
    hosts: Sequence[Host],
    limits: Limits,
    assumed: Assumptions,
    bf16_native: bool,
) -> Answer:
    ranks = world_size([*hosts])
    if unexpected := unexpected_world(written.megagpt.parallel, ranks):
        raise ConfigError([unexpected.line(source)])
    world, notes = world_and_notes(written, ranks, bf16_native)
    batch = written.train_batch_size or world.resolve(written).train_batch_size
    runs = _runs(written, world, batch)
    given = "gradient_reduction" in written.megagpt.parallel.model_fields_set
    space = Space(
        {key: _base(written, run, limits) for key, run in runs.items()},
        ranks,
        max(host.slots for host in hosts),
        batch,
        written.megagpt.parallel.gradient_reduction if given else None,
        _nvme_path(written),
    )
    search = Search(space, assumed, limits, hosts, written, runs, world)
    return Answer(
        source=source,
        written=written,
        notes=[*written.notes, *notes],
        hosts=hosts,
        limits=limits,
        assumed=assumed,
        model=runs[True].megagpt.model,
        batch=batch,
        found=search.run(),
    )


def _runs(written: RunConfig, world: World, batch: int) -> dict[bool, ResolvedConfig]:
    """Return the run on one rank from ZeRO 1 on and at ZeRO 0, where "auto" computes in fp32."""
    one = replace(world, ranks=1)
    stages = {True: 1, False: 0}
    return {
        is_partitioned: one.resolve(
            written.changed(
                [*NEUTRAL, f"train_batch_size={batch}", f"zero_optimization.stage={stage}", *PLAIN]
            )
        )
        for is_partitioned, stage in stages.items()
    }


PLAIN = ("zero_optimization.offload_optimizer=null", "zero_optimization.offload_param=null")


def _base(written: RunConfig, resolved: ResolvedConfig, limits: Limits) -> Layout:
    """Return the layout that the search varies: the run's own ZeRO keys and expected ranks."""
    layout = replace(layout_of(resolved, limits), zero=written.zero_optimization)
    return layout.with_parallel(world_size=written.megagpt.parallel.world_size)


def _nvme_path(written: RunConfig) -> str | None:
    zero = written.zero_optimization
    sections = (zero.offload_optimizer, zero.offload_param)
    return next((section.nvme_path for section in sections if section and section.nvme_path), None)
