"""A run like the file's, small enough to train in a moment, with the settings of a strategy.

No torch. Every mechanism still acts: there is a head and a block for each rank, and, if NVMe is
tried, enough elements for DeepSpeed to swap. Sizes that the file states for its own model shrink
with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from math import lcm
from typing import Any

from megagpt.config import ModelConfig, ResolvedConfig, RunConfig
from megagpt.parity.strategies import Strategy
from megagpt.planning.cost.model_states import (
    FP32_BYTES,
    LEAST_SWAPPED_BYTES,
    PERSISTENCE_THRESHOLD,
    tile_counts,
)
from megagpt.planning.layout import Layout
from megagpt.schema.arithmetic import round_up
from megagpt.schema.errors import shown
from megagpt.schema.model import ModelSection

SAMPLES_PER_RANK = 2
LEARNING_RATE = 1e-3
DROPOUT = 0.1
# Of Adam: well above the rounding of a gradient, which 1e-8 is not, and well below most gradients.
EPSILON = 1e-6
# Least sizes of the model.
GROUPS = 8
WIDTH = 64  # divided among the groups of query and key-value heads
LENGTH = 16
ROWS = 256
LEAST_TILE = LEAST_SWAPPED_BYTES // FP32_BYTES  # elements of an optimizer tile that is swapped
LEAST_PIECE = LEAST_SWAPPED_BYTES // 2  # elements of a bf16 parameter's piece that is swapped
ROOM = 1.25  # stages are not quite equal
TILE = "sub_group_size"  # the optimizer's; each stage must have the same number of tiles
SIZES = (  # keys of zero_optimization that count elements of a model
    "reduce_bucket_size",
    "allgather_bucket_size",
    TILE,
    "stage3_prefetch_bucket_size",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
# Keys of the model that do not depend on its size. A rotary scaling does, and is the same on any
# mesh.
OF_THE_KIND = (
    "position",
    "rope_base",
    "rope_fraction",
    "norm",
    "norm_epsilon",
    "norm_weight_offset",
    "post_norm",
    "qk_norm",
    "parallel_residual",
    "activation",
    "bias",
    "qkv_bias",
    "output_bias",
    "mlp_bias",
    "norm_bias",
    "score_scale",
    "score_softcap",
    "embedding_scale",
    "logit_softcap",
    "z_loss",
    "tie_embeddings",
)
OFFLOAD = ("offload_optimizer", "offload_param")


def small_document(
    file: RunConfig, tried: Sequence[Strategy], world_size: int, steps: int, precision: str
) -> dict[str, Any]:
    """Return the file's kind of model and optimizer, small, and the same for all strategies."""
    adam = file.optimizer.params
    own = {"betas": list(adam.betas), "weight_decay": adam.weight_decay}
    return {
        "train_batch_size": SAMPLES_PER_RANK * world_size,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "eps": EPSILON, **own}},
        "gradient_clipping": file.gradient_clipping,
        "bf16": {"enabled": precision == "bf16"},
        "megagpt": {
            "model": _small_model(file.megagpt.model, tried, world_size, precision),
            "data": {
                "document_mask": file.megagpt.data.document_mask,
                "packing": file.megagpt.data.packing,
            },
            "training": {"total_steps": steps, "seed": file.megagpt.training.seed},
        },
    }


def _small_model(
    kind: ModelSection, tried: Sequence[Strategy], world_size: int, precision: str
) -> dict[str, Any]:
    """Return a model that every tensor axis divides, with a block for each stage.

    For an optimizer on NVMe, blocks are wide enough for each rank to have a tile to swap; for
    parameters on NVMe, the token table is long enough for its pieces to be swapped.
    """
    tensor = lcm(*(strategy.tensor for strategy in tried))
    groups = round_up(GROUPS, tensor)
    heads = groups * (1 if kind.num_kv_heads == kind.num_heads else 2)
    shape = {key: value for key in OF_THE_KIND if (value := getattr(kind, key)) is not None}
    if kind.sliding_window is not None:
        shape |= {"sliding_window": min(kind.sliding_window, LENGTH // 2)}
        shape |= {"sliding_window_pattern": kind.sliding_window_pattern}
    shape |= {
        "num_layers": max(2, *(strategy.num_stages for strategy in tried)),
        "num_heads": heads,
        "num_kv_heads": groups,
        "sequence_length": round_up(LENGTH, tensor),
        "dropout": DROPOUT,
    }
    swapped = (
        ROOM * LEAST_TILE * world_size
        if any(strategy.optimizer == "nvme" for strategy in tried)
        else 0
    )
    for head_size in count(max(4, WIDTH // groups // 2 * 2), 2):
        rotated = int(head_size * kind.rope_fraction)
        if kind.position == "rotary" and (rotated == 0 or rotated % 2):
            continue
        model = ModelConfig(**shape, hidden_size=heads * head_size, vocab_size=ROWS)
        if (
            model.mlp_size % tensor == 0
            and model.num_layers * model.block_matmul_parameters >= swapped
        ):
            break
    rows = ROWS
    if precision == "bf16" and any(strategy.parameters == "nvme" for strategy in tried):
        rows = LEAST_PIECE * world_size // model.hidden_size + 1
    rows = round_up(rows, lcm(128, tensor))
    return shape | {"hidden_size": model.hidden_size, "vocab_size": rows, "vocabulary": rows - 6}


def resolved(
    document: dict[str, Any], strategy: Strategy, world_size: int, nvme_path: str | None
) -> ResolvedConfig:
    """Return the small run under a strategy; raise ConfigError if it cannot be described."""
    own = document | {
        # A rank of a pipeline of p then gets 2 p micro-batches.
        "train_micro_batch_size_per_gpu": strategy.tensor,
        "megagpt": document["megagpt"] | {"parallel": strategy.parallel},
    }
    model = ModelConfig(**document["megagpt"]["model"])
    zero: dict[str, Any] = {"stage": strategy.stage}
    if strategy.file is not None:
        zero = _own_zero(strategy.file, model)
        _take_over(own, strategy.file)
    elif strategy.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # partition small parameters too
    _place(zero, strategy, nvme_path, pieces=world_size // strategy.pipeline, model=model)
    config = _resolved(own, zero, world_size)
    if TILE in zero and strategy.pipeline > 1 and len(set(tile_counts(Layout.of(config)))) > 1:
        del zero[TILE]  # the small stages get other numbers of tiles than the large ones
        config = _resolved(own, zero, world_size)
    return config


def _resolved(document: dict[str, Any], zero: dict[str, Any], world_size: int) -> ResolvedConfig:
    text = json.dumps(document | {"zero_optimization": zero})
    return RunConfig.from_json(text).resolved(
        world_size=world_size, vocabulary=None, bf16_native=False
    )


def _own_zero(file: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """Return the file's own section, scaled to the small model.

    Buckets, tiles and bounds hold the same part of the model as in the large one, and parameters
    stay whole below the same multiple of its width: norms and biases do, matrices do not.
    """
    large = file.megagpt.model
    zero = file.zero_optimization.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    part = (model.num_layers * model.hidden_size**2) / (large.num_layers * large.hidden_size**2)
    for key in zero.keys() & set(SIZES):
        zero[key] = _part_of(zero[key], part)
    if TILE in zero and file.zero_optimization.optimizer_device == "nvme":
        zero[TILE] = max(zero[TILE], LEAST_TILE)
    if zero.get("stage") == 3:
        threshold = zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
        zero["stage3_param_persistence_threshold"] = _part_of(
            threshold, model.hidden_size / large.hidden_size
        )
    if "max_in_cpu" in (offload := zero.get("offload_param", {})):
        offload["max_in_cpu"] = _part_of(offload["max_in_cpu"], part)
    return zero


def _part_of(size: int, part: float) -> int:
    return max(1, round(size * part)) if size else 0


def _take_over(own: dict[str, Any], file: RunConfig) -> None:
    """Copy the file's other settings of how a step is executed."""
    own["megagpt"] |= {
        "training": own["megagpt"]["training"] | {"recompute": file.megagpt.training.recompute}
    }
    own["optimizer"] = own["optimizer"] | {
        "params": own["optimizer"]["params"] | {"torch_adam": file.optimizer.params.torch_adam}
    }
    if file.aio is not None:
        # DeepSpeed swaps nothing smaller.
        least = {"block_size": min(file.aio.block_size, LEAST_SWAPPED_BYTES)}
        own["aio"] = file.aio.model_dump() | least
    # These formats belong to a bf16 run; an fp32 run cannot use them.
    if own["bf16"]["enabled"] and file.bf16.enabled:
        for key in ("data_types", "communication_data_type"):
            if value := file.model_dump(mode="json", exclude_none=True).get(key):
                own[key] = value


def _place(
    zero: dict[str, Any],
    strategy: Strategy,
    nvme_path: str | None,
    *,
    pieces: int,
    model: ModelConfig,
) -> None:
    """Set the offload devices; on NVMe with buffers of the small model's size."""
    for section, place in zip(OFFLOAD, (strategy.optimizer, strategy.parameters), strict=True):
        if place == "none":
            continue
        keys = zero.setdefault(section, {})
        keys["device"] = place
        if place == "nvme":
            keys["nvme_path"] = nvme_path or keys.get("nvme_path")
            if section == "offload_param":
                largest = model.hidden_size * max(model.vocab_size, 2 * model.mlp_size)
                keys |= {
                    "buffer_size": -(-largest // pieces),
                    "max_in_cpu": keys.get("max_in_cpu", 0),
                }


def left_out_key(strategy: Strategy, config: ResolvedConfig) -> str | None:
    """Return the key of the file's `zero_optimization` that the small run cannot use, or None."""
    assert strategy.file is not None
    stated = strategy.file.zero_optimization.sub_group_size is not None
    return TILE if stated and config.zero_optimization.sub_group_size is None else None


def further_keys(strategy: Strategy, config: ResolvedConfig) -> list[str]:
    """Return the small run's settings of the file's own strategy beyond the table's columns."""
    assert strategy.file is not None
    zero = config.zero_optimization
    given = strategy.file.zero_optimization.model_fields_set - {"stage", *OFFLOAD}
    keys = {key: getattr(zero, key) for key in type(zero).model_fields if key in given}
    keys |= {
        "recompute": config.megagpt.training.recompute,
        "grad_accum_dtype": config.data_types.grad_accum_dtype,
    }
    stated = {key: value for key, value in keys.items() if value not in (None, "none")}
    return [
        f"{key} {value if isinstance(value, str) else shown(value)}"
        for key, value in stated.items()
    ]
