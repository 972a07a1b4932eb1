"""Judge a run's configuration with its data, and compare the data with its newest checkpoint.

Nothing in here imports torch.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from megagpt.checkpoint.format import (
    DamagedCheckpointError,
    complete_steps,
    read_manifest,
    step_directory,
)
from megagpt.config import ResolvedConfig, RunConfig
from megagpt.data.manifest import Split, read_dataset_manifest
from megagpt.dataset import SampleStream
from megagpt.planning.legality import ANY_VOCABULARY, LegalRun, World, require_legal, resolve
from megagpt.rundir import directory as directories
from megagpt.rundir.changes import DATA, DATA_FINGERPRINT, Changes, allows_data
from megagpt.utils import RankEnvironment, UserError

EMBEDDED_CORPUS = Path("data/stdlib")

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
    return resolve(written, source, world=World(ranks, vocabulary))


def open_data(config: ResolvedConfig, directory: Path) -> dict[Split, SampleStream]:
    """Return the samples of each split, after every check that needs no torch; raise UserError."""
    directories.require_same_identity(directory, config)
    opened = {"train": open_stream, "val": _open_validation}
    streams = {split: opened[split](config, split) for split in splits_of(config)}
    _require_data_of_the_newest(directory, streams["train"])
    return streams


def splits_of(config: ResolvedConfig) -> tuple[Split, ...]:
    """Return the splits that a run reads: without evaluation no validation split."""
    return ("train", "val") if config.megagpt.training.eval_interval_steps else ("train",)


def _open_validation(config: ResolvedConfig, split: Split) -> SampleStream:
    try:
        return open_stream(config, split)
    except UserError as error:
        raise UserError(
            f"{error}; or turn evaluation off: --set megagpt.training.eval_interval_steps=0"
        ) from error


def _require_data_of_the_newest(directory: Path, stream: SampleStream) -> None:
    """Raise UserError unless the data are those of the newest checkpoint with a valid manifest.

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
    sources = config.megagpt.data.sources
    return max(read_dataset_manifest(Path(source.path)).vocabulary for source in sources)


def open_stream(config: ResolvedConfig, split: Split) -> SampleStream:
    """Return the samples of one split."""
    data = config.megagpt.data
    return SampleStream.open(
        [(Path(source.path), source.weight) for source in data.sources],
        split=split,
        sequence_length=config.megagpt.model.sequence_length,
        seed=data.seed,
        document_mask=data.document_mask,
    )
