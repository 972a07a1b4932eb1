"""Byte-level BPE as tiktoken runs it: published by OpenAI, plain bytes, or trained on a corpus.

It is stored with the data as `tokenizer.json`, in Hugging Face's format, so other tools read it
too. Training and generation use tiktoken, which splits and merges the same way at several times the
speed. The ids of an encoding are the model's: bytes and merged tokens first, special tokens after
them. Every encoding has `<|endoftext|>` to end a document.

tiktoken and tokenizers are imported where they are used: naming a tokenizer on a command line needs
neither.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megagpt.data.manifest import TOKENIZER_FILE
from megagpt.data.marked_text import END, MARK, MARKED_GPT2_PATTERN, can_be_marked, encode_marked
from megagpt.utils import MIB, UserError, human_count, write_atomically

if TYPE_CHECKING:
    import tiktoken

END_OF_DOCUMENT = "<|endoftext|>"
PUBLISHED_NAMES = ("gpt2", "cl100k_base", "o200k_base")
SMALLEST_VOCABULARY = 257  # every byte and the end of a document

# How GPT-2 splits a text before merging: github.com/openai/gpt-2, src/encoder.py.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's way to write the same split for gpt2: tiktoken_ext/openai_public.py.
TIKTOKEN_GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
# And the one that tiktoken runs fastest: 18.5 MB/s, the two others 14.3 (on Python's sources).
FASTEST_GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)
FASTEST_PATTERN_OF = dict.fromkeys((GPT2_PATTERN, TIKTOKEN_GPT2_PATTERN), FASTEST_GPT2_PATTERN)
LONGEST_WORD = 1024  # characters, in training
LONG_WORD_CHARACTERS = MIB  # of words that are longer, in training
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_WORD + 1}}}")
# Letters, digits, white space or anything else, as GPT2_PATTERN takes them together.
_LONG_WORD = re.compile(
    "|".join(rf"{kind}{{{LONGEST_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"[^\w\s]"))
)
# Bytes never merge, so this split only limits how much text is processed at once.
LINE_PATTERN = r"[^\n]*\n|[^\n]+"


class ByteLevelTokenizer:
    """A tiktoken encoding as a `Tokenizer` (megagpt/data/tokenizer.py).

    A text is the bytes of its tokens, one after another, so nothing depends on what comes before.
    """

    start_of_document: tuple[int, ...] = ()
    unknown: int | None = None  # every byte has an id

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocabulary = encoding.n_vocab
        self.end_of_document = encoding.eot_token
        self.prefix = self.end_of_document

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_texts(self, texts: Sequence[str], continues: Sequence[bool]) -> list[np.ndarray]:
        clean = [replace_surrogates(text) for text in texts]
        if self._marked is None:
            return [_ids(self.encoding, text) for text in clean]
        markable = [can_be_marked(text) for text in clean]
        encoded = encode_marked(
            list(compress(clean, markable)),
            partial(_ids, self._marked),
            *map(self._marked.encode_single_token, (MARK, END)),
        )
        rest = iter(encoded)
        return [
            next(rest) if marked else _ids(self.encoding, text)
            for text, marked in zip(clean, markable, strict=True)
        ]

    @cached_property
    def _marked(self) -> tiktoken.Encoding | None:
        """The encoding for marked text, where the split is GPT-2's."""
        encoding = self.encoding
        if encoding._pat_str != FASTEST_GPT2_PATTERN:
            return None
        return _encoding(
            encoding.name, MARKED_GPT2_PATTERN, encoding._mergeable_ranks, encoding._special_tokens
        )

    def encode_with_places(
        self, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return [self._with_places(replace_surrogates(text)) for text in texts]

    def _with_places(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = self.encoding.encode_to_numpy(text, allowed_special="all")
        content = np.frombuffer(text.encode(), np.uint8)
        # Of each byte its character: bytes 10xxxxxx go on with one.
        character = np.cumsum((content & 0xC0) != 0x80) - 1
        ends = np.cumsum(self._length_of_token[ids])
        starts = ends - self._length_of_token[ids]
        return ids, character[starts], character[ends - 1] + 1

    def decode(self, tokens: Sequence[int]) -> str:
        return self.encoding.decode(tokens)

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if piece := decoder.decode(self.encoding.decode_single_token_bytes(token)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    @cached_property
    def text_ids(self) -> list[int]:
        return [
            self.encoding.encode_single_token(value) for value in self.encoding.token_byte_values()
        ]

    def text_bytes(self, tokens: np.ndarray, targets: np.ndarray) -> int:
        return int(self._bytes_of_token[targets].sum())

    @cached_property
    def _bytes_of_token(self) -> np.ndarray:
        """Of a special token, which stands for no text, 0."""
        lengths = np.zeros(self.vocabulary, np.int64)
        for value in self.encoding.token_byte_values():
            lengths[self.encoding.encode_single_token(value)] = len(value)
        return lengths

    @cached_property
    def _length_of_token(self) -> np.ndarray:
        """The bytes that a token stands for, of a special one those of its name."""
        lengths = self._bytes_of_token.copy()
        for name in self.encoding.special_tokens_set:
            lengths[self.encoding.encode_single_token(name)] = len(name.encode())
        return lengths


def _ids(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    return encoding.encode_to_numpy(text, disallowed_special=())


def bytes_only() -> tiktoken.Encoding:
    """Return the encoding of 256 bytes and the end of a document."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return _encoding("bytes", LINE_PATTERN, ranks, {END_OF_DOCUMENT: 256})


def fetch_published(name: str) -> tiktoken.Encoding:
    """Return one of OpenAI's encodings from tiktoken's cache directory, or over the network."""
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    # requests' exceptions are OSErrors; a wrong hash is a ValueError
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {name}: tiktoken cannot fetch it ({type(error).__name__}: {error}). Set "
            "TIKTOKEN_CACHE_DIR to the cache of a machine that has it, or train one on the data "
            "with --tokenizer bpe:8192"
        ) from error


def train_byte_level_bpe(
    documents: Iterable[str],
    vocabulary_size: int,
    report: Callable[[str], None] = lambda line: None,
) -> tiktoken.Encoding:
    """Train a byte-level BPE with GPT-2's pattern; show bars on a terminal.

    It has `vocabulary_size` tokens, or fewer if the text has no more pairs. The same documents
    in the same order give the same vocabulary.
    """
    from tokenizers import trainers

    def texts() -> Iterator[str]:
        characters = 0
        words = LongWords()
        for document in documents:
            characters += len(document)
            yield from map(replace_surrogates, words.cut(document))
        report(
            f"training a tokenizer of {vocabulary_size} tokens on {human_count(characters)} "
            f"characters{words.description()}"
        )

    tokenizer = _byte_level_tokenizer({}, [], GPT2_PATTERN)
    alphabet = sorted(_BYTE_OF_CHARACTER)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 1,
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts(), trainer)
    ranks = {_token_bytes(token): rank for token, rank in tokenizer.get_vocab().items()}
    return _encoding(f"bpe:{vocabulary_size}", GPT2_PATTERN, ranks, {END_OF_DOCUMENT: len(ranks)})


class LongWords:
    """Cut words of more than 1,024 characters, such as DNA or a run of spaces, for training.

    The trainer's time grows with the square of a word's length. Such words hardly repeat, so a
    part of them teaches the same pairs as all of them. Encoding needs no cut.
    """

    def __init__(self) -> None:
        self._used = 0  # characters of long words
        self._left_out = 0

    def cut(self, text: str) -> Iterator[str]:
        """Yield the text; where it has long words, in parts between which nothing merges."""
        if max(map(len, text.split()), default=0) <= LONGEST_WORD and not _LONG_SPACE.search(text):
            yield text
            return
        done = 0
        for match in _LONG_WORD.finditer(text):
            yield text[done : match.start()]
            done = match.end()
            for start in range(match.start(), done, LONGEST_WORD):
                part = text[start : min(start + LONGEST_WORD, done)]
                if self._used < LONG_WORD_CHARACTERS:
                    self._used += len(part)
                    yield part
                else:
                    self._left_out += len(part)
        yield text[done:]

    def description(self) -> str:
        """Return what was cut, for the end of a line; nothing if nothing was."""
        if not self._used:
            return ""
        left_out = f", {human_count(self._left_out)} of them not used" if self._left_out else ""
        return (
            f"; {human_count(self._used + self._left_out)} of them in runs without a break, cut "
            f"every {LONGEST_WORD}{left_out}"
        )


def replace_surrogates(text: str) -> str:
    """Return `text` with lone surrogates replaced, so that it can be encoded as UTF-8.

    A JSON string may hold `\\ud800`.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def save_encoding(encoding: tiktoken.Encoding, directory: Path) -> None:
    """Write `encoding` as `directory/tokenizer.json`; Hugging Face `tokenizers` gives the same ids.

    tiktoken merges any two neighbours that form a token, lowest id first. Hugging Face merges
    listed pairs only, first listed first. So we list every split of every token, in the order
    of the tokens' ids. tiktoken also takes a piece that is a token without merging it: Hugging
    Face's `ignore_merges`.
    """
    # Encoding has no public access to pattern and merges; these names exist since tiktoken 0.1.
    ranks = encoding._mergeable_ranks
    special_tokens = encoding._special_tokens
    vocabulary = {_token_text(token): rank for token, rank in ranks.items()} | special_tokens
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [split for token in by_rank for split in _splits(token, ranks)]
    tokenizer = _byte_level_tokenizer(vocabulary, merges, _portable(encoding._pat_str))
    tokenizer.add_special_tokens(list(special_tokens))
    write_atomically(directory / TOKENIZER_FILE, tokenizer.to_str())


def load_encoding(directory: Path) -> tiktoken.Encoding:
    """Return the encoding stored as `tokenizer.json` in a directory; never uses the network.

    Raises UserError if the file is missing or is not a byte-level BPE as `save_encoding`
    writes it.
    """
    path = Path(directory) / TOKENIZER_FILE
    try:
        content = json.loads(path.read_bytes())
        special_tokens = {token["content"]: token["id"] for token in content["added_tokens"]}
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        vocabulary = content["model"]["vocab"]
        ranks = {
            _token_bytes(token): rank
            for token, rank in vocabulary.items()
            if token not in special_tokens
        }
    except FileNotFoundError:
        raise UserError(
            f"{path}: no tokenizer here; prepare the dataset with launch/download_data.py"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path}: not a byte-level BPE written by launch/download_data.py "
            f"({type(error).__name__}: {error}); prepare the dataset again, with --force"
        ) from error
    if END_OF_DOCUMENT not in special_tokens:
        raise UserError(
            f"{path}: no {END_OF_DOCUMENT} among its added tokens; prepare the dataset again, "
            f"with --force"
        )
    return _encoding(str(path), FASTEST_PATTERN_OF.get(pattern, pattern), ranks, special_tokens)


def _encoding(
    name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]
) -> tiktoken.Encoding:
    import tiktoken

    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def _byte_level_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], pattern: str):  # type: ignore[no-untyped-def]
    """Return a Hugging Face tokenizer: split by `pattern`, bytes to characters, merge."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _portable(pattern: str) -> str:
    """Return `pattern` without possessive intervals.

    Hugging Face reads them as repeated intervals. The result is equal for cl100k_base's
    `\\p{N}{1,3}+`: nothing that follows in its alternative could make it give back.
    """
    return re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern)


def _splits(token: bytes, ranks: dict[bytes, int]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(token)):
        if token[:cut] in ranks and token[cut:] in ranks:
            yield _token_text(token[:cut]), _token_text(token[cut:])


def _character_of_byte() -> dict[int, str]:
    """Return GPT-2's printable character for each byte; printable bytes stand for themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


_CHARACTER_OF_BYTE = _character_of_byte()
_BYTE_OF_CHARACTER = {character: byte for byte, character in _CHARACTER_OF_BYTE.items()}


def _token_text(token: bytes) -> str:
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in token)


def _token_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def is_byte_level(token: str) -> bool:
    """Return whether each character of a token stands for a byte."""
    return all(character in _BYTE_OF_CHARACTER for character in token)
