"""The stored tokenizer: one file, the same ids through tiktoken and through Hugging Face
tokenizers.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data import byte_level_bpe, marked_text, tokenizer
from megagpt.utils import UserError

CORPUS = [
    Path(byte_level_bpe.__file__).read_text(),
    "naïve café, Ελληνικά, 日本語のテキスト, العربية, 한국어 🙂🙂👩‍👩‍👧 e\u0301 it's we'll they've "
    * 20,
    "aaa aaaa aaaaaaa 0000000 --------- \t\t\n\n\n    \r\n " * 40,
]
PIECES = [
    "def f(x):\n\treturn x",
    "  \n\n\t ",
    "it's",
    "🙂👩‍👩‍👧",
    "aaaaaaa",
    "日本語",
    "12345",
    " ",
    "\r\n",
    "\u00a0",
    "é",
    "--",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_level_bpe.save_encoding(byte_level_bpe.train_byte_level_bpe(CORPUS, 600), directory)
    return directory


@pytest.fixture(scope="module")
def both(stored):
    return byte_level_bpe.load_encoding(stored), tokenizers.Tokenizer.from_file(
        str(stored / "tokenizer.json")
    )


def ids_without_special_tokens(hugging_face: tokenizers.Tokenizer, text: str) -> list[int]:
    hugging_face.encode_special_tokens = (
        True  # reads "<|endoftext|>" in a text as text, as encode_ordinary does
    )
    return hugging_face.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", CORPUS + PIECES)
def test_ids_equal_those_of_hugging_face(both, text):
    encoding, hugging_face = both
    ids = encoding.encode_ordinary(text)
    assert ids == ids_without_special_tokens(hugging_face, text)
    assert encoding.decode(ids) == text


@settings(deadline=None)
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=20), max_size=12).map("".join))
def test_ids_equal_those_of_hugging_face_on_any_text(both, text):
    encoding, hugging_face = both
    assert encoding.encode_ordinary(text) == ids_without_special_tokens(hugging_face, text)
    assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.fixture(scope="module")
def periodic(tmp_path_factory):
    directory = tmp_path_factory.mktemp("periodic")
    corpus = ["aabab" * 9 + "a" * 11, "abaaabb" * 7, "b" * 13]
    byte_level_bpe.save_encoding(byte_level_bpe.train_byte_level_bpe(corpus, 290), directory)
    return byte_level_bpe.load_encoding(directory), tokenizers.Tokenizer.from_file(
        str(directory / "tokenizer.json")
    )


@settings(deadline=None)
@given(text=st.text(alphabet="ab", max_size=60))
def test_ids_equal_on_periodic_text(periodic, text):
    """Runs of one letter are where another order among equal merges would show."""
    encoding, hugging_face = periodic
    assert encoding.encode_ordinary(text) == ids_without_special_tokens(hugging_face, text)


def test_training_is_deterministic_across_processes():
    """Another process has other hash seeds; the fingerprint of a prepared corpus must not depend
    on them.
    """
    code = (
        "from megagpt.data import byte_level_bpe; import hashlib;"
        "e = byte_level_bpe.train_byte_level_bpe([open(byte_level_bpe.__file__).read()], 500);"
        "print(hashlib.sha256(repr(sorted(e._mergeable_ranks.items())).encode()).hexdigest())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1


def test_end_of_document_is_the_last_id_and_never_comes_from_text(both):
    encoding, _ = both
    assert encoding.eot_token == encoding.n_vocab - 1
    assert encoding.eot_token not in encoding.encode_ordinary("a<|endoftext|>b")


def test_bytes_are_their_own_ids(tmp_path):
    tokenizer.store_tokenizer("bytes", tmp_path, list)
    encoding = byte_level_bpe.load_encoding(tmp_path)
    text = "héllo\n\nwörld 🙂"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert (encoding.eot_token, encoding.n_vocab) == (256, 257)


def test_a_small_corpus_gives_a_smaller_vocabulary():
    encoding = byte_level_bpe.train_byte_level_bpe(["abab"], 8192)
    assert encoding.n_vocab < 300
    assert encoding.eot_token == encoding.n_vocab - 1


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_published_encodings_are_stored_and_read_back(name, tmp_path, monkeypatch, both):
    """tiktoken's own pattern and special tokens with a small merge table: the real one needs the
    network.
    """
    ranks = both[0]._mergeable_ranks
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    published = byte_level_bpe.fetch_published(name)
    byte_level_bpe.save_encoding(published, tmp_path)
    loaded = byte_level_bpe.load_encoding(tmp_path)
    hugging_face = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (loaded.n_vocab, loaded.eot_token) == (published.n_vocab, published.eot_token)
    for text in CORPUS + PIECES:
        assert loaded.encode_ordinary(text) == published.encode_ordinary(text)
        assert loaded.encode_ordinary(text) == ids_without_special_tokens(hugging_face, text)


def test_unreachable_network_says_what_to_type(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    with pytest.raises(UserError, match=r"gpt2.*no route to host.*TIKTOKEN_CACHE_DIR.*bpe:8192"):
        byte_level_bpe.fetch_published("gpt2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gtp2", 'did you mean "gpt2"'),
        ("bpe:100", "at least 257"),
        ("bpe:", "unknown"),
        ("../x", "unknown"),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        tokenizer.parse_tokenizer_name(name)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\x80\x04.", b'{"added_tokens": []}'])
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json.*--force"):
        byte_level_bpe.load_encoding(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        byte_level_bpe.load_encoding(tmp_path)


def test_lone_surrogates_are_replaced():
    assert byte_level_bpe.replace_surrogates("a\ud800b🙂") == "a\ufffdb🙂"


@settings(deadline=None)
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=20), max_size=12).map("".join))
def test_the_fastest_pattern_splits_as_gpt2_s(both, text):
    """The loaded encoding has it; tiktoken's own for gpt2 and GPT-2's give the same ids."""
    loaded, _ = both
    assert loaded._pat_str == byte_level_bpe.FASTEST_GPT2_PATTERN
    for pattern in (byte_level_bpe.GPT2_PATTERN, byte_level_bpe.TIKTOKEN_GPT2_PATTERN):
        other = tiktoken.Encoding(
            "other",
            pat_str=pattern,
            mergeable_ranks=loaded._mergeable_ranks,
            special_tokens=loaded._special_tokens,
        )
        assert other.encode_ordinary(text) == loaded.encode_ordinary(text)


SPACES = [" ", "\t", "\n", "\r", "\v", "\f", "\x1c", "\x85", "\xa0", "\u2003", "\u3000"]
MARKS = [marked_text.MARK, marked_text.END]
AWKWARD = st.sampled_from([*SPACES[:4] * 3, *SPACES, *MARKS, *"a9_'é", "'s", "word", "🙂"])


@settings(deadline=None)
@given(texts=st.lists(st.lists(AWKWARD, max_size=12).map("".join), max_size=5))
def test_marked_texts_split_as_gpt2_s(both, texts):
    """Many texts at once give the ids that tiktoken gives each of them."""
    loaded, _ = both
    tokenizer = byte_level_bpe.ByteLevelTokenizer(loaded)
    assert tokenizer._marked is not None
    found = [ids.tolist() for ids in tokenizer.encode_texts(texts, [False] * len(texts))]
    assert found == [loaded.encode_ordinary(text) for text in texts]


def test_which_texts_can_be_marked():
    """White space of one byte is what the marks know; the rest is encoded without them."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        known = character in "\t\n\v\f\r " or not re.match(r"\s", character)
        python_only = character in "\x1c\x1d\x1e\x1f"  # white space to Python, not to Unicode
        expected = (known or python_only) and character not in MARKS
        assert marked_text.can_be_marked(character) == expected, hex(code)


def test_the_pattern_of_gpt2_is_tiktoken_s():
    assert tiktoken_ext.openai_public.r50k_pat_str == byte_level_bpe.TIKTOKEN_GPT2_PATTERN


# Text without breaks, for training


LONG_RUNS = ["ACGT" * 1000, " " * 5000, "5" * 3000, "#" * 3000, "a" * 1025]


@pytest.mark.parametrize("run", LONG_RUNS, ids=lambda run: run[:4])
def test_a_long_word_is_cut_for_training(run):
    text = f"before it\n{run}\nafter it, " + "more words\n" * 10
    parts = list(byte_level_bpe.LongWords().cut(text))
    assert "".join(parts) == text
    assert (
        max(max(map(len, part.split()), default=0) for part in parts) <= byte_level_bpe.LONGEST_WORD
    )
    assert all(len(part) <= byte_level_bpe.LONGEST_WORD for part in parts[1:-1])


@pytest.mark.parametrize(
    "text", ["a" * 1024, "word, " * 5000, "a1" * 3000, " " * 1024 + "x", "an(d);" * 900, ""]
)
def test_words_that_are_not_long_stay_as_they_are(text):
    """A run without white space may still be of short words, as minified code is."""
    assert "".join(byte_level_bpe.LongWords().cut(text)) == text
    whole = byte_level_bpe.train_byte_level_bpe([text], 300)
    assert len(list(byte_level_bpe.LongWords().cut(text))) <= 1 + (" " not in text)
    assert whole._mergeable_ranks == _trained_without_cuts([text], 300)


def _trained_without_cuts(documents, size):
    """The same training by Hugging Face's own calls."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=sorted(byte_level_bpe._BYTE_OF_CHARACTER),
        show_progress=False,
    )
    trained.train_from_iterator(documents, trainer)
    return {
        bytes(byte_level_bpe._BYTE_OF_CHARACTER[c] for c in token): rank
        for token, rank in trained.get_vocab().items()
    }


def test_only_a_part_of_long_words_is_used_and_said(monkeypatch):
    monkeypatch.setattr(byte_level_bpe, "LONG_WORD_CHARACTERS", 4000)
    said = []
    encoding = byte_level_bpe.train_byte_level_bpe(["ACGT" * 5000], 300, said.append)
    assert said == [
        "training a tokenizer of 300 tokens on 20k characters; 20k of them in runs without a "
        "break, cut every 1024, 15.9k of them not used"
    ]
    assert len(encoding.encode_ordinary("ACGT" * 5000)) < 500
    assert encoding.decode(encoding.encode_ordinary("ACGT" * 500)) == "ACGT" * 500
