"""Generation: equal to the plain loop without a cache, whole characters, honest sampling, stops
where it should.
"""

from collections.abc import Callable, Iterator, Sequence

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.data.byte_level_bpe import ByteLevelTokenizer, bytes_only
from megagpt.data.tokenizer import store_tokenizer
from megagpt.inference.generate import (
    Sampler,
    allowed_tokens,
    continuation,
    generate,
    open_tokenizer,
)
from megagpt.model import GPT, KeyValueCache, initialise_
from megagpt.schema.megagpt import MegagptConfig
from megagpt.utils import UserError

LENGTH = 16
BYTES = ByteLevelTokenizer(bytes_only())
END = BYTES.end_of_document
SHAPE = {
    "vocab_size": 384,
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "sequence_length": LENGTH,
}
ROTARY = {
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "bias": False,
}


def random_model(**keys: object) -> GPT:
    """A model with weights so large that its next tokens differ from one another and from step
    to step.
    """
    return initialise_(GPT(ModelConfig(**SHAPE, **keys, init_std=0.3)), seed=0).double()


def cached(model: GPT) -> Callable[[Tensor, KeyValueCache], Tensor]:
    return lambda tokens, cache: model(tokens, cache=cache)


def scripted(tokens: Sequence[int], rows: int = 384) -> Callable[[Tensor, KeyValueCache], Tensor]:
    """A forward that scores the given tokens highest, one after another."""
    script = iter(tokens)

    def forward(read: Tensor, cache: KeyValueCache) -> Tensor:
        cache.length += read.shape[1]
        return torch.nn.functional.one_hot(torch.tensor([[next(script)]]), rows) * 50.0

    return forward


def greedy(forward: Callable[[Tensor, KeyValueCache], Tensor], prompt: str, limit: int) -> str:
    return generate(
        forward, BYTES, [prompt], sequence_length=LENGTH, max_new_tokens=limit, temperature=0
    )[0]


# ------------------------------------------------------------------------------------- continuation


@torch.no_grad()
def plain_loop(model: GPT, tokens: list[int], limit: int) -> Iterator[int]:
    """Greedy decoding as simple as can be: every token reads the whole window again."""
    start = 0
    for _ in range(limit):
        if len(tokens) - start > LENGTH:
            start = len(tokens) - LENGTH // 2
        tokens = [*tokens, int(model(torch.tensor([tokens[start:]]))[0, -1, : END + 1].argmax())]
        yield tokens[-1]


@pytest.mark.parametrize("keys", [{}, ROTARY], ids=["gpt2", "llama"])
@pytest.mark.parametrize("prompt_length", [1, 7, LENGTH, 3 * LENGTH])
def test_cached_generation_equals_the_plain_loop_past_the_window_too(keys, prompt_length):
    model, prompt = random_model(**keys), list(range(60, 60 + prompt_length))
    sampler = Sampler(torch.arange(END + 1), temperature=0, top_k=None, top_p=1.0, seed=0)
    tokens = continuation(
        cached(model), prompt, sampler, sequence_length=LENGTH, end_tokens=(), limit=3 * LENGTH
    )
    written = list(tokens)
    assert written == list(plain_loop(model, prompt, limit=3 * LENGTH))
    assert len(set(written)) > 5  # a model that repeats itself would prove little


def test_a_prompt_is_read_once_and_then_one_token_at_a_time():
    reads: list[tuple[int, int]] = []
    model = random_model()

    def forward(tokens: Tensor, cache: KeyValueCache) -> Tensor:
        reads.append((cache.length, tokens.shape[1]))
        return model(tokens, cache=cache)

    sampler = Sampler(torch.arange(END), temperature=0, top_k=None, top_p=1.0, seed=0)
    list(continuation(forward, range(12), sampler, sequence_length=LENGTH, end_tokens=(), limit=8))
    assert reads == [(0, 12), (12, 1), (13, 1), (14, 1), (15, 1), (0, 8), (8, 1), (9, 1)]


def test_gradients_are_not_recorded():
    model = random_model()

    def forward(tokens: Tensor, cache: KeyValueCache) -> Tensor:
        logits = model(tokens, cache=cache)
        assert not logits.requires_grad
        return logits

    assert len(greedy(forward, "a", limit=2)) > 0


def test_several_prompts_give_what_each_gives_alone():
    model, prompts = random_model(), ["def ", "", "日本語のとても長い書き出し", "def "]
    keywords = {
        "sequence_length": LENGTH,
        "max_new_tokens": 20,
        "temperature": 0.9,
        "top_k": 40,
        "seed": 5,
    }
    together = generate(cached(model), BYTES, prompts, **keywords)
    assert together == [
        generate(cached(model), BYTES, [prompt], **keywords)[0] for prompt in prompts
    ]
    assert generate(cached(model), BYTES, prompts[::-1], **keywords) == together[::-1]


def test_the_seed_decides_the_text():
    def text(seed: int) -> str:
        return generate(
            cached(model), BYTES, ["x"], sequence_length=LENGTH, max_new_tokens=20, seed=seed
        )[0]

    model = random_model()
    assert text(1) == text(1)
    assert text(1) != text(2)


def test_generation_stops_at_the_end_of_the_document_and_leaves_it_out():
    assert greedy(scripted([*b"done", END, *b"not this"]), "x", limit=20) == "done"
    assert greedy(scripted(b"cut off"), "x", limit=3) == "cut"
    assert greedy(scripted([]), "x", limit=0) == ""


def test_an_empty_prompt_follows_the_end_of_a_document():
    seen: list[int] = []

    def forward(tokens: Tensor, cache: KeyValueCache) -> Tensor:
        seen.extend(tokens.flatten().tolist())
        return scripted(b"a")(tokens, cache)

    greedy(forward, "", limit=1)
    greedy(forward, "<|endoftext|>", limit=1)  # in a prompt it is text like any other
    assert seen == [END, *b"<|endoftext|>"]


# --------------------------------------------------------------------------------------------- text


def test_pieces_hold_whole_characters_and_sum_to_the_text():
    text, pieces = "né 日本 🙂!", []
    result = generate(
        scripted(text.encode()),
        BYTES,
        ["x"],
        sequence_length=100,
        max_new_tokens=len(text.encode()),
        on_text=lambda index, piece: pieces.append((index, piece)),
    )
    assert result == [text]
    assert pieces == [(0, character) for character in text]


def test_bytes_that_are_no_character_become_replacement_characters():
    smile = "🙂".encode()
    assert "".join(BYTES.decode_stream([*b"a", *smile[:2]])) == "a\ufffd"
    assert "".join(BYTES.decode_stream([0xFF, *b"b", *smile])) == "\ufffdb🙂"


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_decoding_in_pieces_gives_the_text_back(text):
    assert "".join(BYTES.decode_stream(BYTES.encode(text))) == text


# ----------------------------------------------------------------------------------------- sampling


def sampler(
    *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0
) -> Sampler:
    return Sampler(torch.arange(6), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5, 0.0])  # best first: 1, 4, 2, 0, 5, 3


def shares(chooser: Sampler, logits: Tensor = LOGITS, draws: int = 4000) -> Tensor:
    return (
        torch.bincount(torch.tensor([chooser.pick(logits) for _ in range(draws)]), minlength=6)
        / draws
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_their_temperature(temperature):
    expected = (LOGITS / temperature).softmax(dim=0)
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert (
        (shares(sampler(temperature=temperature)) - expected).abs() < 4 * deviation + 1e-4
    ).all()


def test_top_k_keeps_the_k_best_in_proportion():
    expected = LOGITS.softmax(dim=0) * torch.tensor([0, 1, 1, 0, 1, 0])
    found = shares(sampler(top_k=3))
    assert found[[0, 3, 5]].sum() == 0
    assert (found - expected / expected.sum()).abs().max() < 0.03
    assert (
        shares(sampler(top_k=2), torch.zeros(6), draws=200).count_nonzero() == 2
    )  # ties do not widen it


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, {1}), (0.4, {1}), (0.5, {1, 4}), (0.95, {0, 1, 2, 4})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    """The probabilities sum, best first, to 0.459, 0.738, 0.907, 0.969, ..."""
    assert set(shares(sampler(top_p=top_p)).nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize(
    "choice", [{"temperature": 0}, {"temperature": 1e-300}, {"top_k": 1}, {"top_p": 1e-12}]
)
def test_every_way_to_be_greedy_takes_the_best(choice):
    chooser = sampler(**choice)
    assert {chooser.pick(LOGITS) for _ in range(50)} == {1}


def gapped_tokenizer() -> ByteLevelTokenizer:
    """Two letters, a number that stands for nothing, the end of a document, and a control token."""
    special = {"<|endoftext|>": 3, "<|control|>": 5}
    return ByteLevelTokenizer(
        tiktoken.Encoding(
            "gapped", pat_str=".", mergeable_ranks={b"a": 0, b"b": 1}, special_tokens=special
        )
    )


def test_only_text_and_the_end_of_a_document_may_be_written():
    assert allowed_tokens(gapped_tokenizer()).tolist() == [0, 1, 3]
    assert allowed_tokens(BYTES).tolist() == list(range(257))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_and_gaps_are_never_sampled_however_likely(temperature):
    logits = torch.tensor([0.0, 1.0, 90.0, -5.0, 90.0, 90.0, 90.0, 90.0])

    def forward(tokens: Tensor, cache: KeyValueCache) -> Tensor:
        cache.length += tokens.shape[1]
        return logits.expand(1, tokens.shape[1], -1)

    keywords = {"sequence_length": 64, "max_new_tokens": 60, "temperature": temperature}
    (text,) = generate(forward, gapped_tokenizer(), ["a"], **keywords)
    assert text
    assert set(text) <= {"a", "b"}


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_temperatures_out_of_range_are_refused(temperature):
    with pytest.raises(ValueError, match="need temperature >= 0"):
        sampler(temperature=temperature)


@pytest.mark.parametrize("choice", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_truncations_out_of_range_are_refused(choice):
    with pytest.raises(ValueError, match=r"top_k >= 1 \(or None\) and 0 < top_p <= 1"):
        sampler(**choice)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(spoilt):
    with pytest.raises(ValueError, match="not finite"):
        greedy(lambda tokens, cache: torch.full((1, 1, 384), spoilt), "a", limit=1)


# -------------------------------------------------------------------------------- a run's tokenizer


def run_config(path: object, **keys: object) -> MegagptConfig:
    document = {
        "model": {**SHAPE, **keys},
        "data": {"path": str(path)},
        "training": {"total_steps": 1},
    }
    return MegagptConfig.model_validate(document)


def test_the_tokenizer_of_a_run_is_that_of_its_data(tmp_path):
    store_tokenizer("bytes", tmp_path, list)
    assert open_tokenizer(run_config(tmp_path), tmp_path).encode("hé") == [*"hé".encode()]


def test_a_tokenizer_that_is_missing_or_too_large_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        open_tokenizer(run_config(tmp_path), tmp_path)
    store_tokenizer("bytes", tmp_path, list)
    with pytest.raises(UserError, match=r"found 257 tokens, need at most 256"):
        open_tokenizer(run_config(tmp_path, vocab_size=256), tmp_path)
