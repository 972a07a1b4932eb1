"""The table of what composes: each rule refuses a combination, says why and what to try instead.

The table, `RULES`, is at the end; the functions before it are its conditions and remedies.

A rule exists because DeepSpeed 0.19.8 would ignore the combination or fail late, or because this
trainer does not support it: every accepted key takes effect. A remedy for one rule may break
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
    """One rule.

    Each remedy is one or several `--set` items, separated by spaces, that satisfy this rule;
    the nearest comes first. `counts_rows`: the rule depends on the rows of the embedding and
    waits until the data or the configuration tell them.
    """

    key: str
    refuses: Callable[[RunConfig], bool]
    reason: str
    remedies: tuple[str, ...] | Remedies
    counts_rows: bool = False

    def remedies_for(self, config: RunConfig) -> Iterable[str]:
        """Return the `--set` items for this configuration."""
        return self.remedies(config) if callable(self.remedies) else self.remedies

    def line(self, config: RunConfig) -> str:
        """Return an error line: `megagpt.parallel.tensor: 2 is refused: ...`."""
        return f"{self.key}: {shown(_value_at(config, self.key))} is refused: {self.reason}"


def refusals(config: RunConfig, *, rows_known: bool = True) -> list[Rule]:
    """Return the rules that refuse this configuration; empty if it is legal.

    `rows_known`: whether `vocab_size` is final, not provisional until the data are prepared.
    """
    rows_known = rows_known and isinstance(config, ResolvedConfig)
    return [rule for rule in RULES if (rows_known or not rule.counts_rows) and rule.refuses(config)]


def can_be_cut(config: RunConfig) -> bool:
    """Return whether every stage has a block; if not, nothing can be planned."""
    return not _has_pipeline(config) or config.megagpt.parallel.pipeline <= _most_stages(config)


def _value_at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _compiles(config: RunConfig) -> bool:
    return config.megagpt.training.compile != "none"


def _optimizer_device(config: RunConfig) -> str:
    return config.zero_optimization.optimizer_device


def _parameter_device(config: RunConfig) -> str:
    return config.zero_optimization.parameter_device


def _stage(config: RunConfig) -> int:
    return config.zero_optimization.stage


def _has_pipeline(config: RunConfig) -> bool:
    return config.megagpt.parallel.pipeline > 1


def _ties_embeddings(config: RunConfig) -> bool:
    """Return whether embedding and head are one trained weight; under adapters they are frozen."""
    trained = config.megagpt.training.lora is None
    return isinstance(config, ResolvedConfig) and config.megagpt.model.tie_embeddings and trained


def _shareable(config: RunConfig) -> int:
    """Return the number that the tensor axis must divide in each block."""
    return gcd(config.megagpt.model.num_kv_heads, config.megagpt.model.mlp_size)


def _shares_rows(config: RunConfig) -> bool:
    """Return whether the tensor axis divides the rows of the embedding."""
    return (config.megagpt.model.vocab_size or 0) % config.megagpt.parallel.tensor == 0


def _fewer_tensor_ranks(config: RunConfig) -> Iterator[str]:
    """Yield smaller tensor axes that divide the blocks."""
    for ranks in range(config.megagpt.parallel.tensor - 1, 0, -1):
        if _shareable(config) % ranks == 0:
            yield f"megagpt.parallel.tensor={ranks}"


def _fewer_for_the_rows(config: RunConfig) -> Iterator[str]:
    """Yield smaller tensor axes that divide the blocks and the rows of the embedding."""
    rows = config.megagpt.model.vocab_size or 0
    return (item for item in _fewer_tensor_ranks(config) if rows % int(item.partition("=")[2]) == 0)


def _length(config: RunConfig) -> int:
    return config.megagpt.model.sequence_length


def _most_stages(config: RunConfig) -> int:
    """Return the largest pipeline axis with a block in every stage."""
    return max(1, config.megagpt.model.num_layers // config.megagpt.parallel.virtual_stages)


def _fewer_stages(config: RunConfig) -> Iterator[str]:
    """Yield fewer stages a rank, then fewer ranks, so that every stage has a block."""
    parallel = config.megagpt.parallel
    blocks = config.megagpt.model.num_layers
    for virtual in range(min(parallel.virtual_stages - 1, blocks // parallel.pipeline), 0, -1):
        schedule = " megagpt.parallel.schedule=1f1b" if virtual == 1 else ""
        yield f"megagpt.parallel.virtual_stages={virtual}{schedule}"
    for ranks in range(min(parallel.pipeline - 1, _most_stages(config)), 0, -1):
        yield f"megagpt.parallel.pipeline={ranks}"


def _micro_batches(config: RunConfig) -> int:
    """Return the micro-batches of a step; 0 until they are known."""
    return config.gradient_accumulation_steps or 0 if isinstance(config, ResolvedConfig) else 0


def _fills_rounds(config: RunConfig, micro_batches: int) -> bool:
    """Return whether torch's interleaved schedule can split this many micro-batches into rounds."""
    return micro_batches % max(1, micro_batches // config.megagpt.parallel.pipeline) == 0


def _other_batches(config: RunConfig) -> Iterator[str]:
    """Yield batches that fill whole rounds, with each key that sets the micro-batches."""
    if not isinstance(config, ResolvedConfig):
        return
    wanted = _micro_batches(config)
    samples = config.train_micro_batch_size_per_gpu * config.data_parallel_size
    for count in nearest_first(wanted, among=range(1, 2 * wanted + 1)):
        if _fills_rounds(config, count):
            batch = f"train_batch_size={count * samples}"
            steps = f"gradient_accumulation_steps={count}"
            yield from (batch, steps, f"{batch} {steps}")


def _at_stage(stage: int, *others: str) -> Remedies:
    """Return remedies: another ZeRO stage, without the keys that have no effect there.

    `others` are tried after it.
    """

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
    """Return fp32, fp16, bf16, or "unknown" while the device has to decide."""
    if "auto" in (config.bf16.enabled, config.fp16.enabled):
        return "unknown"
    return "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"


def _accumulates_otherwise(config: RunConfig) -> bool:
    """Return whether gradients accumulate in a format other than the model's."""
    wanted = config.data_types.grad_accum_dtype
    model_type = _model_type(config)
    return wanted is not None and "unknown" not in (wanted, model_type) and wanted != model_type


def _layout(config: RunConfig) -> Layout | None:
    """Return the layout, or None if the ranks are not known or do not divide the model."""
    shared = _shareable(config) % config.megagpt.parallel.tensor == 0 and _shares_rows(config)
    return (
        Layout.of(config)
        if isinstance(config, ResolvedConfig) and shared and can_be_cut(config)
        else None
    )


def _largest_parameter_shard(config: RunConfig) -> int:
    """Return the elements of a rank's share of the largest parameter; 0 if ranks are unknown."""
    if (layout := _layout(config)) is None:
        return 0
    parameters = (
        parameter
        for rank in range(layout.pipeline)
        for parameter in parameters_of_rank(layout, rank)
    )
    return -(-max(parameter.numel for parameter in parameters) // layout.data)


def _has_unequal_tiles(config: RunConfig) -> bool:
    """Return whether pipeline ranks have different numbers of optimizer tiles at ZeRO 3.

    ZeRO 3's optimizer runs an all-reduce over the stages for each tile, so ranks would hang.
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
    """Return remedies: reduce every micro-batch, or accumulate in the model's format.

    With a pipeline and tied embeddings, reducing every micro-batch also needs ZeRO 3.
    """
    in_its_format = f"data_types.grad_accum_dtype={_model_type(config)}"
    per_micro_batch = "megagpt.parallel.gradient_reduction=per_micro_batch"
    if _has_pipeline(config) and _ties_embeddings(config) and _stage(config) < 3:
        return [f"zero_optimization.stage=3 {per_micro_batch}", in_its_format]
    return [per_micro_batch, in_its_format]


RULES: tuple[Rule, ...] = (
    Rule(
        "megagpt.training.compile",
        lambda config: _compiles(config) and _stage(config) == 3,
        "ZeRO 3 gathers the parameters of a block in hooks of its layers, which compiled code does "
        "not call",
        lambda config: ("megagpt.training.compile=none", *_at_stage(2)(config)),
    ),
    Rule(
        "megagpt.training.compile",
        lambda config: _compiles(config) and config.megagpt.parallel.tensor > 1,
        "the ranks of the tensor axis communicate inside a block, which torch.compile cannot trace",
        ("megagpt.training.compile=none", "megagpt.parallel.tensor=1"),
    ),
    Rule(
        "megagpt.parallel.tensor",
        lambda config: _shareable(config) % config.megagpt.parallel.tensor != 0,
        "it must divide num_kv_heads and the MLP width",
        _fewer_tensor_ranks,
    ),
    Rule(
        "megagpt.parallel.tensor",
        lambda config: (
            _shareable(config) % config.megagpt.parallel.tensor == 0 and not _shares_rows(config)
        ),
        "it must divide the rows of the embedding (the vocabulary, padded to a multiple of 128)",
        _fewer_for_the_rows,
        counts_rows=True,
    ),
    Rule(
        "megagpt.parallel.sequence",
        lambda config: (
            config.megagpt.parallel.sequence
            and _length(config) % config.megagpt.parallel.tensor != 0
        ),
        "megagpt.parallel.tensor must divide megagpt.model.sequence_length",
        ("megagpt.parallel.sequence=false",),
    ),
    Rule(
        "megagpt.parallel.pipeline",
        lambda config: config.megagpt.parallel.pipeline > 1 and _stage(config) == 0,
        "DeepSpeed cannot delay the reduction of a pipeline's gradients without a ZeRO optimizer",
        _at_stage(1),
    ),
    Rule(
        "megagpt.parallel.pipeline",
        lambda config: not can_be_cut(config),
        "a stage would have no block: the model has fewer blocks than stages",
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
        "it needs several stages on each rank, but megagpt.parallel.virtual_stages is 1",
        ("megagpt.parallel.virtual_stages=2", "megagpt.parallel.schedule=1f1b"),
    ),
    Rule(
        "gradient_accumulation_steps",
        lambda config: (
            _has_pipeline(config)
            and config.megagpt.parallel.schedule == "interleaved"
            and not _fills_rounds(config, _micro_batches(config))
        ),
        "the interleaved schedule runs the micro-batches in equal rounds of about one per pipeline "
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
        "the gradients of the two copies of the tied embedding cannot be summed per micro-batch: "
        "ZeRO 1 and 2 partition the copies differently, and with an optimizer on NVMe the "
        "gradients are on disk",
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
        "ZeRO 1 then reduces only the gradients of a step's last backward, which are those of one "
        "of a rank's stages",
        ("zero_optimization.overlap_comm=false",),
    ),
    Rule(
        "zero_optimization.offload_param.device",
        lambda config: (
            _has_pipeline(config)
            and _parameter_device(config) == "nvme"
            and _ties_embeddings(config)
        ),
        "summing the gradients of a tied embedding's two copies was never tested with parameters "
        "on NVMe",
        ("megagpt.model.tie_embeddings=false",),
    ),
    Rule(
        "megagpt.parallel.schedule",
        lambda config: (
            config.megagpt.parallel.schedule != "1f1b" and config.megagpt.parallel.pipeline == 1
        ),
        "it orders the micro-batches of a pipeline, but megagpt.parallel.pipeline is 1",
        ("megagpt.parallel.schedule=1f1b",),
    ),
    Rule(
        "megagpt.parallel.virtual_stages",
        lambda config: (
            config.megagpt.parallel.virtual_stages > 1 and config.megagpt.parallel.pipeline == 1
        ),
        "it splits the stages of a pipeline, but megagpt.parallel.pipeline is 1",
        ("megagpt.parallel.virtual_stages=1",),
    ),
    Rule(
        "megagpt.parallel.sequence",
        lambda config: config.megagpt.parallel.sequence and config.megagpt.parallel.tensor == 1,
        "it splits the sequence over the tensor axis, but megagpt.parallel.tensor is 1",
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
        lambda config: ("zero_optimization.offload_param=null", *_at_stage(3)(config)),
    ),
    Rule(
        "zero_optimization.offload_param.device",
        lambda config: _parameter_device(config) == "nvme" and _model_type(config) == "fp32",
        "DeepSpeed swaps parameters to NVMe in bf16 or fp16 only, but this run computes in fp32",
        ("bf16.enabled=true",),
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
        "with 16-bit weights at ZeRO 0 DeepSpeed uses other optimizers, whose state checkpoints "
        "cannot address",
        _at_stage(1),
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda config: (
            _accumulates_otherwise(config)
            and _stage(config) > 0
            and config.megagpt.parallel.gradient_reduction == "per_step"
        ),
        "with per_step, micro-batches are summed in the model's format before the conversion",
        _other_accumulation,
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda config: (
            _accumulates_otherwise(config) and config.data_types.grad_accum_dtype != "fp32"
        ),
        "it is less precise than the model's format, or the other 16-bit format",
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
        "DeepSpeed then uses its BF16_Optimizer instead of the ZeRO optimizer, and that cannot "
        "coalesce reductions",
        _at_stage(2),
    ),
    Rule(
        "zero_optimization.sub_group_size",
        _has_unequal_tiles,
        "it splits the shards of the pipeline stages into different numbers of optimizer tiles; "
        "all stages need the same number",
        _one_tile,
        counts_rows=True,
    ),
)
