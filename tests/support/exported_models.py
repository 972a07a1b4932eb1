"""What the tests of export and import share."""

import json
from pathlib import Path

import torch

from megagpt.config import RunConfig
from megagpt.dataset import SampleStream
from megagpt.huggingface.importing import IMPORTED, import_model
from tests.support.configurations import Config
from tests.support.trained_run import SEQUENCE_LENGTH

TRAIN = "tests.support.jobs.checkpoint:train"
VOCABULARY, ROWS = 257, 384  # bytes and the end of a document; padded


def tokens_of(data: Path) -> torch.Tensor:
    """Real ones, (samples, SEQUENCE_LENGTH)."""
    stream = SampleStream.open(
        [(data, 1.0)], split="train", sequence_length=SEQUENCE_LENGTH, seed=0, document_mask=False
    )
    return torch.from_numpy(stream.batch(range(8)).tokens)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest value."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def import_into(run: Path, model: Path, config: Config) -> Config:
    """Import, and give what to train it with."""
    import_model(model, RunConfig.from_json(json.dumps(config)), run)
    imported: Config = json.loads((run / IMPORTED).read_text())
    return imported
