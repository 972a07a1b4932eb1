"""A published model as the start of a run: its weights become the checkpoint of step 0.

runs/NAME/config.json               the run, resolved, as training writes it
runs/NAME/imported.json             what to train it with: the given configuration with this
                                    model
runs/NAME/tokenizer.sha256          of the data's tokenizer, if it was compared with the model's
runs/NAME/published                 what an export needs to give the model back
runs/NAME/checkpoints/step_00000000 the weights; Adam's moments are zero
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megagpt.checkpoint.directory import name_latest
from megagpt.checkpoint.execution import VERSIONS
from megagpt.checkpoint.format import (
    MANIFEST,
    WEIGHT,
    Manifest,
    Slice,
    StoredTensor,
    TrainState,
    step_directory,
)
from megagpt.checkpoint.writer import Flats, PlannedFile, files_of, write_files
from megagpt.config import ConfigError, ModelConfig, ResolvedConfig, RunConfig
from megagpt.data.token_files.declared import Declared
from megagpt.data.token_files.opening import manifest_of, tokenizer_directory
from megagpt.huggingface.architectures import Architecture, Part
from megagpt.huggingface.kept_model import keep
from megagpt.huggingface.published_model import PublishedModel
from megagpt.huggingface.whole_directory import whole_directory
from megagpt.parallel.compat import MOMENTS, Piece
from megagpt.parallel.rectangles import whole
from megagpt.planning.epochs import counted_samples
from megagpt.planning.legality import World, resolve
from megagpt.rundir.data import open_stream, prepare_vocabulary, splits_of
from megagpt.rundir.directory import record
from megagpt.rundir.tokenizer_hash import record_tokenizer
from megagpt.schema.deepspeed import WarmupCosineLR
from megagpt.utils import MIB, UserError, sync_directory, write_atomically

IMPORTED = "imported.json"
SPARE_BYTES = 64 * MIB  # manifest and headers, in addition to the tensors
BATCH = 16 * MIB  # elements of small tensors that are read together
GROUPS = 2  # of parameters, with and without weight decay (engine.py, parameter_groups)


@dataclass(frozen=True)
class Imported:
    """What was read and written.

    ``given_way`` are the lines of the configuration that the model replaced.
    """

    architecture: str
    parameters: int
    configuration: Path
    given_way: list[str]
    tokenizer_compared: bool
    trains_adapters: bool


def import_model(
    source: Path, written: RunConfig, run_directory: Path, *, ignored: Collection[str] = ()
) -> Imported:
    """Make a run directory from the model in ``source``; ``written`` configures the rest.

    ``ignored`` are unknown keys of its config.json that change no result.

    Raise UserError if the model has something that ours has not, if its tokenizer is not that of
    the data, and if the run directory exists.
    """
    published = PublishedModel(source, ignored)
    config = published.run_config(written)
    data = Path(config.megagpt.data.sources[0].path)
    prepare_vocabulary(config)
    published.require_rows(data, config)
    declared = Declared.by(config.megagpt)
    tokenizer_compared = published.require_tokenizer(data, declared)
    trains_adapters = config.megagpt.training.lora is not None
    # They are trained in a run of their own, whose base this one becomes.
    without = config.changed(["megagpt.training.lora=null"]) if trains_adapters else config
    resolved = resolved_for_import(without)
    model = resolved.megagpt.model
    _require_data_for_its_context(source, resolved)
    published.require_tensors(model)
    with whole_directory(
        run_directory, option="--run_dir", room_bytes=bytes_of_checkpoint(model)
    ) as staging:
        write_checkpoint(staging / "checkpoints", published, resolved, "import_hf")
        keep(published, model, staging)
        write_atomically(
            staging / IMPORTED,
            json.dumps(_with_base(config, run_directory), indent=2, ensure_ascii=False) + "\n",
        )
        record(staging, resolved)
        if tokenizer_compared:
            record_tokenizer(staging, tokenizer_directory(data, declared) or data)
    return Imported(
        architecture=published.architecture.name,
        parameters=model.num_parameters,
        configuration=run_directory / IMPORTED,
        given_way=list(_given_way(written, config)),
        tokenizer_compared=tokenizer_compared,
        trains_adapters=trains_adapters,
    )


def resolved_for_import(config: RunConfig) -> ResolvedConfig:
    """Return the run on as many ranks as it states, or on the fewest that can hold it.

    Its identity is the same on any number.
    """
    if config.train_batch_size is None:
        raise ConfigError(
            [
                "train_batch_size: missing (need it, so that it does not depend on the number of "
                "ranks); --set train_batch_size=N"
            ]
        )
    world = World(_ranks(config), prepare_vocabulary(config), samples=counted_samples())
    return resolve(config, world=world).config


def _require_data_for_its_context(source: Path, config: ResolvedConfig) -> None:
    """Raise UserError if a split of the data is shorter than one sample of the model's length.

    Otherwise training would fail later, with advice that a learned position table cannot follow.
    """
    length = config.megagpt.model.sequence_length
    for place in config.megagpt.data.sources:
        manifest = manifest_of(Path(place.path), Declared.by(config.megagpt))
        splits = splits_of(config)
        tokens, split = min((manifest.tokens(split), split) for split in splits)
        packed = manifest.has_conversations and config.megagpt.data.packing != "stream"
        if packed or tokens > length:  # what conversations leave of a sample is filled
            continue
        remedies = ["prepare more text"]
        if split == "val" and manifest.tokens("train") > length:
            remedies += ["turn evaluation off with --set megagpt.training.eval_interval_steps=0"]
        if config.megagpt.model.position == "rotary" and tokens > 1:
            shorter = f"--set megagpt.model.sequence_length={tokens - 1}"
            remedies += [f"train on shorter samples with {shorter}"]
        raise UserError(
            f"{source}: its context is {length} tokens, longer than the {split} split of "
            f"{place.path} (found {tokens} tokens, need {length + 1}); {', or '.join(remedies)}"
        )


def _ranks(config: RunConfig) -> int | None:
    micro = config.train_micro_batch_size_per_gpu
    accumulated = config.gradient_accumulation_steps
    if config.megagpt.parallel.world_size or not (
        micro and accumulated and config.train_batch_size
    ):
        return config.megagpt.parallel.world_size
    return (
        config.train_batch_size
        // (micro * accumulated)
        * config.megagpt.parallel.model_parallel_size
    )


def document_of(config: RunConfig) -> dict[str, Any]:
    """Return the configuration without the schema's path, which was relative to the old file."""
    return {key: value for key, value in config.as_written().items() if key != "$schema"}


def _with_base(config: RunConfig, run_directory: Path) -> dict[str, Any]:
    """Return the configuration; adapters get this run as their base, unless they have one."""
    document = document_of(config)
    if "lora" in document["megagpt"]["training"]:
        document["megagpt"]["training"]["lora"].setdefault("base", str(run_directory))
    return document


def _given_way(written: RunConfig, config: RunConfig) -> Iterator[str]:
    before = written.identity()
    after = config.identity()
    for key, value in before.items():
        if value is not None and after.get(key) != value:
            yield f"{key} {after.get(key, 'at its default')} (not {value})"


# --------------------------------------------------------------------------------------- checkpoint


class Weights(Protocol):
    """Where the weights come from: our tensors, part by part of an architecture."""

    architecture: Architecture

    @property
    def steps(self) -> int:
        """Updates that Adam's moments have seen; 0: there are none, and they begin at zero."""

    def moment(self, part: Part, model: ModelConfig, moment: str) -> torch.Tensor:
        """Return one of Adam's moments of a tensor of ours in fp32."""

    def ours(self, part: Part, model: ModelConfig) -> torch.Tensor | None:
        """Return a tensor of ours in fp32; None for a bias that our model does not have."""


def bytes_of_checkpoint(model: ModelConfig) -> int:
    """Return the room that the checkpoint of step 0 needs."""
    return len((WEIGHT, *MOMENTS)) * 4 * model.num_parameters + SPARE_BYTES


def write_checkpoint(
    checkpoints: Path, published: Weights, config: ResolvedConfig, command: str
) -> None:
    """Write the checkpoint of the first step, some tensors at a time; it records ``command``.

    That step is 0, or where there are moments the number of updates that they have seen.

    On failure the caller removes the whole directory.
    """
    directory = step_directory(checkpoints, published.steps)
    directory.mkdir(parents=True)
    parts = list(published.architecture.parts(config.megagpt.model))
    batches = _batches(parts)
    plan = files_of(0, (_pieces(batch) for batch in batches))
    state = (_flats(batch, published, config.megagpt.model) for batch in batches)
    files = write_files(directory, plan, state)
    manifest = replace(_manifest(published, config, parts, plan, command), files=files)
    write_atomically(directory / MANIFEST, manifest.to_json())
    sync_directory(checkpoints)
    name_latest(directory)


def _batches(parts: list[Part]) -> list[list[Part]]:
    """Return the parts that are in memory together: a large one alone, small ones until BATCH."""
    batches: list[list[Part]] = []
    held = 0
    for part in parts:
        size = part.shape.numel()
        if not batches or held + size > BATCH:
            batches.append([])
            held = 0
        batches[-1].append(part)
        held += size
    return batches


def _pieces(batch: list[Part]) -> list[Piece]:
    """Return the pieces that we store, one after the other."""
    pieces = []
    offset = 0
    for part in batch:
        if part.stored:
            pieces.append(Piece(part.name, 0, part.shape.numel(), offset, owned=True))
            offset += part.shape.numel()
    return pieces


def _flats(batch: list[Part], published: Weights, model: ModelConfig) -> Flats:
    """Return the weights of a batch and their moments; zero ones take no memory."""
    ours = [published.ours(part, model) for part in batch]
    flat = [tensor.flatten() for tensor in ours if tensor is not None]
    # One large tensor is not copied.
    weights = flat[0] if len(flat) == 1 else torch.cat(flat or [torch.empty(0)])
    if not published.steps:
        zeros = torch.zeros(1).expand(weights.numel())
        return {WEIGHT: weights, **dict.fromkeys(MOMENTS, zeros)}
    stored = [part for part in batch if part.stored]
    moments = {
        moment: torch.cat([published.moment(part, model, moment).flatten() for part in stored])
        for moment in MOMENTS
    }
    return {WEIGHT: weights, **moments}


def _manifest(
    published: Weights,
    config: ResolvedConfig,
    parts: list[Part],
    plan: list[list[PlannedFile]],
    command: str,
) -> Manifest:
    """Return the manifest that a run would have written at that step, before its first sample."""
    steps = published.steps
    boxes = {part.name: whole(part.shape) for part in parts}
    slices: dict[str, list[Slice]] = {part.name: [] for part in parts if part.stored}
    for file in (file for files in plan for file in files):
        for name, piece in file.slices(boxes):
            slices[name].append(piece)
    return Manifest(
        state=TrainState(step=steps, applied_steps=steps, tokens=steps * config.tokens_per_step),
        identity=config.identity(),
        data_fingerprint=open_stream(config, "train").fingerprint,
        topology={command: published.architecture.name},
        scheduler={"last_batch_iteration": steps - 1} if config.scheduler else {},
        learning_rates=[_learning_rate(config, steps)] * GROUPS,
        loss_scaler={},
        tensors={
            p.name: StoredTensor(tuple(p.shape), tuple(slices[p.name])) for p in parts if p.stored
        },
        files={},
        versions=VERSIONS,
    )


def _learning_rate(config: ResolvedConfig, updates: int) -> float:
    """Return the learning rate of the step after so many updates, by DeepSpeed's own schedule."""
    if not updates or config.scheduler is None:
        return _first_learning_rate(config)
    from deepspeed.runtime import lr_schedules

    nothing = torch.optim.SGD([torch.zeros(1)], lr=config.optimizer.params.lr)
    numbers = config.scheduler.params.model_dump(exclude_none=True)
    kind = getattr(lr_schedules, config.scheduler.type)
    schedule = kind(nothing, last_batch_iteration=updates - 1, **numbers)  # it counts from -1
    return float(schedule.get_lr()[0])


def _first_learning_rate(config: ResolvedConfig) -> float:
    """Return the first step's learning rate, as DeepSpeed's schedules set it when created.

    runtime/lr_schedules.py:743, 888.
    """
    if config.scheduler is None:
        return config.optimizer.params.lr
    return (
        0.0
        if isinstance(config.scheduler, WarmupCosineLR)
        else config.scheduler.params.warmup_min_lr
    )
