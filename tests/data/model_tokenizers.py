"""Small tokenizers of the kinds that open models have, trained here with Hugging Face's library."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# Llama 3's split: github.com/meta-llama/llama-models, models/llama3/tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's we'll they've 12345 times.\n\n" * 4,
    "naïve café Ελληνικά, Русский текст, 日本語のテキスト, العربية, 한국어, हिन्दी 🙂 e\u0301\n" * 4,
    "def f(x):\n    return x  # comment\n\n\tif x == 1:\n\t\tpass;\n" * 4,
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class Kind(NamedTuple):
    """How a tokenizer is made, and the settings that a model has beside it."""

    make: Callable[[], Tokenizer]
    settings: dict[str, Any]


def write_tokenizer(directory: Path, kind: str) -> Path:
    """Write ``tokenizer.json`` and its settings as a model has them."""
    made = KINDS[kind]
    directory.mkdir(parents=True, exist_ok=True)
    made.make().save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **made.settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return directory


def _byte_level(pre_tokenizer: Any, special: list[str], **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)  # after the text's, as the models have them
    return tokenizer


def llama3() -> Tokenizer:
    """Byte-level BPE with a split of its own, NFC as Qwen, a token before each text."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = _byte_level(split, special, ignore_merges=True)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ")])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    return tokenizer


def qwen() -> Tokenizer:
    """As `llama3` with NFC and nothing before a text."""
    tokenizer = llama3()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def gpt2_with_space() -> Tokenizer:
    """Byte-level BPE that puts a space before a text, as RoBERTa's."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), ["<|endoftext|>"])


def _sentencepiece(*, split: bool = False) -> Tokenizer:
    """BPE over words that begin with the space's character; other characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        special_tokens=["<unk>", "<s>", "</s>", *BYTES],
        initial_alphabet=["▁", *"abcdefghijklmnopqrstuvwxyz"],
        limit_alphabet=60,  # so that most scripts are bytes
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [  # the byte tokens are not added ones in the models' files
        token for token in content["added_tokens"] if token["content"] not in BYTES
    ]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _text_of_pieces(strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def llama2() -> Tokenizer:
    """A space before a text, by its normalizer; bytes for characters without a piece."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = _text_of_pieces(strip=True)
    return tokenizer


def mistral() -> Tokenizer:
    """As `llama2`, with Metaspace in place of the normalizer."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _text_of_pieces(strip=True)
    return tokenizer


def gemma() -> Tokenizer:
    """As `llama2`, with nothing before a text and line breaks as added tokens."""
    tokenizer = _sentencepiece()
    tokenizer.decoder = _text_of_pieces(strip=False)
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in (1, 2, 3)])
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's: lower case, text without a piece is unknown."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """Sentencepiece's other kind, whose vocabulary holds `</s>` as a piece like any other."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = {
    "llama3": Kind(
        llama3,
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": {"__type": "AddedToken", "content": "<|end_of_text|>"},
        },
    ),
    "qwen": Kind(qwen, {"eos_token": "<|end_of_text|>", "add_bos_token": False}),
    "gpt2_with_space": Kind(gpt2_with_space, {"eos_token": "<|endoftext|>"}),
    "llama2": Kind(llama2, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "mistral": Kind(mistral, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}),
    "gemma": Kind(gemma, {"bos_token": "<s>", "eos_token": "</s>"}),
    "wordpiece": Kind(wordpiece, {"eos_token": "[SEP]", "unk_token": "[UNK]"}),
    "unigram": Kind(unigram, {"eos_token": "</s>", "unk_token": "<unk>"}),
}
