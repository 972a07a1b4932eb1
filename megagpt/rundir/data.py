"""Judge a run's configuration with its data, and compare the data with its newest checkpoint.

Nothing in here imports torch.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megagpt.checkpoint.format import (
    DamagedCheckpointError,
    complete_steps,
    read_manifest,
    step_directory,
)
from megagpt.config import ResolvedConfig, RunConfig
from megagpt.data.manifest import Split
from megagpt.data.token_files.declared import Declared
from megagpt.data.token_files.opening import Manifest, manifest_of, require_use
from megagpt.dataset import SampleStream
from megagpt.planning.epochs import counted_samples
from megagpt.planning.legality import ANY_VOCABULARY, LegalRun, World, require_legal, resolve
from megagpt.rundir import directory as directories
from megagpt.rundir.base import find_base
from megagpt.rundir.changes import DATA, DATA_FINGERPRINT, Changes, allows_data
from megagpt.schema.megagpt import MegagptConfig
from megagpt.utils import RankEnvironment, UserError

EMBEDDED_CORPUS = Path("data/stdlib")
VALIDATION = "megagpt.data.validation."  # before the name of a further validation set

log = logging.getLogger(__name__)


def resolve_run(written: RunConfig, source: str = "") -> LegalRun:
    """Return the run on the ranks that have started and the data that are there.

    Raises ConfigError with all problems, `source` (the file) before each line. If data are missing
    or damaged, the configuration is judged without them first: before the embedded corpus is made,
    which takes seconds, and before anything is said of the data.
    """
    ranks = RankEnvironment.read().world_size
    try:
        vocabulary = _vocabulary(written)
    except UserError:
        require_legal(written, source, World(ranks, ANY_VOCABULARY))
        vocabulary = prepare_vocabulary(written)
    return resolve(written, source, world=World(ranks, vocabulary, samples=counted_samples()))


def open_data(
    config: ResolvedConfig, directory: Path, prefixes: Sequence[str] = ()
) -> tuple[dict[str, SampleStream], Changes]:
    """Return the samples of each split, and what this start changes in the run.

    Those of a further validation set have its whole key, `megagpt.data.validation.NAME`. Every
    check that needs no torch is made. Raise UserError, also for a change that ``prefixes`` (of
    `--allow_change`) do not cover.
    """
    changes = directories.changes_of(directory, config, prefixes)
    find_base(config, directory)
    opened = {"train": open_stream, "val": _open_validation}
    streams: dict[str, SampleStream] = {
        split: opened[split](config, split) for split in splits_of(config)
    }
    stream = streams["train"]
    if config.megagpt.training.eval_interval_steps:
        streams |= open_validation_sets(config.megagpt, stream.datasets[0].manifest)
    stored = _fingerprint_of_the_newest(directory)
    if stored is not None:
        step, fingerprint = stored
        if fingerprint != stream.fingerprint and allows_data(prefixes):
            changes = changes.with_data(fingerprint, stream.fingerprint)
        require_same_data(directory, step, fingerprint, stream, changes)
    if {DATA_FINGERPRINT, "megagpt.data.path"} & changes.now.keys():
        _require_same_tokenizer(directories.read_config(directory), stream)
    return streams, changes


def splits_of(config: ResolvedConfig) -> tuple[Split, ...]:
    """Return the splits that a run reads: without evaluation no validation split.

    With further validation sets, the training data need none.
    """
    data = config.megagpt.data
    if not config.megagpt.training.eval_interval_steps or (
        data.validation
        and not any(
            manifest_of(Path(source.path), Declared.by(config.megagpt)).tokens("val")
            for source in data.sources
        )
    ):
        return ("train",)
    return ("train", "val")


def open_validation_sets(config: MegagptConfig, training: Manifest) -> dict[str, SampleStream]:
    """Return the samples of each further validation set by its whole key.

    They are those of its validation split, or all if it has none. Raise UserError for a set with
    another tokenizer than the ``training`` data.
    """
    streams = {}
    declared = replace(Declared.by(config), validation_fraction=0.0)  # token files are read whole
    for name, path in config.data.validation.items():
        key = f"{VALIDATION}{name}"
        try:
            manifest = manifest_of(Path(path), declared)
            split: Split = "val" if manifest.tokens("val") else "train"
            streams[key] = _open(config, [(Path(path), 1.0)], split, declared)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        if manifest.ids != training.ids:
            raise UserError(
                f"{key}: the tokenizer of {path} is not that of the training data (found "
                f"{manifest.tokenizer.name}, need {training.tokenizer.name}); prepare it with that "
                f"one: python launch/download_data.py --dataset ... --tokenizer "
                f"{training.tokenizer.name} --output {path} --force"
            )
    return streams


def validation_name(key: str) -> str | None:
    """Return the name of the validation set of a key of ``open_data``; None of `val`."""
    return key.removeprefix(VALIDATION) if key.startswith(VALIDATION) else None


def _open_validation(config: ResolvedConfig, split: Split) -> SampleStream:
    try:
        return open_stream(config, split)
    except UserError as error:
        raise UserError(
            f"{error}; or turn evaluation off: --set megagpt.training.eval_interval_steps=0"
        ) from error


def _require_same_tokenizer(recorded: ResolvedConfig, stream: SampleStream) -> None:
    """Raise UserError if the new data have another tokenizer than the run's, where those remain."""
    ours = stream.datasets[0].manifest.tokenizer
    for source in recorded.megagpt.data.sources:
        try:
            declared = Declared.by(recorded.megagpt)
            theirs = manifest_of(Path(source.path), declared).tokenizer
        except UserError:
            log.warning("%s: gone, so its tokenizer cannot be compared", source.path)
            continue
        if theirs.sha256 != ours.sha256:
            raise UserError(
                f"{stream.datasets[0].directory}: its tokenizer ({ours.name}) is not that of "
                f"{source.path} ({theirs.name}), of the run; prepare it with the same one"
            )


def _fingerprint_of_the_newest(directory: Path) -> tuple[int, str] | None:
    """Return step and data of the newest checkpoint with a valid manifest, None without one.

    This runs before any rank builds its model.
    """
    checkpoints = directory / "checkpoints"
    for step in complete_steps(checkpoints):
        try:
            manifest = read_manifest(step_directory(checkpoints, step))
        except DamagedCheckpointError:
            continue
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); start again when its disk "
                f"works"
            ) from error
        return step, manifest.data_fingerprint
    return None


def require_same_data(
    directory: Path, step: int, fingerprint: str, stream: SampleStream, changes: Changes
) -> None:
    """Raise UserError unless a checkpoint of ``step`` was trained on these data.

    Data that were changed on purpose may be either.
    """
    if fingerprint not in (stream.fingerprint, *changes.known().get(DATA_FINGERPRINT, ())):
        raise UserError(
            f"{directory}: its data changed since step {step} was saved (found "
            f"{stream.fingerprint[:16]} in "
            f"{', '.join(str(dataset.directory) for dataset in stream.datasets)}, need "
            f"{fingerprint[:16]}); restore them, start again with another --run_dir, or "
            f"continue on these from their first sample: --allow_change {DATA}"
        )


def prepare_vocabulary(config: RunConfig) -> int:
    """Return the number of tokens of the data; one process per host creates the embedded corpus."""
    if EMBEDDED_CORPUS in (Path(source.path) for source in config.megagpt.data.sources):
        from megagpt.download_data import prepare_embedded_corpus

        prepare_embedded_corpus(EMBEDDED_CORPUS)
    return _vocabulary(config)


def _vocabulary(config: RunConfig) -> int:
    """Return the number of tokens of the data as their manifests have it."""
    paths = [Path(source.path) for source in config.megagpt.data.sources]
    declared = Declared.by(config.megagpt)
    require_use(paths, declared)
    return max(manifest_of(path, declared).vocabulary for path in paths)


def open_stream(config: ResolvedConfig, split: Split) -> SampleStream:
    """Return the samples of one split."""
    data = config.megagpt.data
    places = [(Path(source.path), source.weight) for source in data.sources]
    stream = _open(config.megagpt, places, split)
    if data.packing in ("conversations", "one_per_row") and not any(
        dataset.manifest.has_conversations for dataset in stream.datasets
    ):
        raise UserError(
            f'megagpt.data.packing: "{data.packing}", but {places[0][0]} holds text; leave it out, '
            "or prepare conversations (docs/tuning.md)"
        )
    return stream


def _open(
    config: MegagptConfig,
    data: list[tuple[Path, float]],
    split: Split,
    declared: Declared | None = None,
) -> SampleStream:
    return SampleStream.open(
        data,
        split=split,
        sequence_length=config.model.sequence_length,
        seed=config.data.seed,
        document_mask=config.data.document_mask,
        packing=config.data.packing,
        declared=declared or Declared.by(config),
    )
