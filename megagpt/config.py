"""Read a run's JSON file strictly, check it once and hand it down as a value.

`load_config` reads a file (a DeepSpeed configuration plus one `megagpt` object) and reports all
errors at once. `RunConfig.resolved` fills in what depends on the world size and on the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from megagpt.schema import json_reader as config_json
from megagpt.schema.arithmetic import BatchSizes, nearest_multiples, round_up, solve_batch
from megagpt.schema.counts import with_whole_numbers
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
from megagpt.schema.errors import (
    ConfigError,
    KeyPath,
    Problem,
    dotted,
    shown,
    to_paste,
    unknown_key,
)
from megagpt.schema.fields import (
    Section,
    at_default,
    execution,
    identity,
    is_later,
    refuse,
    section,
)
from megagpt.schema.foreign import FOREIGN, REFUSED
from megagpt.schema.idle import idle_keys
from megagpt.schema.megagpt import MegagptConfig, MegagptSection, ParallelConfig
from megagpt.schema.model import ModelConfig
from megagpt.schema.stand_ins import all_problems, stand_in_for_plan
from megagpt.schema.written import adopt, fields_at, lines_of

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
CLIPPED_BY_DEFAULT = (
    "not given, so gradients are clipped at a norm of 1.0, as by DeepSpeed; without clipping: "
    "--set gradient_clipping=0"
)


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
    optimizer: OptimizerConfig = section(..., "the optimizer and its learning rate")
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
    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what the file says without effect, or leaves to a default, to show at start."""
        return self._notes

    @model_validator(mode="after")
    def _check_sections_together(self) -> Self:
        problems = []
        if self.train_batch_size is None and self.train_micro_batch_size_per_gpu is None:
            message = "required key is missing (or train_micro_batch_size_per_gpu)"
            problems.append(("train_batch_size", message + to_paste("train_batch_size")))
        if self.fp16.enabled is True and self.bf16.enabled:
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
        refuse(problems)
        return self

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> Self:
        """Read configuration text, such as that of `to_json`, with the checks of `load_config`."""
        document, _ = config_json.parse(text, source)
        return _read(cls, document, source)

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
        keys_set, errors = config_json.apply_overrides(document, overrides, _is_known)
        if errors:
            raise ConfigError(errors)
        return _read(RunConfig, document, "", keys_set)

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
        self,
        *,
        world_size: int,
        vocabulary: int | None,
        bf16_native: bool,
        fp16_native: bool = False,
        samples_per_epoch: int | None = None,
    ) -> ResolvedConfig:
        """Return the run with every value known, on `world_size` ranks with `vocabulary` tokens.

        `vocabulary` is None if the data are not available (planning). `bf16_native`,
        `fp16_native`: the device multiplies such matrices in hardware. `samples_per_epoch` of the
        training split is needed for a length in epochs. Raises ConfigError with every impossible
        value and the closest possible ones.
        """
        ranks = _data_parallel_size(self.megagpt.parallel, world_size)
        rows_and_tokens = _vocabulary(self, vocabulary)
        batch = ranks if isinstance(ranks, Problem) else _batch_sizes(self, ranks)
        problems = [found for found in (batch, rows_and_tokens) if isinstance(found, Problem)]
        if isinstance(batch, Problem) or isinstance(rows_and_tokens, Problem):
            raise ConfigError(problem.line("") for problem in problems)
        precision = _precision(self, bf16_native, fp16_native)
        steps = _total_steps(self, batch, samples_per_epoch)
        return _resolve(self, batch, rows_and_tokens, precision, steps)

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


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, for_plan: bool = False
) -> RunConfig:
    """Read a configuration file and apply `a.b=value` overrides.

    A plan needs neither an optimizer nor a batch: with `for_plan`, stand-ins take their place, and
    a note says so. Raises ConfigError with all errors at once.
    """
    source = str(path)
    document, _ = config_json.parse(config_json.read_text(Path(path)), source)
    written = with_whole_numbers(overrides, RunConfig)
    keys_set, errors = config_json.apply_overrides(document, written, _is_known)
    try:
        config = _read(RunConfig, document, source, keys_set, for_plan=for_plan)
    except ConfigError as error:
        raise ConfigError(errors + error.errors) from error
    if errors:
        raise ConfigError(errors)
    return config


def _is_known(path: KeyPath) -> bool:
    """Return whether DeepSpeed or this trainer has the key."""
    return bool(fields_at(RunConfig, path)) or any(
        path[: len(row.path)] == row.path for row in FOREIGN
    )


def identity_differences(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Compare two results of `identity()` and return one line for each key that differs.

    For example `megagpt.model.num_layers: 12 in the run directory, 24 requested`.
    """
    changes = identity_changes(recorded, requested)
    return [identity_line(key, *values) for key, values in changes.items()]


def identity_line(key: str, recorded: Any, requested: Any) -> str:
    """Return the line of `identity_differences` for one key."""
    before, after = ("unset" if value is None else shown(value) for value in (recorded, requested))
    return f"{key}: {before} in the run directory, {after} requested"


def identity_changes(
    recorded: Mapping[str, Any], requested: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the two values of each key that differs in two results of `identity()`.

    They are compared as JSON has them. A key that one side lacks counts as None.
    """
    before = json.loads(json.dumps(recorded))
    after = json.loads(json.dumps(requested))
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    }


def _read(
    model: type[Config],
    document: config_json.Document,
    source: str,
    keys_set: Sequence[KeyPath] = (),
    *,
    for_plan: bool = False,
) -> Config:
    """Return the checked configuration, or raise ConfigError with every problem.

    A problem at a key of `keys_set` names `--set` as its source, not the file.
    """
    problems = config_json.hidden_problems(document)
    adopted = adopt(document, model)
    notes = adopted.notes + (stand_in_for_plan(document) if for_plan else [])
    config = _checked(model, document, problems + adopted.problems, source, keys_set)
    if idle := idle_keys(config.zero_optimization, config.aio):
        for key, _ in idle:
            config_json.remove(document, tuple(key.split(".")))
        config = model.model_validate(document)
    if "gradient_clipping" not in document:
        notes.append(("gradient_clipping", CLIPPED_BY_DEFAULT))
    config._notes = tuple(lines_of(notes + idle))
    return config


def _checked(
    model: type[Config],
    document: config_json.Document,
    problems: list[Problem],
    source: str,
    keys_set: Sequence[KeyPath],
) -> Config:
    """Return the configuration if nothing is wrong with it, or raise ConfigError."""
    try:
        config = model.model_validate(document)
    except ValidationError as error:
        problems = problems + all_problems(error, document, model)
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
    elif problem.message.startswith("unknown key"):
        lines = [Problem(key, unknown_key(key, RunConfig)).line("--set") for key in inside]
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
    config: RunConfig,
    batch: BatchSizes,
    vocabulary: tuple[int, int],
    precision: Mapping[str, bool],
    total_steps: int,
) -> ResolvedConfig:
    document = config._document()
    document.pop("$schema", None)  # it is relative to the original file
    document["train_batch_size"] = batch.train_batch
    document["train_micro_batch_size_per_gpu"] = batch.micro_batch
    document["gradient_accumulation_steps"] = batch.accumulation_steps
    document["megagpt"]["model"] |= dict(zip(("vocab_size", "vocabulary"), vocabulary, strict=True))
    document["megagpt"]["training"]["total_steps"] = total_steps
    for name, enabled in precision.items():
        document[name]["enabled"] = enabled
    _resolve_scheduler(document, total_steps)
    return _checked(ResolvedConfig, document, [], "", ())


def _precision(config: RunConfig, bf16_native: bool, fp16_native: bool) -> dict[str, bool]:
    """Return which 16-bit format is enabled, with "auto" decided by the device.

    "auto" is off at ZeRO 0, which computes in fp32 only. Of two formats that are "auto", bf16 is
    taken where it is native.
    """
    partitioned = config.zero_optimization.stage > 0
    bf16 = config.bf16.enabled
    fp16 = config.fp16.enabled
    if bf16 == "auto":
        bf16 = bf16_native and partitioned
    if fp16 == "auto":
        fp16 = fp16_native and not bf16_native and not bf16 and partitioned
    return {"bf16": bf16, "fp16": fp16}


def _total_steps(config: RunConfig, batch: BatchSizes, samples_per_epoch: int | None) -> int:
    """Return the number of steps; a length in tokens or epochs is rounded up to whole steps."""
    training = config.megagpt.training
    if training.total_epochs is not None:
        if samples_per_epoch is None:
            raise ConfigError(
                ["megagpt.training.total_epochs: the data that are counted in epochs are not known"]
            )
        samples = Fraction(str(training.total_epochs)) * samples_per_epoch
        return ceil(samples / batch.train_batch)
    if training.total_steps is not None:
        return training.total_steps
    assert training.total_tokens is not None  # the section has exactly one of the three keys
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
