"""How well a model predicts held-out text: loss, perplexity and bits per byte."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megagpt.data.tokenizer import Tokenizer
from megagpt.dataset import Batch, SampleStream
from megagpt.inference.stored_model import require_known_ids
from megagpt.model import GPT, IGNORED
from megagpt.schema.megagpt import MegagptConfig

Loss = Callable[[Batch], Tensor]  # the mean loss over the batch's targets, in nats per token


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
    def bits_per_byte(self) -> float:
        """The bits that code a byte of the text with this model; comparable between tokenizers.

        Loss and perplexity are not. The end of a document costs bits and counts no bytes.
        """
        return self.loss * self.tokens / (math.log(2) * self.text_bytes)

    def as_json(self) -> dict[str, float | int | None]:
        """Return the numbers for JSON, which has no infinity."""
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None
        return {**asdict(self), "perplexity": perplexity, "bits_per_byte": self.bits_per_byte}

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, {self.bits_per_byte:.4f} "
            f"bits per byte ({self.tokens:,} tokens, {self.text_bytes:,} bytes)"
        )


@torch.no_grad()
def evaluate(
    loss: Loss,
    stream: SampleStream,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    batches: int | None = None,
) -> Evaluation:
    """Return the evaluation of one epoch of ``stream``, or of its first ``batches``.

    It is the same samples in the same order every time. Every token has the same weight, also in a
    last batch that is not full.
    """
    nats = 0.0
    tokens = 0
    text_bytes = 0
    for batch in islice(epoch(stream, batch_size), batches):
        counts = batch.targets != IGNORED
        targets = batch.targets[counts]
        nats += loss(batch).item() * targets.size
        tokens += targets.size
        text_bytes += tokenizer.text_bytes(batch.tokens[counts], targets)
    return Evaluation(nats / tokens, tokens, text_bytes)


def open_validation(config: MegagptConfig) -> list[tuple[Path, SampleStream]]:
    """Return the validation split of each dataset of a run, in order.

    Raise UserError if it may hold ids that the model has not learned.
    """
    streams = []
    for source in config.data.sources:
        directory = Path(source.path)
        stream = SampleStream.open(
            [(directory, 1.0)],
            split="val",
            sequence_length=config.model.sequence_length,
            seed=config.data.seed,
            document_mask=config.data.document_mask,
        )
        require_known_ids(directory, stream.vocabulary, config.model)
        streams.append((directory, stream))
    return streams


def epoch(stream: SampleStream, batch_size: int) -> Iterator[Batch]:
    """Yield every sample of a stream once, in order; the last batch has what is left."""
    for start in range(0, stream.samples_per_epoch, batch_size):
        yield stream.batch(range(start, min(start + batch_size, stream.samples_per_epoch)))


def model_loss(model: GPT, device: torch.device) -> Loss:
    """Return the loss function of a whole model on ``device``."""

    def loss(batch: Batch) -> Tensor:
        tokens, targets = (
            torch.from_numpy(array).to(device) for array in (batch.tokens, batch.targets)
        )
        if batch.document_ids is None:
            return model(tokens, targets)
        return model(tokens, targets, document_ids=torch.from_numpy(batch.document_ids).to(device))

    return loss
