"""The data of a run, opened and compared with its newest checkpoint before anything imports
torch.
"""

from pathlib import Path

from megagpt.checkpoint.format import (
    DamagedCheckpointError,
    complete_steps,
    read_manifest,
    step_directory,
)
from megagpt.config import ResolvedConfig, RunConfig
from megagpt.data.manifest import Split
from megagpt.dataset import SampleStream, open_dataset
from megagpt.planning.legality import World, require_legal
from megagpt.rundir import directory as directories
from megagpt.utils import RankEnvironment, UserError

EMBEDDED_CORPUS = Path("data/stdlib")
SPLITS: tuple[Split, ...] = ("train", "val")


def open_data(config: RunConfig, directory: Path) -> dict[Split, SampleStream]:
    """The samples of each split, once everything that needs no torch is found sound; raises
    UserError.
    """
    resolved = resolve_here(config, prepare_vocabulary(config))
    directories.require_same_identity(directory, resolved)
    streams = {split: open_stream(resolved, split) for split in SPLITS}
    _require_data_of_the_newest(directory, streams["train"])
    return streams


def resolve_here(
    config: RunConfig, vocabulary: int, bf16_native: bool | None = None
) -> ResolvedConfig:
    """As it would be on a device without bf16, or else with it, until torch can say which one
    this is.
    """
    world = World(RankEnvironment.read().world_size, vocabulary, bf16_native)
    require_legal(config, world=world)
    return world.resolve(config)


def _require_data_of_the_newest(directory: Path, stream: SampleStream) -> None:
    """Before any rank builds its model: the data are those of the newest checkpoint that has a
    sound manifest.
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
                f"answers"
            ) from error
        require_same_data(directory, step, manifest.data_fingerprint, stream)
        return


def require_same_data(directory: Path, step: int, fingerprint: str, stream: SampleStream) -> None:
    """Raise UserError unless the data are those that a checkpoint of ``step`` was trained on."""
    if fingerprint != stream.fingerprint:
        raise UserError(
            f"{directory}: its data changed since step {step} was saved: {stream.fingerprint[:16]} "
            f"found in {', '.join(str(dataset.directory) for dataset in stream.datasets)}, "
            f"{fingerprint[:16]} expected; restore them, or start afresh with another --run_dir"
        )


def prepare_vocabulary(config: RunConfig) -> int:
    """The number of tokens of the data; the embedded corpus is made when missing, by one process
    of a host.
    """
    directories_of_data = [Path(source.path) for source in config.megagpt.data.sources]
    if EMBEDDED_CORPUS in directories_of_data:
        from megagpt.download_data import prepare_embedded_corpus

        prepare_embedded_corpus(EMBEDDED_CORPUS)
    return max(open_dataset(directory).vocabulary for directory in directories_of_data)


def open_stream(config: ResolvedConfig, split: Split) -> SampleStream:
    """The samples of one split."""
    data = config.megagpt.data
    return SampleStream.open(
        [(Path(source.path), source.weight) for source in data.sources],
        split=split,
        sequence_length=config.megagpt.model.sequence_length,
        seed=data.seed,
        document_mask=data.document_mask,
    )
