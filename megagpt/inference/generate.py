"""Text from a model, token by token: key-value cache, temperature, top-k, top-p, streaming.

A prompt is read as the start of a document, with the ids that the tokenizer puts there; without
any, an empty one is read as the end of the previous document. Prompts are continued one by one,
each with its own generator, so a text depends neither on the other prompts nor on their order.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megagpt.data.token_files.declared import Declared
from megagpt.data.token_files.ids_only import IdsOnly
from megagpt.data.token_files.opening import tokenizer_of
from megagpt.data.tokenizer import Tokenizer
from megagpt.inference.stored_model import require_known_ids
from megagpt.model import KeyValueCache
from megagpt.rundir.tokenizer_hash import require_tokenizer
from megagpt.schema.megagpt import MegagptConfig

# Reads tokens (1, length) on the CPU, at positions from cache.length on, and adds them to the
# cache. Returns logits (1, any length, vocabulary) on any device; the last row scores the next
# token.
Forward = Callable[[Tensor, KeyValueCache], Tensor]


def generate(
    forward: Forward,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    sequence_length: int,
    reread_after: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    end_tokens: Sequence[int] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Return each prompt's continuation, up to ``max_new_tokens`` or the end of the document.

    A prompt of ids is read as it is. ``end_tokens`` end a text, too (those of a chat's turn).
    ``reread_after`` is the model's: see ``continuation``.
    ``on_text(prompt_index, piece)`` receives the text as it grows. If ranks share the model (ZeRO-3
    gathers it in every forward), all of them must call this, and ``forward`` must return the same
    last row on each, for instance rank 0's, broadcast: they then draw the same tokens and run the
    same number of forwards. Raise ValueError for sampling settings out of range and for logits that
    are not finite.
    """
    texts = []
    allowed = allowed_tokens(tokenizer, end_tokens)
    for index, prompt in enumerate(prompts):
        sampler = Sampler(allowed, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        read = (
            [*tokenizer.start_of_document, *tokenizer.encode(prompt)]
            if isinstance(prompt, str)
            else [*prompt]
        )
        new_tokens = continuation(
            forward,
            read or [tokenizer.end_of_document],
            sampler,
            sequence_length=sequence_length,
            reread_after=reread_after,
            end_tokens=(tokenizer.end_of_document, *end_tokens),
            limit=max_new_tokens,
        )
        pieces = []
        for piece in tokenizer.decode_stream(new_tokens, after=read):
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
    end_tokens: Sequence[int],
    limit: int,
    reread_after: int | None = None,
) -> Iterator[int]:
    """Yield at most ``limit`` tokens that follow ``tokens``, up to but without an end token.

    A model has no position beyond ``sequence_length``. When the text fills it, its newest half is
    read again from position 0, so one token per half sequence costs more than the others. So does
    the one at which the text becomes longer than ``reread_after``: the cached keys were rotated
    for a short text.
    """
    text = list(tokens)
    unread = list(tokens)
    cache = KeyValueCache(sequence_length)
    start = 0  # of what the cache holds, in the text
    for _ in range(limit):
        length = cache.length + len(unread)
        full = length > sequence_length
        if full:
            start = len(text) - (sequence_length + 1) // 2
        if full or (reread_after is not None and cache.length <= reread_after < length):
            cache = KeyValueCache(sequence_length)
            unread = text[start:]
        token = sampler.pick(next_logits(forward, unread, cache))
        if token in end_tokens:
            return
        yield token
        text.append(token)
        unread = [token]


@torch.no_grad()
def next_logits(forward: Forward, unread: Sequence[int], cache: KeyValueCache) -> Tensor:
    """Return the logits (vocabulary,) of the next token, fp32 on the CPU."""
    logits = forward(torch.tensor([unread]), cache)[0, -1].float().cpu()
    if not logits.isfinite().all():
        raise ValueError(
            f"the model returned logits that are not finite at position {cache.length}; its "
            f"weights are corrupt"
        )
    return logits


class Sampler:
    """Chooses the next token: the best one at temperature 0, else a draw from top-k and top-p.

    It draws on the CPU, so a seed gives the same text wherever the logits are the same.
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
        self.allowed = allowed
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, logits: Tensor) -> int:
        """Return one of the allowed tokens, by its logits (vocabulary,)."""
        scores = logits[self.allowed].double()
        choice = self._draw(scores) if self.temperature else scores.argmax()
        return int(self.allowed[choice])

    def _draw(self, scores: Tensor) -> Tensor:
        """Return an index into scores.

        Nucleus sampling (top-p): Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
        """
        best, order = scores.sort(descending=True, stable=True)
        # Relative to the best score, division by a tiny temperature gives -inf, never inf.
        probabilities = ((best - best[0]) / self.temperature)[: self.top_k].softmax(dim=0)
        more_probable = probabilities.cumsum(dim=0) - probabilities
        kept = probabilities.where(more_probable < self.top_p, 0.0)  # the first is always kept
        return order[torch.multinomial(kept, 1, generator=self.generator)]


def open_tokenizer(config: MegagptConfig, run_directory: Path) -> Tokenizer:
    """Return the tokenizer of a run's data.

    Raise UserError if it is missing, has tokens that the model has not learned, or is not that of
    the published model that the run began with.
    """
    directory = Path(config.data.sources[0].path)
    declared = Declared.by(config)
    tokenizer = tokenizer_of(directory, declared)
    require_tokenizer(run_directory, directory, declared)
    require_known_ids(directory, tokenizer.vocabulary, config.model)
    for prompt in config.training.sample_prompts if isinstance(tokenizer, IdsOnly) else ():
        tokenizer.encode(prompt)  # raises now, not at the first sample
    return tokenizer


def allowed_tokens(tokenizer: Tokenizer, end_tokens: Sequence[int] = ()) -> Tensor:
    """Return the ids that a model may write: those of text, the end of a document, other ends.

    Rows that pad the vocabulary and ids that a tokenizer skips are not allowed.
    """
    known = [*tokenizer.text_ids]
    ends = (tokenizer.end_of_document, *end_tokens)
    return torch.tensor([*known, *(end for end in ends if end not in known and end >= 0)])
