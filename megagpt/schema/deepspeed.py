"""DeepSpeed's sections: the keys that take effect in this trainer, with DeepSpeed's names.

Checked against DeepSpeed 0.19.8 (runtime/config.py, zero/config.py, zero/offload_config.py,
precision_config.py, lr_schedules.py, swap_tensor/aio_config.py). A default of `None` means that the
key is absent and DeepSpeed's default holds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from megagpt.schema.fields import (
    ElementCount,
    PathText,
    Section,
    auto_or_value,
    execution,
    identity,
    refuse,
    section,
)

AutoBool = Annotated[
    Annotated[bool, Tag("value")] | Annotated[Literal["auto"], Tag("auto")], auto_or_value
]
AutoSteps = Annotated[
    Annotated[int, Field(ge=1), Tag("value")] | Annotated[Literal["auto"], Tag("auto")],
    auto_or_value,
]
FloatType = Literal["fp32", "fp16", "bf16"]


class OptimizerParams(Section):
    """The parameters of Adam.

    All have a default here because DeepSpeed's three Adams have different default weight
    decays.
    """

    lr: float = identity(..., "peak learning rate", ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        identity((0.9, 0.999), "decay of the two moments", strict=False)
    )
    eps: float = identity(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = identity(0.0, "decay of matrices; norms and biases never decay", ge=0)
    adam_w_mode: bool = identity(True, "decoupled weight decay; false only with type Adam")
    torch_adam: bool = execution(False, "use torch's Adam instead of DeepSpeed's compiled one")


class OptimizerConfig(Section):
    """Adam or AdamW."""

    type: Literal["Adam", "AdamW"] = identity(..., "optimizer")
    params: OptimizerParams = section(..., "the optimizer's numbers")

    @model_validator(mode="after")
    def _check_decoupled(self) -> OptimizerConfig:
        if self.type == "AdamW" and not self.params.adam_w_mode:
            refuse(
                [
                    (
                        "params.adam_w_mode",
                        'DeepSpeed ignores false with type "AdamW"; use type "Adam"',
                    )
                ]
            )
        return self


class _WarmupParams(Section):
    warmup_num_steps: int = identity(
        1000, "steps of the warm-up; at least 2, and 1 is 2 to DeepSpeed", ge=2
    )
    warmup_type: Literal["log", "linear"] = identity("log", "shape of the warm-up")


class WarmupLRParams(_WarmupParams):
    """Rise, then stay."""

    warmup_min_lr: float = identity(0.0, "learning rate at the start", ge=0)
    warmup_max_lr: float | None = identity(
        None, "learning rate after the warm-up; must equal optimizer.params.lr", ge=0
    )


class WarmupDecayLRParams(WarmupLRParams):
    """Rise, then fall to 0 in a straight line."""

    total_num_steps: AutoSteps = execution(
        "auto", 'steps until the end of the decay; "auto": the steps of the run'
    )


class WarmupCosineLRParams(_WarmupParams):
    """Rise, then fall along half a cosine."""

    total_num_steps: AutoSteps = execution(
        "auto", 'steps until the end of the cosine; "auto": the steps of the run'
    )
    warmup_min_ratio: float = identity(
        0.0, "learning rate at the start, as a share of the peak", ge=0, le=1
    )
    cos_min_ratio: float = identity(
        0.0001, "learning rate at the end, as a share of the peak", ge=0, le=1
    )


class WarmupLR(Section):
    """Warm up, then constant."""

    type: Literal["WarmupLR"] = identity(..., "learning-rate schedule")
    params: WarmupLRParams = section(WarmupLRParams(), "the schedule's numbers")


class WarmupDecayLR(Section):
    """Warm up, then linear decay."""

    type: Literal["WarmupDecayLR"] = identity(..., "learning-rate schedule")
    params: WarmupDecayLRParams = section(WarmupDecayLRParams(), "the schedule's numbers")


class WarmupCosineLR(Section):
    """Warm up, then cosine decay."""

    type: Literal["WarmupCosineLR"] = identity(..., "learning-rate schedule")
    params: WarmupCosineLRParams = section(WarmupCosineLRParams(), "the schedule's numbers")


SchedulerConfig = Annotated[WarmupLR | WarmupDecayLR | WarmupCosineLR, Field(discriminator="type")]


class Fp16Config(Section):
    """Half precision with loss scaling."""

    enabled: AutoBool = execution(
        False, 'compute in fp16; "auto": on a GPU without native bf16, from ZeRO 1'
    )
    loss_scale: float = execution(0.0, "fixed loss scale; 0: dynamic", ge=0)
    initial_scale_power: int = execution(16, "dynamic scale starts at 2 to this power", ge=0, le=64)
    loss_scale_window: int = execution(1000, "clean steps before the scale doubles", ge=1)
    hysteresis: int = execution(2, "overflows before the scale halves", ge=1)
    consecutive_hysteresis: bool = execution(False, "a clean step restores the hysteresis")
    min_loss_scale: int = execution(1, "floor of the dynamic scale", ge=1)


class Bf16Config(Section):
    """bfloat16 computation with fp32 master weights."""

    enabled: AutoBool = execution(
        False, 'compute in bf16; "auto": if the device supports it natively, from ZeRO 1'
    )


class DataTypesConfig(Section):
    """Number formats."""

    grad_accum_dtype: FloatType | None = execution(
        None, "number format of accumulated gradients; default: the model's"
    )


class AioConfig(Section):
    """Asynchronous disk I/O of the NVMe offload."""

    block_size: int = execution(1048576, "bytes of one request", ge=4096)
    queue_depth: int = execution(8, "requests in flight", ge=1)
    intra_op_parallelism: int = execution(1, "threads of one transfer", ge=1)
    single_submit: bool = execution(False, "submit requests one by one")
    overlap_events: bool = execution(True, "wait for requests while submitting others")


class _OffloadSection(Section):
    device: Literal["none", "cpu", "nvme"] = execution("none", "where it is stored")
    nvme_path: PathText | None = execution(
        None, "directory on the NVMe drive (device nvme)", min_length=1
    )
    pin_memory: bool = execution(True, "page-locked host memory")

    @model_validator(mode="after")
    def _check_path(self) -> _OffloadSection:
        if self.device == "nvme" and not self.nvme_path:
            refuse([("nvme_path", "required with device nvme: a directory on the drive")])
        return self

    @staticmethod
    def nvme_only() -> tuple[str, ...]:
        """Return the keys that have an effect with device nvme only."""
        return ("nvme_path", "buffer_count")


class OffloadOptimizerConfig(_OffloadSection):
    """Optimizer state outside the accelerator."""

    buffer_count: int | None = execution(None, "I/O buffers (device nvme); Adam needs 4", ge=4)
    pipeline_read: bool | None = execution(None, "read the next tile during the step (device nvme)")
    pipeline_write: bool | None = execution(
        None, "write the previous tile during the step (device nvme)"
    )
    fast_init: bool | None = execution(None, "faster initialisation (device nvme)")

    @staticmethod
    def nvme_only() -> tuple[str, ...]:
        """Return the keys that have an effect with device nvme only."""
        return ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")


class OffloadParamConfig(_OffloadSection):
    """Parameters outside the accelerator."""

    buffer_count: int | None = execution(
        None, "I/O buffers (device nvme); full recomputation needs 2", ge=2
    )
    buffer_size: ElementCount | None = execution(
        None, "elements of one I/O buffer (device nvme)", ge=1
    )
    max_in_cpu: ElementCount | None = execution(
        None, "elements kept in host memory (device nvme)", ge=0
    )

    @staticmethod
    def nvme_only() -> tuple[str, ...]:
        """Return the keys that have an effect with device nvme only."""
        return ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")


# ZeRO stages that read a key (zero/stage_1_and_2.py, zero/stage3.py, zero/parameter_offload.py).
# At other stages DeepSpeed accepts the key and ignores it.
ZERO_KEY_STAGES: dict[str, tuple[int, ...]] = {
    "overlap_comm": (1, 2, 3),
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "sub_group_size": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_use_all_reduce_for_fetch_params": (3,),
    "stage3_allgather_sequential": (3,),
}


class ZeroConfig(Section):
    """What ZeRO partitions over the data axis, and where it is kept.

    Sizes are in elements, not bytes.
    """

    stage: int = execution(
        0, "0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too", ge=0, le=3
    )
    overlap_comm: bool | None = execution(None, "reduce gradients during backward")
    contiguous_gradients: bool | None = execution(
        None, "copy gradients into one buffer as they appear"
    )
    reduce_scatter: bool | None = execution(None, "reduce-scatter instead of all-reduce")
    reduce_bucket_size: ElementCount | None = execution(None, "elements reduced at a time", ge=1)
    allgather_bucket_size: ElementCount | None = execution(
        None, "elements gathered at a time (stages 1, 2)", ge=1
    )
    use_multi_rank_bucket_allreduce: bool | None = execution(
        None, "one all-reduce for several ranks (stages 1, 2)"
    )
    sub_group_size: ElementCount | None = execution(
        None, "elements of one optimizer tile (stage 3); 0: a tile for each parameter", ge=0
    )
    stage3_prefetch_bucket_size: ElementCount | None = execution(
        None, "elements to prefetch; not with parameters on NVMe", ge=0
    )
    stage3_param_persistence_threshold: ElementCount | None = execution(
        None, "parameters smaller than this stay whole on every rank", ge=0
    )
    stage3_model_persistence_threshold: ElementCount | None = execution(
        None, "maximum elements that stay whole on every rank", ge=0
    )
    stage3_max_live_parameters: ElementCount | None = execution(
        None,
        "maximum elements gathered at one time, prefetched ones included; not with parameters on "
        "NVMe",
        ge=0,
    )
    stage3_max_reuse_distance: ElementCount | None = execution(
        None,
        "keep a parameter that is used again within this many elements; not with parameters on "
        "NVMe",
        ge=0,
    )
    stage3_use_all_reduce_for_fetch_params: bool | None = execution(
        None, "gather parameters by all-reduce"
    )
    stage3_allgather_sequential: bool | None = execution(
        None, "gather parameters one by one, without buckets"
    )
    offload_optimizer: OffloadOptimizerConfig | None = section(
        None, "optimizer state outside the accelerator"
    )
    offload_param: OffloadParamConfig | None = section(None, "parameters outside the accelerator")

    @property
    def optimizer_device(self) -> str:
        """`none` (the accelerator), `cpu` or `nvme`."""
        return self.offload_optimizer.device if self.offload_optimizer else "none"

    @property
    def parameter_device(self) -> str:
        """`none` (the accelerator), `cpu` or `nvme`."""
        return self.offload_param.device if self.offload_param else "none"


class WandbConfig(Section):
    """Weights & Biases; works offline without a key or a network."""

    enabled: bool = execution(False, "send metrics to it")
    project: str = execution("megagpt", "project")
    group: str | None = execution(None, "group of runs")
    team: str | None = execution(None, "team or user")


class TensorboardConfig(Section):
    """TensorBoard event files."""

    enabled: bool = execution(False, "write event files")
    output_path: PathText | None = execution(None, "directory; default: the run directory")
    job_name: str = execution("tensorboard", "subdirectory of output_path")
