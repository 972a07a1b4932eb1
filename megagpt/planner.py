"""The one table of what composes: each row refuses a combination, says why, and names the nearest legal one.

A row stands here because DeepSpeed 0.19.8 would ignore the combination or fail late, or because this trainer does not
do it yet: a key that is accepted acts. Call `require_legal` on the configuration as read and again on the resolved
one, where "auto" and the number of ranks are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

from megagpt.config import ConfigError, ResolvedConfig, RunConfig
from megagpt.config_errors import shown

BUFFER_ELEMENTS = 100_000_000  # what DeepSpeed takes where offload_param.buffer_size is absent (zero/offload_config.py)


@dataclass(frozen=True)
class Rule:
    """One row. `remedy` is the `--set` item that makes a refused configuration legal in this respect."""

    key: str
    refuses: Callable[[RunConfig], bool]
    reason: str
    remedy: str | Callable[[RunConfig], str]

    def remedy_for(self, config: RunConfig) -> str:
        """The `--set` item for this configuration."""
        return self.remedy if isinstance(self.remedy, str) else self.remedy(config)

    def line(self, config: RunConfig) -> str:
        """`megagpt.parallel.tensor: 2 is refused: ...; nearest legal: --set megagpt.parallel.tensor=1`."""
        value = shown(_value_at(config, self.key))
        return f"{self.key}: {value} is refused: {self.reason}; nearest legal: --set {self.remedy_for(config)}"


def refusals(config: RunConfig) -> list[Rule]:
    """The rows that refuse this configuration; an empty list is a legal one."""
    return [rule for rule in RULES if rule.refuses(config)]


def require_legal(config: RunConfig, source: str = "") -> None:
    """Raise ConfigError with a line for every row that refuses; `source` (the file) stands before each."""
    prefix = f"{source}: " if source else ""
    lines = [prefix + rule.line(config) for rule in refusals(config)]
    if lines:
        raise ConfigError(lines)


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
    """What the number of tensor ranks has to divide; that number itself until the model is known."""
    if not isinstance(config, ResolvedConfig):
        return config.megagpt.parallel.tensor
    model = config.megagpt.model
    return gcd(model.num_kv_heads, model.mlp_size, model.vocab_size)


def _nearest_tensor(config: RunConfig) -> int:
    """The largest number of tensor ranks that is no larger than the wanted one and divides the model."""
    wanted = config.megagpt.parallel.tensor
    return max(ranks for ranks in range(1, wanted + 1) if _shareable(config) % ranks == 0)


def _length(config: RunConfig) -> int:
    return config.megagpt.model.sequence_length


def _most_stages(config: RunConfig) -> int:
    """Pipeline ranks that can all have a block in each of their stages; unbounded until the model is known."""
    parallel = config.megagpt.parallel
    if not isinstance(config, ResolvedConfig):
        return parallel.pipeline
    return max(1, config.megagpt.model.num_layers // parallel.virtual_stages)


def _micro_batches(config: RunConfig) -> int:
    """Micro-batches of a step; 0 until they are known."""
    return config.gradient_accumulation_steps or 0 if isinstance(config, ResolvedConfig) else 0


def _interleaved_micro_batches(config: RunConfig) -> int:
    """The nearest number of micro-batches that torch's interleaved schedule takes: a multiple of its rounds."""
    parallel, wanted = config.megagpt.parallel, _micro_batches(config)
    if not _has_pipeline(config) or parallel.schedule != "interleaved" or wanted == 0:
        return wanted
    return wanted - wanted % max(1, wanted // parallel.pipeline)


def _interleaved_batch(config: RunConfig) -> int:
    """The batch of that many micro-batches."""
    if not isinstance(config, ResolvedConfig):
        return 0
    samples = config.train_micro_batch_size_per_gpu * config.data_parallel_size
    return _interleaved_micro_batches(config) * samples


def _model_type(config: RunConfig) -> str:
    """fp32, fp16, bf16, or "unknown" while bf16.enabled is still "auto"."""
    if config.bf16.enabled == "auto":
        return "unknown"
    return "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"


def _accumulates_otherwise(config: RunConfig) -> bool:
    """Gradients accumulate in a format other than the model's."""
    wanted, model_type = config.data_types.grad_accum_dtype, _model_type(config)
    return wanted is not None and "unknown" not in (wanted, model_type) and wanted != model_type


def _largest_parameter_shard(config: RunConfig) -> int:
    """Elements of the largest parameter's share on one rank; 0 until the ranks are known."""
    if not isinstance(config, ResolvedConfig):
        return 0
    model = config.megagpt.model
    up_width = model.mlp_size * (1 if model.activation == "gelu" else 2)  # gate and up are one matrix
    qkv_width = model.hidden_size + 2 * model.num_kv_heads * model.head_size
    largest = model.hidden_size * max(model.vocab_size, up_width, qkv_width)
    return -(-largest // config.data_parallel_size)


def _buffer_too_small(config: RunConfig) -> bool:
    offload = config.zero_optimization.offload_param
    if offload is None or offload.device != "nvme":
        return False
    return (offload.buffer_size or BUFFER_ELEMENTS) < _largest_parameter_shard(config)


RULES: tuple[Rule, ...] = (
    Rule(
        "megagpt.parallel.tensor",
        lambda config: _shareable(config) % config.megagpt.parallel.tensor != 0,
        "each rank takes as many key-value heads, MLP channels and rows of the vocabulary as any other",
        lambda config: f"megagpt.parallel.tensor={_nearest_tensor(config)}",
    ),
    Rule(
        "megagpt.parallel.sequence",
        lambda config: config.megagpt.parallel.sequence and _length(config) % config.megagpt.parallel.tensor != 0,
        "each tensor rank holds as many positions as any other, and they do not divide the sequence",
        "megagpt.parallel.sequence=false",
    ),
    Rule(
        "megagpt.parallel.pipeline",
        lambda config: config.megagpt.parallel.pipeline > 1 and _stage(config) == 0,
        "DeepSpeed cannot put off the reduction of a pipeline's gradients without a ZeRO optimizer",
        "zero_optimization.stage=1",
    ),
    Rule(
        "megagpt.parallel.pipeline",
        lambda config: not can_be_cut(config),
        "a stage would have no block, the model having fewer blocks than stages",
        lambda config: f"megagpt.parallel.pipeline={_most_stages(config)}",
    ),
    Rule(
        "fp16.enabled",
        lambda config: _has_pipeline(config) and config.fp16.enabled,
        "DeepSpeed would scale the gradients that one stage sends another a second time",
        "fp16.enabled=false",
    ),
    Rule(
        "megagpt.parallel.virtual_stages",
        lambda config: (
            _has_pipeline(config)
            and config.megagpt.parallel.virtual_stages > 1
            and config.megagpt.parallel.schedule != "interleaved"
        ),
        "only the interleaved schedule runs several stages on a rank",
        "megagpt.parallel.schedule=interleaved",
    ),
    Rule(
        "megagpt.parallel.schedule",
        lambda config: (
            _has_pipeline(config)
            and config.megagpt.parallel.schedule == "interleaved"
            and config.megagpt.parallel.virtual_stages == 1
        ),
        "it interleaves several stages of a rank, and there is one",
        "megagpt.parallel.virtual_stages=2",
    ),
    Rule(
        "gradient_accumulation_steps",
        lambda config: _interleaved_micro_batches(config) != _micro_batches(config),
        "the interleaved schedule runs its micro-batches in equal rounds of about one a pipeline rank",
        lambda config: f"train_batch_size={_interleaved_batch(config)}",
    ),
    Rule(
        "megagpt.parallel.gradient_reduction",
        lambda config: (
            _has_pipeline(config)
            and config.megagpt.parallel.gradient_reduction == "per_micro_batch"
            and _ties_embeddings(config)
        ),
        "the copies of a tied embedding on the first and last stage add their gradients once a step",
        "megagpt.parallel.gradient_reduction=per_step",
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
        "ZeRO 1 then reduces what the last backward of a step reaches: of one of a rank's stages only",
        "zero_optimization.overlap_comm=false",
    ),
    Rule(
        "zero_optimization.offload_param.device",
        lambda config: _has_pipeline(config) and _parameter_device(config) == "nvme" and _ties_embeddings(config),
        "adding the gradients of a tied embedding's two copies was not shown to work with parameters on NVMe",
        "megagpt.model.tie_embeddings=false",
    ),
    Rule(
        "megagpt.parallel.schedule",
        lambda config: config.megagpt.parallel.schedule != "1f1b" and config.megagpt.parallel.pipeline == 1,
        "it orders the micro-batches of a pipeline, and there is none",
        "megagpt.parallel.schedule=1f1b",
    ),
    Rule(
        "megagpt.parallel.virtual_stages",
        lambda config: config.megagpt.parallel.virtual_stages > 1 and config.megagpt.parallel.pipeline == 1,
        "it cuts the stages of a pipeline, and there is none",
        "megagpt.parallel.virtual_stages=1",
    ),
    Rule(
        "megagpt.parallel.sequence",
        lambda config: config.megagpt.parallel.sequence and config.megagpt.parallel.tensor == 1,
        "it splits the norms over the tensor axis, which has one rank",
        "megagpt.parallel.sequence=false",
    ),
    Rule(
        "megagpt.parallel.gradient_reduction",
        lambda config: (
            config.megagpt.parallel.gradient_reduction == "per_step"
            and _stage(config) == 0
            and not _has_pipeline(config)
        ),
        "DeepSpeed's coalesced reduction needs a ZeRO optimizer",
        "zero_optimization.stage=1",
    ),
    Rule(
        "zero_optimization.offload_optimizer.device",
        lambda config: _optimizer_device(config) != "none" and _stage(config) == 0,
        "ZeRO 0 has no partitioned optimizer state to offload",
        "zero_optimization.stage=1",
    ),
    Rule(
        "zero_optimization.offload_optimizer.device",
        lambda config: _optimizer_device(config) == "nvme" and _stage(config) in (1, 2),
        "DeepSpeed ignores NVMe below ZeRO 3: no swap file ever appears",
        "zero_optimization.stage=3",
    ),
    Rule(
        "zero_optimization.offload_param.device",
        lambda config: _parameter_device(config) != "none" and _stage(config) < 3,
        "DeepSpeed ignores parameter offload below ZeRO 3",
        "zero_optimization.stage=3",
    ),
    Rule(
        "zero_optimization.offload_param.device",
        lambda config: _parameter_device(config) == "nvme" and _model_type(config) == "fp32",
        "DeepSpeed swaps parameters to NVMe in bf16 or fp16 only, and this run computes in fp32",
        "bf16.enabled=true",
    ),
    Rule(
        "zero_optimization.offload_param.buffer_size",
        _buffer_too_small,
        "a rank's share of the largest parameter does not fit into one I/O buffer",
        lambda config: f"zero_optimization.offload_param.buffer_size={_largest_parameter_shard(config)}",
    ),
    Rule(
        "zero_optimization.stage",
        lambda config: _stage(config) == 0 and _model_type(config) in ("bf16", "fp16") and not _has_pipeline(config),
        "DeepSpeed keeps 16-bit weights at ZeRO 0 in optimizers of another kind, which checkpoints cannot address",
        "zero_optimization.stage=1",
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda config: (
            _accumulates_otherwise(config)
            and _stage(config) > 0
            and config.megagpt.parallel.gradient_reduction == "per_step"
        ),
        "the one reduction of a step adds micro-batches up in the model's format before it converts them",
        lambda config: (
            f"data_types.grad_accum_dtype={_model_type(config)}"
            if _has_pipeline(config) and _ties_embeddings(config)  # which reduce once a step
            else "megagpt.parallel.gradient_reduction=per_micro_batch"
        ),
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda config: _accumulates_otherwise(config) and config.data_types.grad_accum_dtype != "fp32",
        "it is less exact than the model, or another 16-bit format",
        "data_types.grad_accum_dtype=fp32",
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda config: (
            _accumulates_otherwise(config)
            and _model_type(config) == "bf16"
            and _stage(config) == 1
            and _optimizer_device(config) == "none"
        ),
        "DeepSpeed then leaves the ZeRO optimizer for its BF16_Optimizer, which cannot coalesce reductions",
        "zero_optimization.stage=2",
    ),
)
