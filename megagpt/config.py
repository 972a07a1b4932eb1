"""Read a run's JSON file strictly, check it once and hand it down as a value.

`load_config` reads a file (a DeepSpeed configuration plus one `megagpt` object) and reports all
errors at once. `RunConfig.resolved` fills in what depends on the world size and on the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from megagpt.schema import json_reader as config_json
from megagpt.schema.arithmetic import BatchSizes, nearest_multiples, round_up, solve_batch
from megagpt.schema.deepspeed import (
    AioConfig,
    Bf16Config,
    DataTypesConfig,
    FloatType,
    Fp16Config,
    OptimizerConfig,
    SchedulerConfig,
    TensorboardConfig,
    WandbConfig,
    WarmupDecayLR,
    WarmupLR,
    ZeroConfig,
)
from megagpt.schema.errors import ConfigError, KeyPath, Problem, dotted, problems_in, shown
from megagpt.schema.fields import (
    Section,
    at_default,
    execution,
    identity,
    is_later,
    refuse,
    section,
)
from megagpt.schema.megagpt import MegagptConfig, MegagptSection, ParallelConfig
from megagpt.schema.model import ModelConfig
from megagpt.schema.refused import REFUSED

__all__ = [
    "ConfigError",
    "ModelConfig",
    "ResolvedConfig",
    "RunConfig",
    "identity_differences",
    "load_config",
]

# Multiple of the embedding rows: whole tiles for matrix units, divisible by any tensor axis here
VOCABULARY_MULTIPLE = 128
# monitor.py calls the trackers itself, on one rank
NOT_FOR_DEEPSPEED = ("megagpt", "$schema", "wandb", "tensorboard")


class RunConfig(Section):
    """A run as its file describes it.

    Values that depend on the world size or on the data may be absent or "auto".
    """

    schema_file: str | None = Field(
        None, alias="$schema", description="JSON Schema for editors; ignored by the run"
    )
    train_batch_size: int | None = identity(
        None, "sequences per optimizer step, over all ranks", ge=1
    )
    train_micro_batch_size_per_gpu: int | None = execution(
        None, "sequences per forward-backward on one rank", ge=1
    )
    gradient_accumulation_steps: int | None = execution(
        None, "micro-batches per optimizer step", ge=1
    )
    optimizer: OptimizerConfig = section(..., "optimizer")
    scheduler: SchedulerConfig | None = section(None, "learning-rate schedule; default: constant")
    gradient_clipping: float = identity(1.0, "maximum gradient norm; 0: no clipping", ge=0)
    fp16: Fp16Config = section(Fp16Config(), "half precision")
    bf16: Bf16Config = section(Bf16Config(), "bfloat16")
    data_types: DataTypesConfig = section(DataTypesConfig(), "number formats")
    communication_data_type: FloatType | None = execution(
        None, "number format of gradient reduction; default: the model's"
    )
    zero_optimization: ZeroConfig = section(ZeroConfig(), "ZeRO and offload")
    aio: AioConfig | None = section(None, "disk I/O of the NVMe offload")
    wandb: WandbConfig = section(WandbConfig(), "Weights & Biases")
    tensorboard: TensorboardConfig = section(TensorboardConfig(), "TensorBoard")
    megagpt: MegagptSection = section(..., "everything that DeepSpeed has no key for")

    @model_validator(mode="after")
    def _check_sections_together(self) -> Self:
        problems = []
        if self.train_batch_size is None and self.train_micro_batch_size_per_gpu is None:
            problems.append(
                (
                    "train_batch_size",
                    "required key is missing (or give train_micro_batch_size_per_gpu)",
                )
            )
        if self.fp16.enabled and self.bf16.enabled:
            problems.append(
                (
                    "fp16.enabled",
                    f"true, and bf16.enabled is {shown(self.bf16.enabled)}; enable only one",
                )
            )
        if isinstance(self.scheduler, WarmupLR | WarmupDecayLR):
            maximum = self.scheduler.params.warmup_max_lr
            peak = self.optimizer.params.lr
            if maximum not in (None, peak):
                message = (
                    f"{maximum} differs from optimizer.params.lr {peak}; make them equal, "
                    f"or remove it"
                )
                problems.append(("scheduler.params.warmup_max_lr", message))
        if self.aio and "nvme" not in (
            self.zero_optimization.optimizer_device,
            self.zero_optimization.parameter_device,
        ):
            problems.append(("aio", 'has no effect without offload to "nvme"; remove it'))
        refuse(problems)
        return self

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> Self:
        """Read configuration text, such as that of `to_json`, with the checks of `load_config`."""
        document, problems = config_json.parse(text, source)
        return _validated(cls, document, problems, source, ())

    def to_json(self) -> str:
        """Return canonical text: equal runs have equal text.

        The keys are in a fixed order and defaults are written out.
        """
        return json.dumps(self._document(), indent=2, ensure_ascii=False) + "\n"

    def as_written(self) -> dict[str, Any]:
        """Return the document without the keys that were left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)

    def changed(self, overrides: Sequence[str]) -> RunConfig:
        """Return this configuration with `a.b=value` overrides on top.

        Raises ConfigError.
        """
        document = self.as_written()
        keys_set, errors = _override(document, overrides)
        if errors:
            raise ConfigError(errors)
        return _validated(RunConfig, document, [], "", keys_set)

    def deepspeed_dict(self) -> dict[str, Any]:
        """Return a new dict for `deepspeed.initialize`: DeepSpeed's sections only."""
        return {
            key: value for key, value in self._document().items() if key not in NOT_FOR_DEEPSPEED
        }

    def identity(self) -> dict[str, Any]:
        """Return the keys that say what is trained, by dotted name.

        Two resolved runs with the same identity compute the same result.
        """
        return dict(_leaves_of_role("identity", self))

    def resolved(
        self, *, world_size: int, vocabulary: int | None, bf16_native: bool
    ) -> ResolvedConfig:
        """Return the run with every value known, on `world_size` ranks with `vocabulary` tokens.

        `vocabulary` is None if the data are not available (planning). `bf16_native`: the
        device multiplies bfloat16 matrices in hardware. Raises ConfigError with every
        impossible value and the closest possible ones.
        """
        ranks = _data_parallel_size(self.megagpt.parallel, world_size)
        rows_and_tokens = _vocabulary(self, vocabulary)
        batch = ranks if isinstance(ranks, Problem) else _batch_sizes(self, ranks)
        problems = [found for found in (batch, rows_and_tokens) if isinstance(found, Problem)]
        if isinstance(batch, Problem) or isinstance(rows_and_tokens, Problem):
            raise ConfigError(problem.line("") for problem in problems)
        return _resolve(self, batch, rows_and_tokens, bf16_native)

    def _document(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class ResolvedConfig(RunConfig):
    """A run with every value known: what the trainer uses and what runs/NAME/config.json holds."""

    train_batch_size: int = identity(..., "sequences per optimizer step, over all ranks", ge=1)
    train_micro_batch_size_per_gpu: int = execution(
        ..., "sequences per forward-backward on one rank", ge=1
    )
    gradient_accumulation_steps: int = execution(..., "micro-batches per optimizer step", ge=1)
    megagpt: MegagptConfig = section(..., "everything that DeepSpeed has no key for")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.train_batch_size * self.megagpt.model.sequence_length

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different sequences; ZeRO partitions over them."""
        return self.train_batch_size // (
            self.train_micro_batch_size_per_gpu * self.gradient_accumulation_steps
        )


Config = TypeVar("Config", bound=RunConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply `a.b=value` overrides.

    Raises ConfigError with all errors at once.
    """
    source = str(path)
    document, _ = config_json.parse(config_json.read_text(Path(path)), source)
    keys_set, errors = _override(document, overrides)
    try:
        config = _validated(
            RunConfig, document, config_json.hidden_problems(document), source, keys_set
        )
    except ConfigError as error:
        raise ConfigError(errors + error.errors) from error
    if errors:
        raise ConfigError(errors)
    return config


def _override(
    document: dict[str, Any], overrides: Sequence[str]
) -> tuple[list[KeyPath], list[str]]:
    """Write the overrides into the document; `null` removes a key that exists.

    Return the keys that were set and the error lines.
    """
    keys_set, errors = config_json.apply_overrides(document, overrides)
    for path in dict.fromkeys(keys_set):
        if config_json.is_null(document, path) and not _is_unknown(document, path):
            config_json.remove(document, path)
    return keys_set, errors


def _is_unknown(document: dict[str, Any], path: KeyPath) -> bool:
    try:
        RunConfig.model_validate(document)
    except ValidationError as error:
        return any(
            found["type"] == "extra_forbidden" and found["loc"][-1] == path[-1]
            for found in error.errors()
        )
    return False


def identity_differences(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Compare two results of `identity()` and return one line for each key that differs.

    For example `megagpt.model.num_layers: 12 in the run directory, 24 requested`.
    """

    def value(identity: Mapping[str, Any], key: str) -> str:
        return shown(identity[key]) if key in identity else "unset"

    keys = dict.fromkeys([*recorded, *requested])
    return [
        f"{key}: {value(recorded, key)} in the run directory, {value(requested, key)} requested"
        for key in keys
        if recorded.get(key) != requested.get(key)
    ]


def _validated(
    model: type[Config],
    document: dict[str, Any],
    hidden: list[Problem],
    source: str,
    keys_set: Sequence[KeyPath],
) -> Config:
    """Return the checked configuration, or raise ConfigError with every problem.

    A problem at a key of `keys_set` names `--set` as its source, not the file.
    """
    try:
        config = model.model_validate(document)
        problems = hidden
    except ValidationError as error:
        problems = hidden + problems_in(error, document, model, REFUSED)
    if problems:
        lines = [
            line for problem in problems for line in _lines(problem, document, source, keys_set)
        ]
        raise ConfigError(dict.fromkeys(lines))
    return config


def _lines(
    problem: Problem, document: dict[str, Any], source: str, keys_set: Sequence[KeyPath]
) -> list[str]:
    """Return a problem's lines, each blamed on the command line or on ``source``.

    A section that the command line made is blamed on it. Where such a section is refused, each key
    that was set there has its own line, with what to use instead.
    """
    depth = len(problem.path)
    if _begins_with(problem.path, keys_set):
        return [problem.line("--set")]
    inside = list(dict.fromkeys(key for key in keys_set if key[:depth] == problem.path))
    lines = []
    if dotted(problem.path) in REFUSED:
        lines = [Problem(key, problem.message).line("--set") for key in inside]
    if inside and all(_begins_with(leaf, inside) for leaf in _leaves(document, problem.path)):
        return lines or [problem.line("--set")]
    return [problem.line(source), *lines]


def _begins_with(path: KeyPath, keys: Sequence[KeyPath]) -> bool:
    return any(path[: len(key)] == key for key in keys)


def _leaves(document: dict[str, Any], path: KeyPath) -> list[KeyPath]:
    """Return the keys at or below ``path`` that hold values, not objects."""
    value: Any = document
    for name in path:
        value = value.get(name, {})
    if not isinstance(value, dict):
        return [path]
    return [leaf for name in value for leaf in _leaves(document, (*path, name))]


def unexpected_world(parallel: ParallelConfig, world_size: int) -> Problem | None:
    """Return the problem if the number of started ranks is not the one that is set, else None."""
    expected = parallel.world_size
    if expected is None or expected == world_size:
        return None
    hint = "bring back the missing hosts" if world_size < expected else f"start {expected} of them"
    return Problem(
        ("megagpt", "parallel", "world_size"),
        f"the run expects {expected} ranks and {world_size} started: {hint}",
    )


def _data_parallel_size(parallel: ParallelConfig, world_size: int) -> int | Problem:
    replica = parallel.model_parallel_size
    if (unexpected := unexpected_world(parallel, world_size)) is not None:
        return unexpected
    if world_size % replica:
        return Problem(
            ("megagpt", "parallel"),
            f"{world_size} ranks is not a multiple of tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline}: use {nearest_multiples(world_size, replica)} ranks",
        )
    return world_size // replica


def _batch_sizes(config: RunConfig, data_parallel_size: int) -> BatchSizes | Problem:
    solved = solve_batch(
        config.train_batch_size,
        config.train_micro_batch_size_per_gpu,
        config.gradient_accumulation_steps,
        data_parallel_size,
    )
    return Problem(("train_batch_size",), solved) if isinstance(solved, str) else solved


def _vocabulary(config: RunConfig, of_data: int | None) -> tuple[int, int] | Problem:
    """Return (rows of the embedding, tokens that exist).

    The rows are padded. Neither number is smaller than the vocabulary of the data.
    """
    model = config.megagpt.model
    wanted = model.vocab_size or of_data or model.vocabulary or model.published_vocabulary
    if wanted is None:
        key = ("megagpt", "model", "vocab_size")
        return Problem(key, "unknown until the data are prepared; set it, or prepare the data")
    rows = round_up(wanted, VOCABULARY_MULTIPLE)
    tokens = model.vocabulary or of_data or wanted
    for name, value in (("vocab_size", wanted), ("vocabulary", tokens)):
        if of_data is not None and value < of_data:
            message = (
                f"{value} is smaller than the data's vocabulary of {of_data}: use {of_data} "
                f"or remove it"
            )
            return Problem(("megagpt", "model", name), message)
    if tokens > rows:
        return Problem(
            ("megagpt", "model", "vocabulary"),
            f"{tokens} tokens do not fit into vocab_size {wanted}: remove one of the two",
        )
    return rows, tokens


def _resolve(
    config: RunConfig, batch: BatchSizes, vocabulary: tuple[int, int], bf16_native: bool
) -> ResolvedConfig:
    document = config._document()
    document.pop("$schema", None)  # it is relative to the original file
    document["train_batch_size"] = batch.train_batch
    document["train_micro_batch_size_per_gpu"] = batch.micro_batch
    document["gradient_accumulation_steps"] = batch.accumulation_steps
    document["megagpt"]["model"] |= dict(zip(("vocab_size", "vocabulary"), vocabulary, strict=True))
    total_steps = _total_steps(config, batch)
    document["megagpt"]["training"]["total_steps"] = total_steps
    if config.bf16.enabled == "auto":
        document["bf16"]["enabled"] = bf16_native
    _resolve_scheduler(document, total_steps)
    return _validated(ResolvedConfig, document, [], "", ())


def _total_steps(config: RunConfig, batch: BatchSizes) -> int:
    """Return the number of steps; a length in tokens is rounded up to whole steps."""
    training = config.megagpt.training
    if training.total_steps is not None:
        return training.total_steps
    assert training.total_tokens is not None  # the section has exactly one of the two keys
    tokens_per_step = batch.train_batch * config.megagpt.model.sequence_length
    return -(-training.total_tokens // tokens_per_step)


def _resolve_scheduler(document: dict[str, Any], total_steps: int) -> None:
    """Set the length and the peak of the learning-rate schedule.

    Without warmup_max_lr DeepSpeed's WarmupDecayLR peaks at 0.001, whatever lr is.
    """
    if "scheduler" not in document:
        return
    params = document["scheduler"]["params"]
    if document["scheduler"]["type"] != "WarmupCosineLR":
        params["warmup_max_lr"] = document["optimizer"]["params"]["lr"]
    if params.get("total_num_steps") == "auto":
        params["total_num_steps"] = total_steps
    length = params.get("total_num_steps")
    if length is not None and length < params["warmup_num_steps"]:
        problem = (
            f"{params['warmup_num_steps']} is longer than the schedule of {length} steps: "
            f"use at most {length}"
        )
        raise ConfigError([f"scheduler.params.warmup_num_steps: {problem}"])


def _leaves_of_role(role: str, value: BaseModel, prefix: KeyPath = ()) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, field in type(value).model_fields.items():
        member = getattr(value, name)
        if isinstance(member, BaseModel):
            leaves += _leaves_of_role(role, member, (*prefix, name))
        elif (
            isinstance(field.json_schema_extra, dict)
            and field.json_schema_extra.get("role") == role
            and not (is_later(field) and at_default(value, name))
        ):
            leaves.append((dotted((*prefix, name)), _as_json(member)))
    return leaves


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
