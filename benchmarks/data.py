"""Measure the preparation of data: text for each second of processor time, and memory.

    python -m benchmarks.data
    python -m benchmarks.data --model_tokenizer
    python -m benchmarks.data --memory 500 5000 --directory /path/on/the/disk

The text is the sources of Python's standard library in documents of 4,000 characters, as JSON
lines. The contenders take turns on the same file, with the same tokenizer: a BPE of 8,192 tokens
that splits as tiktoken's gpt2 does. They must give the same number of tokens.

* a plain loop: `encode_ordinary_batch` over texts that are in memory, in batches of 1,000. Nothing
  is read and nothing is written.
* `datasets.map` as users write it: nanoGPT's data/openwebtext/prepare.py. It splits and shuffles,
  maps one document a call, and copies the result into a memory map.
* megagpt: all of `launch/download_data.py`, but for the training of the tokenizer.

Seconds are of processor time, with those of worker processes, so they hold on a machine that others
use. A ratio is that of one round; the table has the medians over rounds.

`--model_tokenizer` compares the tokenizer of a model (`--tokenizer DIR`) with Hugging Face
`tokenizers` alone, the library that both use: `encode` and `encode_batch` over texts in memory, to
lists of ids. The tokenizer has the form of Llama 3's, with 8,192 tokens.

`--memory` prepares a file of each of these sizes, in MB, in a process of its own, with the
tokenizer `bytes`, and reports the peak of that process's resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiktoken

from benchmarks.machine import write_table
from megagpt import download_data
from megagpt.common.arguments import command_parser, user_path, whole_number
from megagpt.data.byte_level_bpe import (
    END_OF_DOCUMENT,
    TIKTOKEN_GPT2_PATTERN,
    save_encoding,
    train_byte_level_bpe,
)
from megagpt.data.corpora import open_source
from megagpt.data.model_tokenizer.files import open_backend

DOCUMENT_CHARACTERS = 4000
VOCABULARY = 8192
MAP_SHARDS = 64  # nanoGPT has 1,024 for 8 million documents
PLAIN = "encode_ordinary_batch, a plain loop"
MAP = "datasets.map, as in nanoGPT"
OURS = "megagpt"
LIBRARY = "tokenizers, encode"
LIBRARY_BATCH = "tokenizers, encode_batch"
MB = 10**6


def documents() -> Iterator[str]:
    """Yield documents without end; the standard library's sources come again and again."""
    while True:
        for piece in open_source("stdlib").pieces():
            for start in range(0, len(piece.text), DOCUMENT_CHARACTERS):
                yield piece.text[start : start + DOCUMENT_CHARACTERS]


def write_corpus(path: Path, size: int) -> list[str]:
    """Write JSON lines with at least ``size`` bytes of text; return their texts."""
    texts = []
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in documents():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            texts.append(text)
            written += len(text.encode())
            if written >= size:
                return texts
    raise AssertionError("documents() has no end")


def plain_loop(encoding: tiktoken.Encoding, texts: list[str], workers: int) -> int:
    """Return the number of tokens."""
    count = 0
    for start in range(0, len(texts), 1000):
        batch = encoding.encode_ordinary_batch(texts[start : start + 1000], num_threads=workers)
        count += sum(map(len, batch)) + len(batch)
    return count


def map_as_in_nanogpt(
    encoding: tiktoken.Encoding, path: Path, directory: Path, workers: int
) -> int:
    """Return the number of tokens written to ``train.bin`` and ``test.bin`` of a directory."""
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(directory / "cache")
    )
    splits = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)

    def process(example: dict[str, Any]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    tokenized = splits.map(process, remove_columns=["text"], num_proc=workers)
    written = 0
    for split, rows in tokenized.items():
        length = int(np.sum(rows["len"], dtype=np.uint64))
        file = directory / f"{split}.bin"
        tokens = np.memmap(file, dtype=np.uint16, mode="w+", shape=(length,))
        place = 0
        shards = min(MAP_SHARDS, len(rows))
        for number in range(shards):
            shard = rows.shard(num_shards=shards, index=number, contiguous=True)
            batch = np.concatenate(shard.with_format("numpy")["ids"][:])
            tokens[place : place + len(batch)] = batch
            place += len(batch)
        tokens.flush()
        written += place
    return written


def ours(encoding: tiktoken.Encoding, path: Path, directory: Path, workers: int) -> int:
    """Return the number of tokens written to ``directory/out``."""

    def store(name: str, staging: Path, *_: Any) -> None:
        save_encoding(encoding, staging)

    with mock.patch.object(download_data, "store_tokenizer", store):
        return prepared(path, directory, f"bpe:{VOCABULARY}", workers)


def prepared(path: Path, directory: Path, tokenizer: str, workers: int) -> int:
    """Return the number of tokens written to ``directory/out``."""
    request = download_data.PreparationRequest(
        str(path), directory / "out", tokenizer=tokenizer, workers=workers
    )
    manifest = download_data.prepare(request, report=lambda line: None)
    return manifest.tokens("train") + manifest.tokens("val")


def processor_s() -> float:
    """Return the seconds of processor time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def compare(directory: Path, size: int, rounds: int, workers: int) -> list[dict[str, Any]]:
    """Return a row for each contender."""
    path = directory / "corpus.jsonl"
    texts = write_corpus(path, size)
    megabytes = sum(len(text.encode()) for text in texts) / MB
    trained = train_byte_level_bpe(itertools.islice(documents(), 1000), VOCABULARY)
    encoding = tiktoken.Encoding(
        "as gpt2",
        pat_str=TIKTOKEN_GPT2_PATTERN,
        mergeable_ranks=trained._mergeable_ranks,
        special_tokens=trained._special_tokens,
    )
    contenders: dict[str, Callable[[Path], int]] = {
        PLAIN: lambda _: plain_loop(encoding, texts, workers),
        MAP: lambda place: map_as_in_nanogpt(encoding, path, place, workers),
        OURS: lambda place: ours(encoding, path, place, workers),
    }
    seconds, _ = take_turns(contenders, directory, rounds)
    return [
        {
            "workers": workers,
            "contender": name,
            "text_mb": f"{megabytes:.1f}",
            "mb_per_processor_s": f"{megabytes / statistics.median(spent):.2f}",
            "ratio_to_plain_loop": f"{_ratio(seconds[PLAIN], spent):.2f}",
            "ratio_to_datasets_map": f"{_ratio(seconds[MAP], spent):.2f}",
        }
        for name, spent in seconds.items()
    ]


def compare_model(directory: Path, size: int, rounds: int, workers: int) -> list[dict[str, Any]]:
    """Return a row for each way to use a model's tokenizer."""
    path = directory / "corpus.jsonl"
    texts = write_corpus(path, size)
    model = directory / "model"
    save_encoding(train_byte_level_bpe(itertools.islice(documents(), 1000), VOCABULARY), model)
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_DOCUMENT}))
    library, _ = open_backend(model / "tokenizer.json", None)
    library.encode_special_tokens = True

    def one_by_one(_: Path) -> int:
        return sum(len(library.encode(text, add_special_tokens=False).ids) + 1 for text in texts)

    def in_batches(_: Path) -> int:
        count = 0
        for start in range(0, len(texts), 1000):
            batch = library.encode_batch(texts[start : start + 1000], add_special_tokens=False)
            count += sum(len(encoding.ids) + 1 for encoding in batch)
        return count

    contenders = {
        LIBRARY: one_by_one,
        LIBRARY_BATCH: in_batches,
        OURS: lambda place: prepared(path, place, str(model), workers),
    }
    with mock.patch.dict(os.environ, {"TOKENIZERS_PARALLELISM": "false"}):
        seconds, tokens = take_turns(contenders, directory, rounds)
    return [
        {
            "workers": workers,
            "contender": name,
            "tokens": tokens,
            "tokens_per_processor_s": round(tokens / statistics.median(spent)),
            "ratio_to_encode_batch": f"{_ratio(seconds[LIBRARY_BATCH], spent):.2f}",
        }
        for name, spent in seconds.items()
    ]


def take_turns(
    contenders: dict[str, Callable[[Path], int]], directory: Path, rounds: int
) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of each contender in each round, and the number of tokens."""
    seconds: dict[str, list[float]] = defaultdict(list)
    counts: set[int] = set()
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            with tempfile.TemporaryDirectory(dir=directory) as place:
                begun = processor_s()
                counts.add(contender(Path(place)))
                if turn > 0:  # the first one warms up
                    seconds[name].append(processor_s() - begun)
        if len(counts) != 1:
            raise AssertionError(f"the contenders do not give the same tokens: {counts}")
    return seconds, counts.pop()


def _ratio(theirs: list[float], spent: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, spent, strict=True))


def memory(directory: Path, megabytes: int) -> dict[str, Any]:
    """Prepare a file of a size in a process of its own; return a row with its peak."""
    path = directory / "large.jsonl"
    piece = directory / "piece.jsonl"
    write_corpus(piece, min(megabytes, 20) * MB)
    content = piece.read_bytes()
    with path.open("wb") as file:
        for _ in range(-(-megabytes * MB // len(content))):
            file.write(content)
    command = [sys.executable, "-m", "benchmarks.data", "--prepare", str(path)]
    begun = processor_s()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    spent = processor_s() - begun
    size = path.stat().st_size / MB
    path.unlink()
    shutil.rmtree(directory / "large.out")
    return {
        "text_mb": f"{size:.1f}",
        "mb_per_processor_s": f"{size / spent:.2f}",
        "peak_memory_mib": f"{int(done.stdout.split()[-1]) / 1024:.0f}",
    }


def prepare_and_print_peak(path: Path) -> None:
    """Prepare a file with the tokenizer `bytes`; print the peak of the resident memory, in KiB."""
    download_data.prepare(
        download_data.PreparationRequest(str(path), path.with_suffix(".out"), "bytes", workers=1)
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = command_parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=whole_number(1), default=32, help="text for the comparison"
    )
    parser.add_argument("--rounds", type=whole_number(1), default=5)
    parser.add_argument("--workers", type=whole_number(1), nargs="+", default=[1])
    parser.add_argument("--model_tokenizer", action="store_true", help="only that of a model")
    parser.add_argument(
        "--memory", type=whole_number(1), nargs="+", help="only the memory at these sizes, MB"
    )
    parser.add_argument("--prepare", type=user_path, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=user_path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare_and_print_peak(arguments.prepare)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        if arguments.memory:
            rows = [memory(Path(name), size) for size in arguments.memory]
            table = "data_memory"
        else:
            run = compare_model if arguments.model_tokenizer else compare
            rows = [
                row
                for workers in arguments.workers
                for row in run(Path(name), arguments.megabytes * MB, arguments.rounds, workers)
            ]
            table = "data_model_tokenizer" if arguments.model_tokenizer else "data"
    write_table(table, "benchmarks.data", rows)
    print(f"load of this machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
