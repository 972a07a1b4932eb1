"""The `megagpt` object of a configuration: everything that DeepSpeed has no key for."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from megagpt.schema.errors import shown
from megagpt.schema.fields import (
    PathText,
    Section,
    execution,
    identity,
    later_identity,
    refuse,
    section,
)
from megagpt.schema.lora import LoraConfig
from megagpt.schema.model import ModelConfig, ModelSection


class DataSource(Section):
    """One dataset of a blend."""

    path: PathText = identity(
        ..., "directory of the dataset, or token files of another trainer", min_length=1
    )
    weight: float = identity(1.0, "share of the samples, relative to the other weights", gt=0)


DataPath = Annotated[
    Annotated[PathText, Field(min_length=1), Tag("one")]
    | Annotated[tuple[DataSource, ...], Field(strict=False), Tag("blend")],
    Discriminator(lambda value: "blend" if isinstance(value, list | tuple) else "one"),
]


class DataConfig(Section):
    """Which tokens are read, and in which order."""

    path: DataPath = identity(
        "data/stdlib",
        "directory of the dataset, or token files of another trainer; or a list of {path, weight} "
        "to blend",
    )
    seed: int = identity(0, "seed of the sample order", ge=0)
    document_mask: bool = identity(False, "tokens attend only to tokens of their own document")
    validation: dict[str, PathText] = execution(
        {}, "further datasets to validate on: {name: directory}"
    )
    packing: Literal["stream", "conversations", "one_per_row"] | None = later_identity(
        None,
        "how conversations become samples: whole ones, as many as fit, each on its own "
        "(conversations); one a sample (one_per_row); windows of their tokens as of text (stream); "
        "default: conversations if the data are prepared ones, else stream",
    )
    tokenizer: PathText | None = execution(
        None,
        "directory with the tokenizer.json of token files of other trainers; without it they are "
        "ids without text",
        min_length=1,
    )
    validation_fraction: float | None = execution(
        None,
        "share of token files of other trainers to hold out, their end; default: the val.bin "
        "beside a train.bin, else 0.01",
        ge=0,
        lt=1,
    )

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        problems = [] if self.path else [("path", "the list is empty; name at least one dataset")]
        for name, path in self.validation.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                need = "use letters, digits, _ and - in the name of a validation set"
                problems.append(("validation", f"{shown(name)}: {need}"))
            elif not path:
                problems.append((f"validation.{name}", "empty; name the directory of a dataset"))
        refuse(problems)
        return self

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The datasets with their weights, one or several."""
        return (DataSource(path=self.path),) if isinstance(self.path, str) else self.path


class ParallelConfig(Section):
    """The mesh: world size = pipeline x data x tensor."""

    tensor: int = execution(1, "tensor-parallel ranks; each layer is split over them", ge=1)
    pipeline: int = execution(1, "pipeline stages", ge=1)
    schedule: Literal["gpipe", "1f1b", "interleaved"] = execution(
        "1f1b", "order of the micro-batches in a pipeline"
    )
    virtual_stages: int = execution(
        1, "model chunks per pipeline rank (interleaved schedule)", ge=1
    )
    sequence: bool = execution(
        False, "split the sequence over the tensor axis outside attention and MLP"
    )
    gradient_reduction: Literal["per_step", "per_micro_batch"] = execution(
        lambda keys: "per_step" if keys["pipeline"] > 1 else "per_micro_batch",
        "when gradients are reduced over the data axis; default: per_step with a pipeline, else "
        "per_micro_batch",
    )
    world_size: int | None = execution(
        None, "ranks that this run expects; a start with another number is refused", ge=1
    )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline


LENGTHS = ("total_steps", "total_tokens", "total_epochs")  # of which a run has one


class TrainingSection(Section):
    """How long to train, and what happens on the way, as written in the file.

    An interval of 0 means never.
    """

    total_steps: int | None = execution(
        None, "optimizer steps of the run (or give total_tokens or total_epochs)", ge=1
    )
    total_tokens: int | None = execution(
        None, "tokens of the run, rounded up to whole steps (or give total_steps)", ge=1
    )
    total_epochs: float | None = execution(
        None,
        "passes over the training split, rounded up to whole steps (or give total_steps); of a "
        "blend: as many samples as all its datasets have",
        gt=0,
    )
    seed: int = identity(0, "seed of the initial weights and of dropout", ge=0)
    recompute: Literal["none", "selective", "full"] = execution(
        "none",
        "activations to recompute in backward: none, each block's MLP (selective), or whole "
        "blocks (full)",
    )
    compile: Literal["none", "blocks"] = execution(
        "none",
        "what torch.compile compiles for training: none, or each block, at ZeRO 0 to 2 without "
        "tensor parallelism",
    )
    eval_interval_steps: int = execution(100, "steps between evaluations", ge=0)
    eval_batches: int = execution(
        8, "global batches per evaluation: a fixed random choice from each validation set", ge=1
    )
    sample_interval_steps: int = execution(0, "steps between text samples", ge=0)
    sample_prompts: tuple[str, ...] = execution((), "prompts of the text samples", strict=False)
    on_nonfinite: Literal["skip", "stop"] = execution(
        "skip", "if a loss or gradient is not finite: skip the step, or stop"
    )
    on_spike: Literal["warn", "ignore", "skip", "rewind"] = execution(
        "warn",
        "if the loss spikes: report it, ignore it, skip the step, or go back to the last "
        "checkpoint",
    )
    drift_check_interval_steps: int = execution(
        100, "steps between checks that replicated values are equal on all ranks", ge=0
    )
    lora: LoraConfig | None = section(None, "train low-rank adapters; the base stays as it is")

    @model_validator(mode="after")
    def _check(self) -> TrainingSection:
        problems = self._length_problems()
        if self.sample_interval_steps and not self.sample_prompts:
            due = f"sample_interval_steps is {self.sample_interval_steps}"
            problems.append(
                ("sample_prompts", f'empty, but {due}: give ["..."], or sample_interval_steps 0')
            )
        if self.sample_prompts and not self.sample_interval_steps:
            problems.append(
                (
                    "sample_prompts",
                    "given, but sample_interval_steps is 0: give an interval, or remove it",
                )
            )
        refuse(problems)
        return self

    def _length_problems(self) -> list[tuple[str, str]]:
        given = [key for key in LENGTHS if getattr(self, key) is not None]
        if not given:
            return [("total_steps", "required key is missing (or give total_tokens)")]
        return [(key, f"given together with {given[0]}; keep only one") for key in given[1:]]


class TrainingConfig(TrainingSection):
    """Training with its length known in steps; they follow from tokens or epochs if given."""

    total_steps: int = execution(..., "optimizer steps of the run", ge=1)

    def _length_problems(self) -> list[tuple[str, str]]:
        return []


class CheckpointConfig(Section):
    """What is saved, and how often."""

    interval_steps: int = execution(500, "steps between checkpoints", ge=0)
    keep: int = execution(3, "newest checkpoints to keep; at least 2, in case one is damaged", ge=2)
    asynchronous: bool = execution(False, "write in the background while training continues")
    milestone_interval_steps: int = execution(
        0,
        "steps between checkpoints that are never deleted; a multiple of interval_steps; 0: none",
        ge=0,
    )

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        milestone = self.milestone_interval_steps
        interval = self.interval_steps
        if milestone and (interval == 0 or milestone % interval):
            nearest = f"{-(-milestone // interval) * interval} or 0" if interval else "0"
            problem = f"{milestone} is not a multiple of interval_steps {interval}: use {nearest}"
            refuse([("milestone_interval_steps", problem)])
        return self


class MonitorConfig(Section):
    """What is reported."""

    log_interval_steps: int = execution(
        10, "steps between lines on screen and in metrics.jsonl", ge=0
    )
    stall_timeout_s: int = execution(
        1800,
        "seconds after which a step, a validation batch or a save counts as hung (a stage of "
        "start-up: at least 900); 0: no limit",
        ge=0,
    )


class MegagptSection(Section):
    """The `megagpt` object as written in the file."""

    model: ModelSection = section(..., "shape of the model")
    data: DataConfig = section(DataConfig(), "tokens and their order")
    parallel: ParallelConfig = section(ParallelConfig(), "mesh")
    training: TrainingSection = section(..., "length, evaluation, samples, guards")
    checkpoint: CheckpointConfig = section(CheckpointConfig(), "saving")
    monitor: MonitorConfig = section(MonitorConfig(), "reporting")

    @model_validator(mode="after")
    def _check_adapters(self) -> MegagptSection:
        if self.training.lora is not None:
            self.training.lora.check(self.model)
        return self

    @property
    def drops(self) -> bool:
        """Whether training drops anything at random: activations, or inputs of adapters."""
        lora = self.training.lora
        return self.model.dropout > 0 or (lora is not None and lora.dropout > 0)


class MegagptConfig(MegagptSection):
    """The `megagpt` object with every value known."""

    model: ModelConfig = section(..., "shape of the model")
    training: TrainingConfig = section(..., "length, evaluation, samples, guards")
