"""Text from a model, one token after another: key-value cache, temperature, top-k and top-p,
streamed as it is decoded.

A prompt is read as it stands (an empty one as the end of the document before). Prompts are
continued one by one, each from its own generator, so a text depends neither on the other prompts
nor on their order.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from megagpt.data.tokenizer import load_tokenizer
from megagpt.inference.stored_model import require_known_ids
from megagpt.model import KeyValueCache
from megagpt.schema.megagpt import MegagptConfig

# Reads tokens (1, length), on the CPU, at positions cache.length and after, and adds them to the
# cache. Returns logits (1, any length, vocabulary), on any device: the last row scores the next
# token.
Forward = Callable[[Tensor, KeyValueCache], Tensor]


def generate(
    forward: Forward,
    encoding: tiktoken.Encoding,
    prompts: Sequence[str],
    *,
    sequence_length: int,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The continuation of each prompt, up to ``max_new_tokens`` tokens or the end of the document.

    ``on_text(prompt_index, piece)`` receives the text as it grows. Where ranks share the model
    (ZeRO-3 gathers it anew in every forward) all of them must call this, and ``forward`` must
    return the same last row to each, for instance rank 0's, broadcast: then they draw the same
    tokens, stop at the same one and run the same number of forwards. Raises ValueError for sampling
    settings out of range and for logits that are not finite.
    """
    texts = []
    allowed = allowed_tokens(encoding)
    for index, prompt in enumerate(prompts):
        sampler = Sampler(allowed, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        tokens = encoding.encode_ordinary(prompt) or [encoding.eot_token]
        new_tokens = continuation(
            forward,
            tokens,
            sampler,
            sequence_length=sequence_length,
            end_token=encoding.eot_token,
            limit=max_new_tokens,
        )
        pieces = []
        for piece in decode_stream(new_tokens, encoding):
            pieces.append(piece)
            if on_text is not None:
                on_text(index, piece)
        texts.append("".join(pieces))
    return texts


def continuation(
    forward: Forward,
    tokens: Sequence[int],
    sampler: "Sampler",
    *,
    sequence_length: int,
    end_token: int,
    limit: int,
) -> Iterator[int]:
    """At most ``limit`` tokens that follow ``tokens``, up to the end token, which is not among
    them.

    A model knows no position past ``sequence_length``. Once the text fills it, its newest half is
    read again from position 0, so that one token in half a sequence costs more than the others.
    """
    text, unread = list(tokens), list(tokens)
    cache = KeyValueCache(sequence_length)
    for _ in range(limit):
        if cache.length + len(unread) > sequence_length:
            cache, unread = KeyValueCache(sequence_length), text[-((sequence_length + 1) // 2) :]
        token = sampler.pick(next_logits(forward, unread, cache))
        if token == end_token:
            return
        yield token
        text.append(token)
        unread = [token]


@torch.no_grad()
def next_logits(forward: Forward, unread: Sequence[int], cache: KeyValueCache) -> Tensor:
    """The scores (vocabulary,) of the token after those in the cache and the unread ones; fp32,
    on the CPU.
    """
    logits = forward(torch.tensor([unread]), cache)[0, -1].float().cpu()
    if not logits.isfinite().all():
        raise ValueError(
            f"the model returned logits that are not finite at position {cache.length}: its "
            f"weights are spoilt"
        )
    return logits


class Sampler:
    """Chooses the next token by its score: the best one at temperature 0, else a draw from what
    top-k and top-p keep.

    It draws on the CPU, so a seed gives the same text wherever the scores are the same.
    """

    def __init__(
        self, allowed: Tensor, *, temperature: float, top_k: int | None, top_p: float, seed: int
    ) -> None:
        if not (
            0 <= temperature < float("inf") and (top_k is None or top_k >= 1) and 0 < top_p <= 1
        ):
            given = f"temperature {temperature}, top_k {top_k}, top_p {top_p}"
            raise ValueError(
                f"{given}: need temperature >= 0, top_k >= 1 (or None) and 0 < top_p <= 1"
            )
        self.allowed, self.temperature, self.top_k, self.top_p = allowed, temperature, top_k, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, logits: Tensor) -> int:
        """One of the allowed tokens, by its logits (vocabulary,)."""
        scores = logits[self.allowed].double()
        choice = self._draw(scores) if self.temperature else scores.argmax()
        return int(self.allowed[choice])

    def _draw(self, scores: Tensor) -> Tensor:
        """An index into scores.

        Nucleus sampling (top-p): Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
        """
        best, order = scores.sort(descending=True, stable=True)
        # Scores relative to the best one: divided by a tiny temperature they reach -inf, never inf.
        probabilities = ((best - best[0]) / self.temperature)[: self.top_k].softmax(dim=0)
        more_probable = probabilities.cumsum(dim=0) - probabilities
        kept = probabilities.where(
            more_probable < self.top_p, 0.0
        )  # the first is always among them
        return order[torch.multinomial(kept, 1, generator=self.generator)]


def open_tokenizer(config: MegagptConfig) -> tiktoken.Encoding:
    """The encoding of a run's data.

    UserError where it is missing, or has tokens that the model never learnt.
    """
    directory = Path(config.data.sources[0].path)
    encoding = load_tokenizer(directory)
    require_known_ids(directory, encoding.n_vocab, config.model)
    return encoding


def allowed_tokens(encoding: tiktoken.Encoding) -> Tensor:
    """The ids that a model may write: those that are text, and the end of a document.

    Not the rows that pad the vocabulary to a multiple of 128, nor the numbers that an encoding
    skips.
    """
    text = [encoding.encode_single_token(value) for value in encoding.token_byte_values()]
    return torch.tensor([*text, encoding.eot_token])


def decode_stream(tokens: Iterable[int], encoding: tiktoken.Encoding) -> Iterator[str]:
    """Text in pieces, one whenever a token completes a character; bytes that are not UTF-8
    become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(encoding.decode_single_token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
