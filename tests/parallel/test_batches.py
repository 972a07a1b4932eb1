"""Which samples a rank reads: the steps' samples are those of the run, however many ranks cut
them up.
"""

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernels
from kernels.philox import fold_seed
from megagpt.config import ResolvedConfig, RunConfig
from megagpt.dataset import SampleStream
from megagpt.model import Context, place_seeds
from megagpt.parallel.batches import BatchLoader
from megagpt.parallel.pipeline import MicroBatch
from tests.support.configurations import tiny
from tests.support.trained_run import write_dataset

BATCH = 12


@dataclass
class Replica:
    """As much of a mesh as a loader looks at."""

    data_rank: int
    data_size: int


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def stream_of(data: Path, *, document_mask: bool = False) -> SampleStream:
    return SampleStream.open(
        [(data, 1.0)], split="train", sequence_length=16, seed=3, document_mask=document_mask
    )


def resolved(ranks: int, micro: int, dropout: float = 0.0) -> ResolvedConfig:
    config = tiny(batch=BATCH, micro=micro, vocab_size=384, dropout=dropout)
    return RunConfig.from_json(json.dumps(config)).resolved(
        world_size=ranks, vocabulary=257, bf16_native=False
    )


def load(
    stream: SampleStream, ranks: int, micro: int, step: int | None = 7, **model: float
) -> list[list[MicroBatch]]:
    """Every replica's micro-batches of the global batch that begins at sample 24."""
    config = resolved(ranks, micro, **model)
    loaders = [
        BatchLoader(stream, config, Replica(rank, ranks), torch.device("cpu"))
        for rank in range(ranks)
    ]
    return [loader.load(24, step) for loader in loaders]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (1, 3), (2, 2), (3, 4), (4, 1)])
def test_the_ranks_together_read_the_global_batch_once(data: Path, ranks: int, micro: int) -> None:
    """In the order of the global batch, micro-batch by micro-batch and within one rank by rank."""
    stream = stream_of(data)
    replicas = load(stream, ranks, micro)
    assert {len(micro_batches) for micro_batches in replicas} == {BATCH // (ranks * micro)}
    in_order = [micro_batch for by_rank in zip(*replicas, strict=True) for micro_batch in by_rank]
    expected = stream.batch(range(24, 24 + BATCH))
    assert torch.equal(torch.cat([m.tokens for m in in_order]), torch.from_numpy(expected.tokens))
    assert torch.equal(torch.cat([m.targets for m in in_order]), torch.from_numpy(expected.targets))


def test_a_samples_dropout_seed_depends_on_the_step_and_not_on_its_rank(data: Path) -> None:
    def seeds(ranks: int, micro: int, step: int) -> torch.Tensor:
        replicas = load(stream_of(data), ranks, micro, step, dropout=0.1)
        return torch.cat(
            [m.dropout_seed for by_rank in zip(*replicas, strict=True) for m in by_rank]
        )

    assert torch.equal(seeds(1, 12, step=7), seeds(3, 2, step=7))
    of_step = seeds(1, 12, step=7)  # (samples, places)
    assert of_step.unique().numel() == of_step.numel() == BATCH * (1 + 3 * 2)
    assert not torch.isin(seeds(1, 12, step=7), seeds(1, 12, step=8)).any()


def test_without_dropout_or_without_a_step_there_are_no_seeds(data: Path) -> None:
    assert load(stream_of(data), 1, 12)[0][0].dropout_seed is None
    assert load(stream_of(data), 1, 12, step=None, dropout=0.1)[0][0].dropout_seed is None


def test_packed_documents_are_told_apart_where_that_is_asked_for(data: Path) -> None:
    assert load(stream_of(data), 1, 12)[0][0].documents is None
    stream = stream_of(data, document_mask=True)
    bounds = torch.cat([m.documents.positions for m in load(stream, 1, 4)[0]])
    ids = torch.from_numpy(stream.batch(range(24, 24 + BATCH)).document_ids)
    assert torch.equal(bounds, kernels.document_bounds(ids).positions)


def test_the_next_batch_is_prepared_in_a_thread(data: Path) -> None:
    """The batches are those of a loader that prepares none ahead, in whatever order they are asked
    for; what goes wrong in the thread is raised when that batch is asked for.
    """
    stream = stream_of(data, document_mask=True)
    loader, plain = (
        BatchLoader(stream, resolved(1, 4, dropout=0.1), Replica(0, 1), torch.device("cpu"))
        for _ in range(2)
    )
    threads = []
    prepare = loader._prepare
    loader._prepare = lambda *batch: threads.append(threading.current_thread()) or prepare(*batch)
    for first, step in ((0, 1), (12, 2), (24, 3), (60, 4), (72, 5), (12, 2)):
        for found, expected in zip(
            loader.load(first, step), plain._prepare(first, step), strict=True
        ):
            assert torch.equal(found.tokens, expected.tokens)
            assert torch.equal(found.targets, expected.targets)
            assert torch.equal(found.documents.positions, expected.documents.positions)
            assert torch.equal(found.dropout_seed, expected.dropout_seed)
    here = [thread is threading.main_thread() for thread in threads]
    # in this thread: the first batch, and those after a jump
    assert sum(here) == 3
    loader._prepare = lambda *batch: 1 // 0
    loader.load(24, 3)
    with pytest.raises(ZeroDivisionError):
        loader.load(36, 4)


def test_seeds_of_places_are_those_that_the_model_folds_itself(data: Path) -> None:
    model = resolved(1, 12, dropout=0.1).megagpt.model
    of_samples = torch.tensor([3, 2**62, -5])
    by_place = place_seeds(model, of_samples)
    for place in range(1 + 3 * model.num_layers):
        folded = fold_seed(of_samples, place)
        assert torch.equal(by_place[:, place], folded)
        assert torch.equal(Context(dropout_seed=by_place).seed(place), folded)
        assert torch.equal(Context(dropout_seed=of_samples).seed(place), folded)
