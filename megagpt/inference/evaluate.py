"""How well a model predicts held-out text: loss, perplexity and bits per byte."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from megagpt.data.token_files.declared import Declared
from megagpt.data.token_files.opening import manifest_of
from megagpt.data.tokenizer import Tokenizer
from megagpt.dataset import Batch, SampleStream
from megagpt.inference.stored_model import require_known_ids
from megagpt.model import IGNORED
from megagpt.rundir.data import open_validation_sets
from megagpt.schema.megagpt import MegagptConfig

Item = TypeVar("Item")


class Evaluated(Protocol):
    """A model whose loss can be computed: see megagpt/inference/placed_model.py."""

    def loss(self, batch: Batch) -> Tensor | None:
        """Return the mean loss of the batch's targets in nats; None on ranks without it."""

    def share(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items that this replica evaluates."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of the values over the replicas."""


@dataclass(frozen=True)
class Evaluation:
    """The mean loss in nats per token, and the tokens and bytes of text that it covers."""

    loss: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """The number of equally likely tokens with the same uncertainty; infinite beyond floats."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The bits that code a byte of the text with this model; comparable between tokenizers.

        Loss and perplexity are not. The end of a document costs bits and counts no bytes. None for
        ids without a tokenizer, of which no text is known.
        """
        if not self.text_bytes:
            return None
        return self.loss * self.tokens / (math.log(2) * self.text_bytes)

    def as_json(self) -> dict[str, float | int | None]:
        """Return the numbers for JSON, which has no infinity."""
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None
        return {**asdict(self), "perplexity": perplexity, "bits_per_byte": self.bits_per_byte}

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}"
        if self.bits_per_byte is None:
            return f"{text} ({self.tokens:,} tokens)"
        return (
            f"{text}, {self.bits_per_byte:.4f} bits per byte ({self.tokens:,} tokens, "
            f"{self.text_bytes:,} bytes)"
        )


def evaluate(
    model: Evaluated,
    stream: SampleStream,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    batches: int | None = None,
) -> Evaluation:
    """Return the evaluation of one epoch of ``stream``, or of its first ``batches``.

    It is the same samples in the same order every time. Every token has the same weight, also in a
    last batch that is not full. Every rank that shares the model must call it.
    """
    starts = islice(range(0, stream.samples_per_epoch, batch_size), batches)
    return evaluate_batches(
        model,
        (
            stream.batch(range(start, min(start + batch_size, stream.samples_per_epoch)))
            for start in model.share(starts)
        ),
        tokenizer,
    )


def evaluate_batches(
    model: Evaluated, batches: Iterable[Batch], tokenizer: Tokenizer
) -> Evaluation:
    """Return the evaluation of this replica's batches together with the other replicas'.

    The loss is NaN without targets. Every rank that shares the model must call it.
    """
    nats = 0.0
    tokens = 0
    text_bytes = 0
    for batch in batches:
        loss = model.loss(batch)
        counts = batch.targets != IGNORED
        targets = batch.targets[counts]
        nats += loss.item() * targets.size if loss is not None else 0.0
        tokens += targets.size
        text_bytes += tokenizer.text_bytes(batch.tokens[counts], targets)
    nats, *counted = model.sums([nats, tokens, text_bytes])
    tokens, text_bytes = map(int, counted)
    return Evaluation(nats / tokens if tokens else math.nan, tokens, text_bytes)


def open_validation(config: MegagptConfig) -> list[tuple[Path, SampleStream]]:
    """Return the validation split of each dataset of a run, then its further validation sets.

    Raise UserError if one may hold ids that the model has not learned.
    """
    streams: list[tuple[Path, SampleStream]] = []
    declared = Declared.by(config)
    training = manifest_of(Path(config.data.sources[0].path), declared)
    for source in config.data.sources:
        directory = Path(source.path)
        if config.data.validation and not manifest_of(directory, declared).tokens("val"):
            continue
        stream = SampleStream.open(
            [(directory, 1.0)],
            split="val",
            sequence_length=config.model.sequence_length,
            seed=config.data.seed,
            document_mask=config.data.document_mask,
            packing=config.data.packing,
            declared=Declared.by(config),
        )
        require_known_ids(directory, stream.vocabulary, config.model)
        streams.append((directory, stream))
    further = open_validation_sets(config, training).values()
    return streams + [(stream.datasets[0].directory, stream) for stream in further]
