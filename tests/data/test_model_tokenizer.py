"""Tokenizers of open models; the reference is transformers, offline, on the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megagpt.data.corpora import TextPiece
from megagpt.data.encoding_pool import EncodedPiece, encode_batch
from megagpt.data.model_tokenizer.encoding import ModelTokenizer
from megagpt.data.tokenizer import load_tokenizer, parse_tokenizer_name, store_tokenizer
from megagpt.utils import UserError
from tests import REPOSITORY
from tests.data.model_tokenizers import CORPUS, KINDS, write_tokenizer

HOSTILE = [
    *CORPUS,
    "",
    " ",
    "\n",
    "\n\n\n\nx\r\n\r\ny",
    "  two spaces before and after  ",
    "\x00\x01\x1b[31m\x7f\x85\u2028\ufeff\u200b\u202ertl\u00a0",
    "🙂👩‍👩‍👧🏳️‍🌈🇩🇪👋🏽",
    "e\u0301 é ﬁ ① \uff21 \u017f İ \u1e9b\u0323 각 \u1100\u1161\u11a8",
    "日本語 العربية हिन्दी ไทย አማርኛ ქართული 𒀀 \U0001d518 \U0010ffff",
    "a" * 3000 + "日" * 500,
    "x\ty  z   w    v\t\t\n",
    "▁under ▁▁ ĠĊ <0x0A><0xE2> ##ing \ufffd",
    "12345678 1,234.5 ½ ٣",
]
NAMES_OF_SPECIAL_TOKENS = [
    "a<|end_of_text|>b<|begin_of_text|><|eot_id|>",
    "</s><s> <unk> </s>x",
    "[SEP] [CLS]x[PAD]",
    "one<|endoftext|>two",
]
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=20), max_size=4).map("".join)


class Both:
    """Ours, and transformers' own on the same files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        loaded = load_tokenizer(directory)
        assert isinstance(loaded, ModelTokenizer)
        self.ours = loaded
        self.theirs = AutoTokenizer.from_pretrained(directory)

    def their_ids(self, text: str, **options: Any) -> list[int]:
        return self.theirs(text, add_special_tokens=False, **options)["input_ids"]

    def their_text(self, ids: list[int]) -> str:
        return self.theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(write_tokenizer(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model") / "small-llama", "llama2")


# ------------------------------------------------------------------------------- text and its ids


def assert_same(both: Both, text: str) -> None:
    ids = both.ours.encode(text)
    assert ids == both.their_ids(text)
    assert both.ours.decode(ids) == both.their_text(ids) == "".join(both.ours.decode_stream(ids))


def test_ids_and_text_equal_those_of_transformers(both: Both) -> None:
    for text in HOSTILE:
        assert_same(both, text)


@settings(deadline=None, max_examples=40)
@given(text=TEXTS)
def test_ids_and_text_equal_those_of_transformers_on_any_text(both: Both, text: str) -> None:
    assert_same(both, text)


def test_names_of_special_tokens_in_a_text_are_text(both: Both) -> None:
    for text in NAMES_OF_SPECIAL_TOKENS:
        ids = both.ours.encode(text)
        assert not set(ids) & (both.ours._special - {both.ours.unknown})
        theirs = both.their_ids(text, split_special_tokens=True)
        if not set(theirs) & (both.ours._special - {both.ours.unknown}):
            assert ids == theirs
        assert both.ours.decode(ids) == both.their_text(ids)


def test_a_vocabulary_with_the_end_as_a_piece_gives_its_characters(tmp_path: Path) -> None:
    """Transformers itself then ends the document, also with `split_special_tokens`."""
    both = Both(write_tokenizer(tmp_path, "unigram"))
    end = both.theirs.eos_token_id
    assert end in both.their_ids("x</s>", split_special_tokens=True)
    assert end not in both.ours.encode("x</s>")
    assert both.ours.encode("x</s>")[:2] == both.their_ids("x</s>", split_special_tokens=True)[:2]


def test_vocabulary_and_special_tokens_are_those_of_transformers(both: Both) -> None:
    assert both.ours.vocabulary == max(both.theirs.get_vocab().values()) + 1
    assert both.ours.end_of_document == both.theirs.eos_token_id
    with_special = both.theirs("a")["input_ids"]
    start = list(both.ours.start_of_document)
    assert with_special[: len(start) + 1] == [*start, both.ours.encode("a")[0]]
    assert not set(both.ours.text_ids) & set(both.theirs.all_special_ids)


# ------------------------------------------------------------------------------------- streaming


@settings(deadline=None, max_examples=60)
@given(numbers=st.lists(st.integers(0, 10**6), max_size=14), mostly_bytes=st.booleans())
def test_any_ids_stream_as_the_text_that_transformers_gives(
    both: Both, numbers: list[int], mostly_bytes: bool
) -> None:
    """Halves of characters, bytes that are no text, spaces at either end."""
    known = sorted(both.ours._byte_tokens) if mostly_bytes and both.ours._byte_tokens else []
    known = known + both.ours.text_ids[:: 5 if known else 1] + [both.ours.end_of_document]
    ids = [known[number % len(known)] for number in numbers]
    assert "".join(both.ours.decode_stream(ids)) == both.their_text(ids) == both.ours.decode(ids)


def test_text_that_follows_a_prompt_keeps_its_space(both: Both) -> None:
    """A decoder takes away the space of the first token, which is that of the prompt."""
    prompt = [*both.ours.start_of_document, *both.ours.encode("the lazy")]
    whole = [*both.ours.start_of_document, *both.ours.encode("the lazy dog jumps")]
    assert whole[: len(prompt)] == prompt
    assert "".join(both.ours.decode_stream(whole[len(prompt) :], after=prompt)) == " dog jumps"


def test_text_comes_as_soon_as_it_is_certain(both: Both) -> None:
    """After every token of plain words; a character of several tokens comes whole."""
    ids = both.ours.encode("the lazy dog")
    read: list[int] = []

    def counted() -> Iterator[int]:
        for token in ids:
            read.append(token)
            yield token

    for number, _ in enumerate(both.ours.decode_stream(counted()), start=1):
        assert len(read) - number <= 1  # a space before the first word is no text yet
    smile = both.ours.encode("🙂 x")
    assert "\ufffd" not in "".join(both.ours.decode_stream(smile))


# ---------------------------------------------------------------------------- pieces of documents


def test_pieces_of_a_document_have_the_ids_of_the_whole(both: Both) -> None:
    """The space before a text comes once, not at every piece of a large file."""
    lines = [line + "\n" for text in CORPUS for line in text.split("\n") if line.strip()]
    lines = [line for line in lines if not line[0].isspace()]  # where text_pieces cuts
    found = both.ours.encode_texts(lines, [False] + [True] * (len(lines) - 1))
    whole = both.ours.encode("".join(lines))
    assert np.concatenate(found).tolist() == whole
    assert all(tokens.dtype == np.uint32 for tokens in found)


def test_documents_begin_and_end_as_the_model_expects(llama2: Path) -> None:
    tokenizer = load_tokenizer(llama2)
    pieces = [
        TextPiece(0, "one\n", starts=True, ends=False),
        TextPiece(0, "two", starts=False, ends=True),
        TextPiece(1, "three </s>"),
        TextPiece(2, ""),
    ]
    batch = [("train", piece) for piece in pieces]
    encoded: list[EncodedPiece] = encode_batch(tokenizer, batch)  # type: ignore[arg-type]
    theirs = AutoTokenizer.from_pretrained(llama2)
    whole = np.concatenate([piece.tokens for piece in encoded]).tolist()
    one, two = theirs("one\ntwo")["input_ids"], theirs("three </s>", split_special_tokens=True)
    assert whole == [*one, theirs.eos_token_id, *two["input_ids"], theirs.eos_token_id]
    assert one[0] == theirs.bos_token_id


def test_lone_surrogates_are_replaced(llama2: Path) -> None:
    tokenizer = load_tokenizer(llama2)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


# ---------------------------------------------------------------------------------- bytes of text


@settings(deadline=None, max_examples=25)
@given(text=TEXTS)
def test_tokens_stand_for_the_bytes_of_their_text(both: Both, text: str) -> None:
    """Of a whole document; where a tokenizer changes the text, of what it reads.

    What it has no id for, no id can count.
    """
    ids = both.ours.encode(text)
    tokens = np.array([both.ours.end_of_document, *both.ours.start_of_document, *ids])
    targets = np.array([*tokens[1:], both.ours.end_of_document])
    expected = both.ours.decode(ids)
    if both.ours._decodes == {"ByteLevel"} and both.ours._plain("a") == both.ours._plain(" a"):
        expected = expected.removeprefix(" ")  # it puts one there itself
    if "\ufffd" not in expected and both.ours.unknown not in ids:
        assert both.ours.text_bytes(tokens, targets) == len(expected.encode())


@pytest.mark.parametrize("kind", ["llama3", "llama2", "mistral", "gemma"])
def test_the_bytes_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, kind))
    for text in CORPUS:
        ids = np.array([*tokenizer.start_of_document, *tokenizer.encode(text)])
        before = np.array([tokenizer.end_of_document, *ids[:-1]])
        assert tokenizer.text_bytes(before, ids) == len(text.encode())


# ------------------------------------------------------------------------------- files and errors


def test_the_files_of_a_model_are_stored_byte_for_byte(llama2: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((llama2 / name).read_bytes())
    for name in ("special_tokens_map.json", "chat_template.jinja", "tokenizer.model"):
        (source / name).write_bytes(b"{}\r\n  ")
    (source / "config.json").write_text("{}")  # the model's, not the tokenizer's
    (source / "code.py").write_text("raise SystemExit\n")
    store_tokenizer(str(source), tmp_path / "data", list)
    stored = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    expected = {path.name: path.read_bytes() for path in source.iterdir()}
    assert stored == {k: v for k, v in expected.items() if k not in ("config.json", "code.py")}


def test_truncation_and_padding_in_the_file_are_not_used(llama2: Path, tmp_path: Path) -> None:
    both = Both(llama2)
    content = json.loads((llama2 / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings_file = (llama2 / "tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(settings_file)
    limited = load_tokenizer(tmp_path)
    texts = ["a", "the quick brown fox"]
    assert [limited.encode(text) for text in texts] == [both.their_ids(text) for text in texts]
    assert limited.start_of_document == both.ours.start_of_document


def test_either_file_of_settings_may_name_the_end(llama2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((llama2 / "tokenizer.json").read_bytes())
    named = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    assert load_tokenizer(tmp_path).end_of_document == 2


REFUSED: dict[str, tuple[str, Any, str]] = {
    "no end": ("tokenizer_config.json", b"{}", r'no eos_token.*\{"eos_token": "</s>"\}'),
    "another end": ("tokenizer_config.json", b'{"eos_token": "<eos>"}', "'<eos>' is not among"),
    "settings cut off": ("tokenizer_config.json", b'{"eos', "tokenizer_config.json: not JSON"),
    "settings of another form": ("tokenizer_config.json", b"[]", "not a JSON object"),
    "cut off": ("tokenizer.json", b'{"version": "1.0"', "tokenizers cannot read it"),
    "a panic": (
        "tokenizer.json",
        {"post_processor": {"special_tokens": {}}},
        "tokenizers cannot read it",
    ),
    "not text": ("tokenizer.json", b"\x80\x04.", "tokenizers cannot read it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_used_are_refused(llama2: Path, tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    for file in llama2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if isinstance(content, dict):
        document = json.loads((tmp_path / name).read_text())
        document["post_processor"] |= content["post_processor"]
        content = json.dumps(document).encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        store_tokenizer(str(tmp_path), tmp_path / "data", list)
    assert str(refused.value).startswith(str(tmp_path / name))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "data").exists()


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json here.*hf download"):
        store_tokenizer(str(tmp_path), tmp_path / "data", list)
    with pytest.raises(UserError, match=r"or a model's directory with tokenizer\.json"):
        parse_tokenizer_name(str(tmp_path / "absent"))


def test_a_sentencepiece_file_is_converted_or_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sentencepiece is not among our requirements; where it is installed its ids are compared."""
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install transformers sentencepiece"):
        store_tokenizer(str(tmp_path), tmp_path / "data", list)
    monkeypatch.delitem(sys.modules, "sentencepiece")
    sentencepiece = pytest.importorskip("sentencepiece")
    with pytest.raises(UserError, match="transformers cannot convert it"):
        store_tokenizer(str(tmp_path), tmp_path / "data", list)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(CORPUS))
    for kind, converts in (("bpe", True), ("unigram", False)):
        sentencepiece.SentencePieceTrainer.train(
            input=str(texts), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400,
            model_type=kind, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        named = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
        if not converts:
            with pytest.raises(UserError, match="other ids than sentencepiece"):
                store_tokenizer(str(tmp_path), tmp_path / kind, list)
            continue
        store_tokenizer(str(tmp_path), tmp_path / kind, list)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        for text in CORPUS:
            assert load_tokenizer(tmp_path / kind).encode(text) == theirs.encode(text)


def test_encoding_starts_no_threads(llama2: Path) -> None:
    """Every worker process would otherwise have one for each core."""
    code = (
        "import os, sys, pathlib\n"
        "from megagpt.data.tokenizer import load_tokenizer\n"
        "tokenizer = load_tokenizer(pathlib.Path(sys.argv[1]))\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "tokenizer.encode_texts(['a long text ' * 50] * 64, [False] * 64)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    started = []
    for parallel in ({}, {"TOKENIZERS_PARALLELISM": "true"}):
        clean = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(llama2)],
            env=clean | {"PYTHONPATH": str(REPOSITORY), "RAYON_NUM_THREADS": "3"} | parallel,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        started.append(int(done.stdout))
    assert started[0] == 0
    assert started[1] > 0  # what the setting is for
