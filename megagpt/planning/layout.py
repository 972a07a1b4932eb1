"""Which rank holds what, as plain numbers: all that memory and speed depend on.

No device and no rank. The planner varies a `Layout` with `dataclasses.replace` thousands of times a
second; a configuration would be validated each time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

from megagpt.config import ModelConfig, ResolvedConfig
from megagpt.planning.schedules import schedule_that_runs
from megagpt.planning.stages import cut
from megagpt.schema.deepspeed import ZeroConfig
from megagpt.schema.lora import LoraConfig
from megagpt.schema.megagpt import ParallelConfig

# Who page-locks host memory: nobody without a GPU, else torch's allocator, or DeepSpeed's own,
# which the variable DS_PIN_MEMORY_BACKEND=native selects
Pins = Literal["nobody", "torch", "native"]
BYTES_OF_TYPE = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Layout:
    """The model, the mesh, one step's batch, and the ZeRO settings.

    `micro_batch` counts sequences, `micro_batches` the forward-backward passes of a step on one
    rank. `element_bytes` is the size of a parameter in the model's type, `accumulation_bytes`
    that of an accumulated gradient. `pins` says who page-locks host memory for a GPU.
    """

    model: ModelConfig
    parallel: ParallelConfig
    zero: ZeroConfig
    data: int
    micro_batch: int
    micro_batches: int
    recompute: str
    element_bytes: int
    accumulation_bytes: int
    saves_in_background: bool = False
    pins: Pins = "nobody"
    lora: LoraConfig | None = None

    @classmethod
    def of(cls, config: ResolvedConfig, *, pins: Pins = "nobody") -> Layout:
        """Return the layout of a run whose number of ranks is known."""
        element_type = "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"
        return cls(
            model=config.megagpt.model,
            parallel=config.megagpt.parallel,
            zero=config.zero_optimization,
            data=config.data_parallel_size,
            micro_batch=config.train_micro_batch_size_per_gpu,
            micro_batches=config.gradient_accumulation_steps,
            recompute=config.megagpt.training.recompute,
            element_bytes=BYTES_OF_TYPE[element_type],
            accumulation_bytes=BYTES_OF_TYPE[config.data_types.grad_accum_dtype or element_type],
            saves_in_background=config.megagpt.checkpoint.asynchronous,
            lora=config.megagpt.training.lora,
            pins=pins,
        )

    @property
    def pipeline(self) -> int:
        """Ranks on the pipeline axis."""
        return self.parallel.pipeline

    @property
    def tensor(self) -> int:
        """Ranks on the tensor axis."""
        return self.parallel.tensor

    @property
    def virtual_stages(self) -> int:
        """Stages of one pipeline rank."""
        return self.parallel.virtual_stages

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pipeline * self.data * self.tensor

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pipeline * self.virtual_stages

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.micro_batch * self.model.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.tokens * self.micro_batches * self.data

    @property
    def reduces_per_step(self) -> bool:
        """Whether gradients are reduced once at the end of a step, by a ZeRO optimizer.

        ZeRO 0 reduces in its own way.
        """
        return self.parallel.gradient_reduction == "per_step" and self.zero.stage > 0

    @property
    def schedule(self) -> str:
        """The schedule that runs in effect."""
        return schedule_that_runs(self.parallel.schedule, self.num_stages, self.micro_batches)

    @cached_property
    def stages(self) -> list[range]:
        """The layers of every stage; 0 is the embedding and num_layers + 1 the head."""
        return cut_stages(self.model, self.num_stages)

    def stages_of(self, pipeline_rank: int) -> range:
        """Return the stages that a pipeline rank holds."""
        return range(pipeline_rank, self.num_stages, self.pipeline)

    def with_parallel(self, **changes: Any) -> Layout:
        """Return the same layout with other values in `megagpt.parallel`."""
        return replace(self, parallel=self.parallel.model_copy(update=changes))

    def with_zero(self, **changes: Any) -> Layout:
        """Return the same layout with other values in `zero_optimization`."""
        return replace(self, zero=self.zero.model_copy(update=changes))


@cache
def cut_stages(model: ModelConfig, num_stages: int) -> list[range]:
    """Return `cut`, computed once."""
    return cut(model, num_stages)


def model_layers(model: ModelConfig, layers: range) -> tuple[int, bool, bool]:
    """Return (number of blocks, whether the embedding is included, whether the head is)."""
    embedding, head = 0 in layers, model.num_layers + 1 in layers
    return len(layers) - embedding - head, embedding, head
