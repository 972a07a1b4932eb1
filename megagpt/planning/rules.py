"""The one table of what composes: each row refuses a combination, says why, and what to try
instead.

A row stands here because DeepSpeed 0.19.8 would ignore the combination or fail late, or because
this trainer does not do it yet: a key that is accepted acts. What helps against one row may break
another: `legality.py` searches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

from megagpt.config import ResolvedConfig, RunConfig
from megagpt.planning.cost.model_states import (
    PARAMETER_BUFFER_SIZE,
    fewest_elements_of_one_tile,
    tile_counts,
)
from megagpt.planning.layout import Layout
from megagpt.planning.parameters import parameters_of_rank
from megagpt.schema.arithmetic import nearest_first
from megagpt.schema.deepspeed import ZERO_KEY_STAGES
from megagpt.schema.errors import shown

Remedies = Callable[[RunConfig], Iterable[str]]


@dataclass(frozen=True)
class Rule:
    """One row.

    `remedies` are `--set` items, one or several with spaces between them, of which each makes a
    refused configuration legal in this respect; the nearest comes first.
    """

    key: str
    refuses: Callable[[RunConfig], bool]
    reason: str
    remedies: tuple[str, ...] | Remedies
    counts_rows: bool = (
        False  # of the vocabulary: this row waits until the data, or the configuration, tell them
    )

    def remedies_for(self, config: RunConfig) -> Iterable[str]:
        """The `--set` items for this configuration."""
        return self.remedies(config) if callable(self.remedies) else self.remedies

    def line(self, config: RunConfig) -> str:
        """`megagpt.parallel.tensor: 2 is refused: ...`."""
        return f"{self.key}: {shown(_value_at(config, self.key))} is refused: {self.reason}"


def refusals(config: RunConfig, *, rows_known: bool = True) -> list[Rule]:
    """The rows that refuse this configuration; an empty list is a legal one.

    `rows_known`: whether `vocab_size` is what the run will have, not a stand-in until its data are
    prepared.
    """
    rows_known = rows_known and isinstance(config, ResolvedConfig)
    return [rule for rule in RULES if (rows_known or not rule.counts_rows) and rule.refuses(config)]


def can_be_cut(config: RunConfig) -> bool:
    """Whether every stage has a block; of what cannot be cut nothing can be planned."""
    return not _has_pipeline(config) or config.megagpt.parallel.pipeline <= _most_stages(config)


def _value_at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _optimizer_device(config: RunConfig) -> str:
    return config.zero_optimization.optimizer_device


def _parameter_device(config: RunConfig) -> str:
    return config.zero_optimization.parameter_device


def _stage(config: RunConfig) -> int:
    return config.zero_optimization.stage


def _has_pipeline(config: RunConfig) -> bool:
    return config.megagpt.parallel.pipeline > 1


def _ties_embeddings(config: RunConfig) -> bool:
    return isinstance(config, ResolvedConfig) and config.megagpt.model.tie_embeddings


def _shareable(config: RunConfig) -> int:
    """What the number of tensor ranks has to divide in each block."""
    return gcd(config.megagpt.model.num_kv_heads, config.megagpt.model.mlp_size)


def _shares_rows(config: RunConfig) -> bool:
    """Whether the rows of the embedding are divided, too."""
    return (config.megagpt.model.vocab_size or 0) % config.megagpt.parallel.tensor == 0


def _fewer_tensor_ranks(config: RunConfig) -> Iterator[str]:
    """Numbers of tensor ranks below the wanted one that divide the blocks."""
    for ranks in range(config.megagpt.parallel.tensor - 1, 0, -1):
        if _shareable(config) % ranks == 0:
            yield f"megagpt.parallel.tensor={ranks}"


def _fewer_for_the_rows(config: RunConfig) -> Iterator[str]:
    """Numbers of tensor ranks below the wanted one that divide the blocks and the rows."""
    rows = config.megagpt.model.vocab_size or 0
    return (item for item in _fewer_tensor_ranks(config) if rows % int(item.partition("=")[2]) == 0)


def _length(config: RunConfig) -> int:
    return config.megagpt.model.sequence_length


def _most_stages(config: RunConfig) -> int:
    """Pipeline ranks that can all have a block in each of their stages."""
    return max(1, config.megagpt.model.num_layers // config.megagpt.parallel.virtual_stages)


def _fewer_stages(config: RunConfig) -> Iterator[str]:
    """Fewer stages on each rank, or else fewer ranks: what no rank is left without work by."""
    parallel = config.megagpt.parallel
    blocks = config.megagpt.model.num_layers
    for virtual in range(min(parallel.virtual_stages - 1, blocks // parallel.pipeline), 0, -1):
        schedule = " megagpt.parallel.schedule=1f1b" if virtual == 1 else ""
        yield f"megagpt.parallel.virtual_stages={virtual}{schedule}"
    for ranks in range(min(parallel.pipeline - 1, _most_stages(config)), 0, -1):
        yield f"megagpt.parallel.pipeline={ranks}"


def _micro_batches(config: RunConfig) -> int:
    """Micro-batches of a step; 0 until they are known."""
    return config.gradient_accumulation_steps or 0 if isinstance(config, ResolvedConfig) else 0


def _fills_rounds(config: RunConfig, micro_batches: int) -> bool:
    """Whether torch's interleaved schedule can cut so many micro-batches into rounds."""
    return micro_batches % max(1, micro_batches // config.megagpt.parallel.pipeline) == 0


def _other_batches(config: RunConfig) -> Iterator[str]:
    """Batches of as many micro-batches as fill whole rounds, by whichever keys say how many
    there are.
    """
    if not isinstance(config, ResolvedConfig):
        return
    wanted = _micro_batches(config)
    samples = config.train_micro_batch_size_per_gpu * config.data_parallel_size
    for count in nearest_first(wanted, among=range(1, 2 * wanted + 1)):
        if _fills_rounds(config, count):
            batch, steps = (
                f"train_batch_size={count * samples}",
                f"gradient_accumulation_steps={count}",
            )
            yield from (batch, steps, f"{batch} {steps}")


def _at_stage(stage: int, *others: str) -> Remedies:
    """Another ZeRO stage, without the keys that do nothing there; or else other items."""

    def remedies(config: RunConfig) -> Iterator[str]:
        zero = config.zero_optimization
        idle = [
            key
            for key, of in ZERO_KEY_STAGES.items()
            if stage not in of and getattr(zero, key) is not None
        ]
        yield " ".join(
            [f"zero_optimization.stage={stage}", *(f"zero_optimization.{key}=null" for key in idle)]
        )
        yield from others

    return remedies


def _model_type(config: RunConfig) -> str:
    """fp32, fp16, bf16, or "unknown" while bf16.enabled is still "auto"."""
    if config.bf16.enabled == "auto":
        return "unknown"
    return "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"


def _accumulates_otherwise(config: RunConfig) -> bool:
    """Gradients accumulate in a format other than the model's."""
    wanted, model_type = config.data_types.grad_accum_dtype, _model_type(config)
    return wanted is not None and "unknown" not in (wanted, model_type) and wanted != model_type


def _layout(config: RunConfig) -> Layout | None:
    """Who holds what, once the ranks are known and if every rank has its part."""
    shared = _shareable(config) % config.megagpt.parallel.tensor == 0 and _shares_rows(config)
    return (
        Layout.of(config)
        if isinstance(config, ResolvedConfig) and shared and can_be_cut(config)
        else None
    )


def _largest_parameter_shard(config: RunConfig) -> int:
    """Elements of the largest parameter's share on any rank; 0 until the ranks are known."""
    if (layout := _layout(config)) is None:
        return 0
    parameters = (
        parameter
        for rank in range(layout.pipeline)
        for parameter in parameters_of_rank(layout, rank)
    )
    return -(-max(parameter.numel for parameter in parameters) // layout.data)


def _has_unequal_tiles(config: RunConfig) -> bool:
    """ZeRO 3's optimizer makes an all-reduce over the stages for each tile: those with fewer
    would wait for ever.
    """
    layout = _layout(config)
    return layout is not None and len(set(tile_counts(layout))) > 1


def _one_tile(config: RunConfig) -> list[str]:
    layout = _layout(config)
    return (
        []
        if layout is None
        else [f"zero_optimization.sub_group_size={fewest_elements_of_one_tile(layout)}"]
    )


def _buffer_too_small(config: RunConfig) -> bool:
    offload = config.zero_optimization.offload_param
    if offload is None or offload.device != "nvme":
        return False
    return (offload.buffer_size or PARAMETER_BUFFER_SIZE) < _largest_parameter_shard(config)


def _other_accumulation(config: RunConfig) -> list[str]:
    """A pipeline of tied embeddings can reduce each micro-batch at ZeRO 3 only."""
    in_its_format = f"data_types.grad_accum_dtype={_model_type(config)}"
    per_micro_batch = "megagpt.parallel.gradient_reduction=per_micro_batch"
    if _has_pipeline(config) and _ties_embeddings(config) and _stage(config) < 3:
        return [f"zero_optimization.stage=3 {per_micro_batch}", in_its_format]
    return [per_micro_batch, in_its_format]


NOT_FROM_NVME = {  # keys that do nothing for parameters on NVMe (compat.py, read_when_needed)
    "stage3_prefetch_bucket_size": "a parameter on NVMe is read when its module needs it, not "
    "ahead",
    "stage3_max_live_parameters": "it bounds what is fetched ahead, and from NVMe nothing is",
    "stage3_max_reuse_distance": "a parameter on NVMe is read again for each use: keeping it "
    "takes an I/O buffer",
}

RULES: tuple[Rule, ...] = (
    Rule(
        "megagpt.parallel.tensor",
        lambda config: _shareable(config) % config.megagpt.parallel.tensor != 0,
        "each rank takes as many key-value heads and MLP channels as any other",
        _fewer_tensor_ranks,
    ),
    Rule(
        "megagpt.parallel.tensor",
        lambda config: (
            _shareable(config) % config.megagpt.parallel.tensor == 0 and not _shares_rows(config)
        ),
        "each rank takes as many rows of the embedding as any other: of the vocabulary, padded to "
        "a multiple of 128",
        _fewer_for_the_rows,
        counts_rows=True,
    ),
    Rule(
        "megagpt.parallel.sequence",
        lambda config: (
            config.megagpt.parallel.sequence
            and _length(config) % config.megagpt.parallel.tensor != 0
        ),
        "each tensor rank holds as many positions as any other, and they do not divide the "
        "sequence",
        ("megagpt.parallel.sequence=false",),
    ),
    Rule(
        "megagpt.parallel.pipeline",
        lambda config: config.megagpt.parallel.pipeline > 1 and _stage(config) == 0,
        "DeepSpeed cannot put off the reduction of a pipeline's gradients without a ZeRO optimizer",
        _at_stage(1),
    ),
    Rule(
        "megagpt.parallel.pipeline",
        lambda config: not can_be_cut(config),
        "a stage would have no block, the model having fewer blocks than stages",
        _fewer_stages,
    ),
    Rule(
        "megagpt.parallel.virtual_stages",
        lambda config: (
            _has_pipeline(config)
            and config.megagpt.parallel.virtual_stages > 1
            and config.megagpt.parallel.schedule != "interleaved"
        ),
        "only the interleaved schedule runs several stages on a rank",
        ("megagpt.parallel.schedule=interleaved", "megagpt.parallel.virtual_stages=1"),
    ),
    Rule(
        "megagpt.parallel.schedule",
        lambda config: (
            _has_pipeline(config)
            and config.megagpt.parallel.schedule == "interleaved"
            and config.megagpt.parallel.virtual_stages == 1
        ),
        "it interleaves several stages of a rank, and there is one",
        ("megagpt.parallel.virtual_stages=2", "megagpt.parallel.schedule=1f1b"),
    ),
    Rule(
        "gradient_accumulation_steps",
        lambda config: (
            _has_pipeline(config)
            and config.megagpt.parallel.schedule == "interleaved"
            and not _fills_rounds(config, _micro_batches(config))
        ),
        "the interleaved schedule runs its micro-batches in equal rounds of about one a pipeline "
        "rank",
        _other_batches,
    ),
    Rule(
        "megagpt.parallel.gradient_reduction",
        lambda config: (
            _has_pipeline(config)
            and config.megagpt.parallel.gradient_reduction == "per_micro_batch"
            and _ties_embeddings(config)
            and (_stage(config) < 3 or _optimizer_device(config) == "nvme")
        ),
        "the copies of a tied embedding on the first and last stage add their gradients up, of "
        "which ZeRO 1 and 2 cut the two at different places, and which are on the disk with an "
        "optimizer on NVMe",
        ("megagpt.parallel.gradient_reduction=per_step",),
    ),
    Rule(
        "zero_optimization.overlap_comm",
        lambda config: (
            config.zero_optimization.overlap_comm is True
            and _stage(config) == 1
            and _has_pipeline(config)
            and config.megagpt.parallel.schedule == "interleaved"
            and config.megagpt.parallel.gradient_reduction == "per_micro_batch"
        ),
        "ZeRO 1 then reduces what the last backward of a step reaches: of one of a rank's stages "
        "only",
        ("zero_optimization.overlap_comm=false",),
    ),
    Rule(
        "zero_optimization.offload_param.device",
        lambda config: (
            _has_pipeline(config)
            and _parameter_device(config) == "nvme"
            and _ties_embeddings(config)
        ),
        "adding the gradients of a tied embedding's two copies was not shown to work with "
        "parameters on NVMe",
        ("megagpt.model.tie_embeddings=false",),
    ),
    Rule(
        "megagpt.parallel.schedule",
        lambda config: (
            config.megagpt.parallel.schedule != "1f1b" and config.megagpt.parallel.pipeline == 1
        ),
        "it orders the micro-batches of a pipeline, and there is none",
        ("megagpt.parallel.schedule=1f1b",),
    ),
    Rule(
        "megagpt.parallel.virtual_stages",
        lambda config: (
            config.megagpt.parallel.virtual_stages > 1 and config.megagpt.parallel.pipeline == 1
        ),
        "it cuts the stages of a pipeline, and there is none",
        ("megagpt.parallel.virtual_stages=1",),
    ),
    Rule(
        "megagpt.parallel.sequence",
        lambda config: config.megagpt.parallel.sequence and config.megagpt.parallel.tensor == 1,
        "it splits the norms over the tensor axis, which has one rank",
        ("megagpt.parallel.sequence=false",),
    ),
    Rule(
        "megagpt.parallel.gradient_reduction",
        lambda config: (
            config.megagpt.parallel.gradient_reduction == "per_step"
            and _stage(config) == 0
            and not _has_pipeline(config)
        ),
        "DeepSpeed's coalesced reduction needs a ZeRO optimizer",
        _at_stage(1),
    ),
    Rule(
        "zero_optimization.offload_optimizer.device",
        lambda config: _optimizer_device(config) != "none" and _stage(config) == 0,
        "ZeRO 0 has no partitioned optimizer state to offload",
        _at_stage(1),
    ),
    Rule(
        "zero_optimization.offload_optimizer.device",
        lambda config: _optimizer_device(config) == "nvme" and _stage(config) in (1, 2),
        "DeepSpeed ignores NVMe below ZeRO 3: no swap file ever appears",
        _at_stage(3),
    ),
    Rule(
        "zero_optimization.offload_param.device",
        lambda config: _parameter_device(config) != "none" and _stage(config) < 3,
        "DeepSpeed ignores parameter offload below ZeRO 3",
        _at_stage(3),
    ),
    Rule(
        "zero_optimization.offload_param.device",
        lambda config: _parameter_device(config) == "nvme" and _model_type(config) == "fp32",
        "DeepSpeed swaps parameters to NVMe in bf16 or fp16 only, and this run computes in fp32",
        ("bf16.enabled=true",),
    ),
    *(
        Rule(
            f"zero_optimization.{key}",
            lambda config, key=key: (  # type: ignore[misc]
                _parameter_device(config) == "nvme" and bool(getattr(config.zero_optimization, key))
            ),
            reason,
            (f"zero_optimization.{key}=null",),
        )
        for key, reason in NOT_FROM_NVME.items()
    ),
    Rule(
        "zero_optimization.offload_param.buffer_size",
        _buffer_too_small,
        "a rank's share of the largest parameter does not fit into one I/O buffer",
        lambda config: [
            f"zero_optimization.offload_param.buffer_size={_largest_parameter_shard(config)}"
        ],
        counts_rows=True,
    ),
    Rule(
        "zero_optimization.stage",
        lambda config: (
            _stage(config) == 0
            and _model_type(config) in ("bf16", "fp16")
            and not _has_pipeline(config)
        ),
        "DeepSpeed keeps 16-bit weights at ZeRO 0 in optimizers of another kind, which "
        "checkpoints cannot address",
        _at_stage(1),
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda config: (
            _accumulates_otherwise(config)
            and _stage(config) > 0
            and config.megagpt.parallel.gradient_reduction == "per_step"
        ),
        "the one reduction of a step adds micro-batches up in the model's format before it "
        "converts them",
        _other_accumulation,
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda config: (
            _accumulates_otherwise(config) and config.data_types.grad_accum_dtype != "fp32"
        ),
        "it is less exact than the model, or another 16-bit format",
        ("data_types.grad_accum_dtype=fp32", "data_types.grad_accum_dtype=null"),
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda config: (
            _accumulates_otherwise(config)
            and _model_type(config) == "bf16"
            and _stage(config) == 1
            and _optimizer_device(config) == "none"
        ),
        "DeepSpeed then leaves the ZeRO optimizer for its BF16_Optimizer, which cannot coalesce "
        "reductions",
        _at_stage(2),
    ),
    Rule(
        "zero_optimization.sub_group_size",
        _has_unequal_tiles,
        "it cuts the shards of pipeline stages into different numbers of optimizer tiles, and "
        "they need equal ones",
        _one_tile,
        counts_rows=True,
    ),
)
