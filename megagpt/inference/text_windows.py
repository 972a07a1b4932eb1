"""Windows of any text: where the model reads each, and which tokens each scores.

As transformers' "Perplexity of fixed-length models" has them: a window begins ``stride`` tokens
after the one before and scores the tokens that no window before it has scored. The first token of
a document is context only, and so is the first of a window if the stride is the window. A window
holds tokens of one document.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from megagpt.data.corpora import Corpus
from megagpt.data.tokenizer import Tokenizer
from megagpt.dataset import Batch
from megagpt.inference.evaluate import Evaluated, Evaluation, evaluate_batches
from megagpt.model import IGNORED
from megagpt.utils import UserError

Window = tuple[np.ndarray, np.ndarray]  # tokens and the targets that follow them, int64


def tokenized(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the ids of each document, int64, after those that the tokenizer puts before it."""
    parts: list[np.ndarray] = []
    for piece in corpus.pieces():
        if piece.starts:
            parts = [np.array(tokenizer.start_of_document, np.int64)]
        parts += tokenizer.encode_texts([piece.text], [not piece.starts])
        if piece.ends:
            yield np.concatenate(parts, dtype=np.int64)


def windows(document: np.ndarray, window: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a document: of ``window`` tokens, of which the last is only a target."""
    scored = 0
    for begin in range(0, len(document), stride):
        end = min(begin + window, len(document))
        if end - begin > 1:
            targets = document[begin + 1 : end].copy()
            targets[: max(scored - begin - 1, 0)] = IGNORED
            yield document[begin : end - 1], targets
        scored = end
        if end == len(document):
            return


def evaluate_text(
    model: Evaluated,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    window: int,
    stride: int,
    batch_size: int,
    batches: int | None = None,
) -> Evaluation:
    """Return the evaluation of a corpus, or of its first ``batches`` of windows.

    Every rank that shares the model must call it. Raise UserError if there is no token to predict.
    """
    documents = tokenized(corpus, tokenizer)
    cut = window_batches(documents, window=window, stride=stride, batch_size=batch_size)
    found = evaluate_batches(model, model.share(islice(cut, batches)), tokenizer)
    if not found.tokens:
        raise UserError(
            f"--dataset {corpus.description['dataset']}: no token to predict: each document has "
            f"one at most; name a longer text"
        )
    return found


def window_batches(
    documents: Iterable[np.ndarray], *, window: int, stride: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the windows of all documents in batches."""
    found = (each for document in documents for each in windows(document, window, stride))
    while rows := list(islice(found, batch_size)):
        yield padded(rows)


def padded(rows: Sequence[Window]) -> Batch:
    """Return rows of different lengths as a batch; what fills them up has no targets.

    It comes after the tokens, where attention is causal, so it changes nothing.
    """
    length = max(len(tokens) for tokens, _ in rows)
    tokens = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), IGNORED, np.int64)
    for place, (own, wanted) in enumerate(rows):
        tokens[place, : len(own)] = own
        targets[place, : len(wanted)] = wanted
    return Batch(tokens, targets, None, np.arange(len(rows)))
