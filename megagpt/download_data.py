"""Prepare a dataset: read documents, tokenize them in worker threads, write shards, publish.

`python launch/download_data.py --help` is the command. A run calls `prepare_embedded_corpus`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from kernels.options import count
from megagpt.common.arguments import command_parser, non_negative, user_path, whole_number
from megagpt.data.byte_level_bpe import END_OF_DOCUMENT
from megagpt.data.chat.records import DEFAULT_MESSAGES, ChatRows
from megagpt.data.chat.targets import count as count_targets
from megagpt.data.chat.template import TEMPLATE_FILE, choose_template, default_template
from megagpt.data.columns import DEFAULT_COLUMN
from megagpt.data.corpora import Corpus, open_source
from megagpt.data.encoding_pool import EncodedPiece, batches, encoder
from megagpt.data.integrity import check_file, record_tokenizer
from megagpt.data.manifest import (
    FRACTION_OF_MANY,
    MANIFEST_FILE,
    DatasetManifest,
    Split,
    read_dataset_manifest,
)
from megagpt.data.tokenizer import (
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    Tokenizer,
    describe_tokenizer,
    load_tokenizer,
    parse_tokenizer_name,
    store_tokenizer,
)
from megagpt.data.validation_split import assign_splits
from megagpt.data.writer import (
    PROGRESS_FILE,
    SPLITS,
    ConversationCounts,
    DatasetWriter,
    PreparationProgress,
    exclusive_staging,
    publish,
    read_progress,
    require_space,
)
from megagpt.utils import MIB, UserError, human_count, write_atomically

COMMIT_TOKENS = 16 * MIB  # between commit points: the most that a kill can lose
TRAINING_CHARACTERS = 64 * MIB  # from the beginning of the corpus, to train a BPE on
# of English and code in a BPE of a few thousand tokens; for the first check of free space
TYPICAL_BYTES_PER_TOKEN = 3.0
PLAIN_REPORT_INTERVAL_S = 10.0
EMBEDDED_TOKENIZER = "bpe:4096"
EMBEDDED_VALIDATION_FRACTION = 0.05

Report = Callable[[str], None]


@dataclass(frozen=True)
class PreparationRequest:
    """What to prepare: the options of the command."""

    dataset: str | Sequence[str]  # or several paths, directories and patterns
    output: Path
    tokenizer: str = "bpe:8192"
    config: str | None = None
    split: str = "train"
    column: str = DEFAULT_COLUMN
    separator: str | None = None
    messages: str | None = None  # the column of a conversation; or these two:
    prompt: str | None = None
    answer: str | None = None
    chat_template: str | None = None
    max_length: int | None = None
    skip_bad_rows: int = 0
    validation_fraction: float | None = None
    max_tokens: int | None = None
    shard_tokens: int = 100_000_000
    workers: int = 1
    force: bool = False

    def check(self) -> None:
        """Raise UserError for a value that no preparation can use."""
        parse_tokenizer_name(self.tokenizer)
        if self.output.name in ("", ".."):
            raise UserError(
                f"--output {self.output}: name a directory to make, for example data/NAME"
            )
        if self.validation_fraction is not None and not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"--validation_fraction {self.validation_fraction}: use a number from 0 to below 1"
            )
        if self.skip_bad_rows < 0:
            raise UserError(f"--skip_bad_rows {self.skip_bad_rows}: use a whole number from 0 on")
        if self.separator == "":
            raise UserError("--separator '': name the text between two documents")
        for option in ("max_tokens", "shard_tokens", "workers"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"--{option} {value}: use a whole number above 0")
        self._check_conversations()

    def _check_conversations(self) -> None:
        pair = (self.prompt is not None) + (self.answer is not None)
        if pair == 1:
            given, other = ("prompt", "answer") if self.prompt is not None else ("answer", "prompt")
            raise UserError(f"--{given}: give --{other}, too: the other column of the pair")
        if pair and self.messages is not None:
            raise UserError("--messages: given with --prompt and --answer; keep one of the two")
        for option in () if self.has_conversations else ("chat_template", "max_length"):
            if getattr(self, option) is not None:
                raise UserError(
                    f"--{option}: for conversations only; add --messages, or --prompt and --answer"
                )
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max_length {self.max_length}: use a whole number above 1")
        for option in ("separator", "column") if self.has_conversations else ():
            if getattr(self, option) != getattr(PreparationRequest, option):
                raise UserError(f"--{option}: for text only; leave it out")

    @property
    def has_conversations(self) -> bool:
        """Whether rows hold conversations, not text."""
        return self.messages is not None or self.prompt is not None

    def reader(self) -> str | ChatRows:
        """Return what reads a row: the column of its text, or of its conversation."""
        if not self.has_conversations:
            return self.column
        parsed = parse_tokenizer_name(self.tokenizer)
        directory = parsed if isinstance(parsed, Path) else None
        columns = {"messages": self.messages, "prompt": self.prompt, "answer": self.answer}
        template = choose_template(self.chat_template, directory)
        return ChatRows(template, **{k: v for k, v in columns.items() if v is not None})

    def description(self, source: Corpus, reader: str | ChatRows) -> dict[str, JsonValue]:
        """Return what decides the contents, for the manifest.

        The number of workers does not. That of bad rows to skip does not change what comes before
        them, so a preparation that met one too many continues with a larger number.
        """
        return {
            **source.description,
            "separator": self.separator,
            **describe_tokenizer(self.tokenizer),
            "validation_fraction": self.validation_fraction,
            "max_tokens": self.max_tokens,
            "shard_tokens": self.shard_tokens,
            **self._of_conversations(reader),
        }

    def _of_conversations(self, reader: str | ChatRows) -> dict[str, JsonValue]:
        if isinstance(reader, str):
            return {}
        return {
            "conversations": "messages" if self.messages is not None else "pairs",
            "chat_template": reader.template.sha256,
            "max_length": self.max_length,
        }


def prepare_embedded_corpus(directory: Path) -> None:
    """Make a dataset of the standard library's sources at `directory`, unless one exists.

    Takes a few seconds on one core and needs no network; prints what it does. Several processes
    of one host may call it at once: one prepares, the others wait.
    """
    if not (Path(directory) / MANIFEST_FILE).exists():
        prepare(
            PreparationRequest(
                "stdlib",
                Path(directory),
                tokenizer=EMBEDDED_TOKENIZER,
                validation_fraction=EMBEDDED_VALIDATION_FRACTION,
            ),
            report=print,
        )


def prepare(request: PreparationRequest, report: Report = print) -> DatasetManifest:
    """Prepare the dataset, or continue; an existing dataset with the same contents is kept.

    Raises UserError if another dataset, or anything else, is at the destination: nothing is
    overwritten without `force`.
    """
    request.check()
    reader = request.reader()
    source = open_source(
        request.dataset,
        config=request.config,
        split=request.split,
        column=reader,
        separator=request.separator,
        skip_bad_rows=request.skip_bad_rows,
    )
    description = request.description(source, reader)
    began = time.monotonic()
    with exclusive_staging(request.output) as staging:
        present = _present(request, description)
        if present is not None:
            report(f"{request.output}: already prepared: {present.summary()}")
            return present
        for note in source.notes:
            report(note)
        try:
            manifest = _prepare_staged(request, source, reader, description, staging, report)
        except UserError:
            _discard_unless_committed(staging)
            raise
        publish(request.output)
    report(f"{request.output}: {manifest.summary()}, in {time.monotonic() - began:.1f} s")
    return manifest


def _present(
    request: PreparationRequest, description: dict[str, JsonValue]
) -> DatasetManifest | None:
    """Return the dataset at the destination if it is the requested one.

    None if the destination is free or `force` is set.
    """
    output = request.output
    if not output.exists():
        return None
    if not (output / MANIFEST_FILE).exists():
        raise UserError(
            f"{output}: exists and is not a dataset (no {MANIFEST_FILE}); choose another --output"
        )
    if request.force:
        return None
    manifest = read_dataset_manifest(output)
    differing = [key for key, value in description.items() if manifest.source.get(key) != value]
    if differing:
        raise UserError(
            f"{output}: already holds a dataset that differs in {', '.join(differing)}; choose "
            "another --output, or replace it with --force"
        )
    check_file(output, manifest)
    return manifest


def _prepare_staged(
    request: PreparationRequest,
    source: Corpus,
    reader: str | ChatRows,
    description: dict[str, JsonValue],
    staging: Path,
    report: Report,
) -> DatasetManifest:
    """Fill the staging directory from its last commit point, including the manifest."""
    wanted: dict[str, JsonValue] = {"request": dict(description), "version": source.version}
    progress = _progress(request, wanted, staging, report)
    if (staging / MANIFEST_FILE).exists():
        return read_dataset_manifest(staging)
    if not (staging / TOKENIZER_FILE).exists():
        store_tokenizer(
            request.tokenizer, staging, lambda: _training_texts(source, request), report
        )
    if isinstance(reader, ChatRows):
        _store_template(reader, staging)
        progress.conversations = progress.conversations or ConversationCounts()
        source.skipped_before = progress.conversations.unusable
    tokenizer = load_tokenizer(staging)
    _require_space_for(source, request, tokenizer, staging)
    writer = DatasetWriter(
        staging, progress, vocabulary=tokenizer.vocabulary, shard_tokens=request.shard_tokens
    )
    try:
        _write_all(request, source, writer, staging, report)
    finally:
        writer.close()
    source.require_unchanged()
    for line in (*source.left_out.lines(), *_lines_of(progress.conversations, request)):
        report(line)
    _require_text(request, progress, report)
    unknown = _report_unknown(tokenizer, writer, report)
    return writer.finish(
        tokenizer=record_tokenizer(staging, str(description["tokenizer"])),
        end_of_document=tokenizer.end_of_document,
        source=description | source.left_out.record() | unknown | _record_of(progress),
    )


def _store_template(reader: ChatRows, staging: Path) -> None:
    """Store the chat template with the tokenizer, unless it is the one that this has."""
    if default_template(staging) != reader.template.source:
        write_atomically(staging / TEMPLATE_FILE, reader.template.source)


def _lines_of(counts: ConversationCounts | None, request: PreparationRequest) -> Iterator[str]:
    """Yield what the user must know of conversations: how long they are, and what was cut."""
    if counts is None:
        return
    yield (
        f"{counts.conversations} conversations with {human_count(counts.targets)} tokens to learn "
        f"from; the longest has {counts.longest}, which needs a megagpt.model.sequence_length of "
        f"at least {counts.longest - 1}"
    )
    if counts.cut:
        yield (
            f"{counts.cut} conversations cut to --max_length {request.max_length}: left out "
            f"{human_count(counts.tokens_cut)} tokens, {human_count(counts.targets_cut)} of them "
            "to learn from"
        )


def _record_of(progress: PreparationProgress) -> dict[str, JsonValue]:
    counts = progress.conversations
    return {} if counts is None else {"counts": counts.model_dump(mode="json")}


def _report_unknown(
    tokenizer: Tokenizer, writer: DatasetWriter, report: Report
) -> dict[str, JsonValue]:
    """Count the tokens of text that the tokenizer has no id for, which are lost; say so."""
    if tokenizer.unknown is None:
        return {}
    count = writer.count(tokenizer.unknown)
    if count:
        share = count / sum(map(writer.progress.tokens, SPLITS))
        report(
            f"the tokenizer has no id for some of the text: {count} tokens ({share:.2%}) are its "
            "unknown token"
        )
    return {"unknown_tokens": count}


def _require_text(
    request: PreparationRequest, progress: PreparationProgress, report: Report
) -> None:
    """Raise UserError if there is nothing to train on; say if there is nothing to validate on."""
    if not progress.tokens("train"):
        raise UserError(
            f"{request.output}: no text for training (found "
            f"{progress.tokens('val')} validation tokens); use more text, or a smaller "
            "--validation_fraction"
        )
    if not progress.tokens("val"):
        report(
            f"{request.output}: no text for validation; a run needs --set "
            "megagpt.training.eval_interval_steps=0, or prepare it with more text or a larger "
            "--validation_fraction"
        )


def _progress(
    request: PreparationRequest, wanted: dict[str, JsonValue], staging: Path, report: Report
) -> PreparationProgress:
    """Return where to continue.

    Raises UserError if the unfinished data are of another request; `force` removes them.
    """
    progress = None if request.force else read_progress(staging)
    if progress is None or (progress.request != wanted and not progress.pieces):
        _clear(staging)
        progress = PreparationProgress(request=wanted)
        progress.save(staging)
    elif progress.request != wanted:
        raise UserError(
            f"{staging}: holds the unfinished preparation of other data or with other options; "
            f"give --force to discard it"
        )
    elif progress.pieces:
        done = human_count(sum(map(progress.tokens, SPLITS)))
        report(f"{staging}: continuing after {progress.pieces} pieces of text, {done} tokens")
    return progress


def _discard_unless_committed(staging: Path) -> None:
    """Empty the staging directory if a request fails before its first commit point."""
    try:
        progress = read_progress(staging)
    except UserError:
        return  # damaged: the message names --force, which removes it
    if progress is not None and not progress.pieces:
        _clear(staging)


def _clear(staging: Path) -> None:
    """Empty a staging directory; raise UserError if it has files of another origin."""
    shards = r"(train|val)-\d{5}\.(bin|offsets|targets)"
    names = rf"{shards}|{'|'.join(TOKENIZER_FILES)}|{PROGRESS_FILE}|{MANIFEST_FILE}|\..*\.partial"
    paths = list(staging.iterdir())
    foreign = [path.name for path in paths if not re.fullmatch(names, path.name)]
    if foreign:
        raise UserError(
            f"{staging}: contains {foreign[0]}, which no preparation wrote; move it elsewhere"
        )
    for path in paths:
        path.unlink()


def _training_texts(source: Corpus, request: PreparationRequest) -> Iterator[str]:
    """Yield the training split's text, up to 64 Mi characters of it."""
    characters = 0
    for split, piece in assign_splits(source, request.validation_fraction):
        if split == "train":
            # A chat template writes the end of a document by name, which is no text.
            yield piece.text if piece.answers is None else piece.text.replace(END_OF_DOCUMENT, "")
            characters += len(piece.text)
        if characters >= TRAINING_CHARACTERS:
            return


def _require_space_for(
    source: Corpus, request: PreparationRequest, tokenizer: Tokenizer, staging: Path
) -> None:
    """Raise UserError if the data clearly will not fit; the writer checks again later."""
    bytes_per_token = 1.0 if request.tokenizer == "bytes" else TYPICAL_BYTES_PER_TOKEN
    limits = [request.max_tokens, source.size_bytes and int(source.size_bytes / bytes_per_token)]
    tokens = min((limit for limit in limits if limit is not None), default=0)
    require_space(staging, tokens * (2 if tokenizer.vocabulary <= 2**16 else 4))


def _write_all(
    request: PreparationRequest,
    source: Corpus,
    writer: DatasetWriter,
    staging: Path,
    report: Report,
) -> None:
    """Tokenize and append everything after the commit point.

    Commits every 16 Mi tokens and at the end.
    """
    pieces = writer.progress.pieces
    uncommitted_tokens = 0
    upcoming = batches(assign_splits(source, request.validation_fraction, skip=pieces))
    room = {
        split: limit - writer.progress.tokens(split) for split, limit in _limits(request).items()
    }
    with (
        encoder(
            request.workers,
            staging,
            conversations=request.has_conversations,
            max_length=request.max_length,
        ) as encode,
        _progress_bar(request.max_tokens, writer, report) as refresh,
    ):
        for encoded in encode(upcoming):
            for piece in encoded:
                if piece.conversation is not None:
                    kept = _write_conversation(piece, source, writer, room)
                else:
                    kept = _write_text(piece, writer, room)
                uncommitted_tokens += kept
            pieces += len(encoded)
            refresh()
            if uncommitted_tokens >= COMMIT_TOKENS:
                writer.commit(pieces)
                uncommitted_tokens = 0
            if not any(room.values()):
                break
    writer.commit(pieces)


def _write_text(piece: EncodedPiece, writer: DatasetWriter, room: dict[Split, int]) -> int:
    """Append what fits into `--max_tokens` of a piece of text; return its number of tokens."""
    kept = piece.tokens[: max(room[piece.split], 0)]
    if len(kept):
        writer.write(piece.split, kept, starts_document=piece.starts_document)
    room[piece.split] -= len(kept)
    return len(kept)


def _write_conversation(
    piece: EncodedPiece, source: Corpus, writer: DatasetWriter, room: dict[Split, int]
) -> int:
    """Append a whole conversation, or the last one that fits; return its number of tokens.

    Raises UserError for one too many that --max_length leaves without a target.
    """
    counts, found = writer.progress.conversations, piece.conversation
    assert counts is not None
    assert found is not None
    if not len(found.bounds):
        whole = len(found.ids) + found.tokens_left_out
        source.left_out.bad_row(
            piece.place,
            f"a conversation of {whole} tokens has no token to learn from within its first "
            f"{len(found.ids)} (--max_length)",
        )
        counts.unusable += 1
        return 0
    if len(found.ids) > room[piece.split]:
        room[piece.split] = 0
        return 0
    writer.write(piece.split, found.ids, starts_document=True, bounds=found.bounds)
    room[piece.split] -= len(found.ids)
    counts.conversations += 1
    counts.longest = max(counts.longest, len(found.ids))
    counts.targets += count_targets(found.bounds)
    counts.cut += found.tokens_left_out > 0
    counts.tokens_cut += found.tokens_left_out
    counts.targets_cut += found.targets_left_out
    return len(found.ids)


def _limits(request: PreparationRequest) -> dict[Split, int]:
    """Return the maximum tokens of each split: --max_tokens divided by the fraction."""
    if request.max_tokens is None:
        return {"train": sys.maxsize, "val": sys.maxsize}
    fraction = (
        FRACTION_OF_MANY if request.validation_fraction is None else request.validation_fraction
    )
    val = round(request.max_tokens * fraction)
    return {"train": request.max_tokens - val, "val": val}


@contextmanager
def _progress_bar(
    total_tokens: int | None, writer: DatasetWriter, report: Report
) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal, else a line every ten seconds.

    The yielded function updates it.
    """
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    reported = time.monotonic()
    terminal = sys.stdout.isatty()
    with Bar(*columns, disable=not terminal, transient=True) as bar:
        task = bar.add_task("", total=total_tokens)

        def refresh() -> None:
            nonlocal reported
            tokens = sum(map(writer.progress.tokens, SPLITS))
            bar.update(task, completed=tokens, description=f"{human_count(tokens)} tokens")
            if not terminal and time.monotonic() - reported > PLAIN_REPORT_INTERVAL_S:
                reported = time.monotonic()
                report(f"{human_count(tokens)} tokens")

        yield refresh


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `launch/download_data.py`."""
    options = vars(_parser().parse_args(arguments))
    first, *more = options["dataset"]
    prepare(PreparationRequest(**options | {"dataset": (first, *more) if more else first}))


def _tokenizer_name(text: str) -> str:
    """Parse the name of a tokenizer: `bpe:8k` is `bpe:8000`; a directory may begin with `~`."""
    kind, _, size = text.partition(":")
    number = count(size) if kind == "bpe" else None
    return os.path.expanduser(text) if number is None else f"bpe:{number}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        prog="launch/download_data.py",
        description="Prepare a dataset: tokenize a corpus into a directory that a run reads "
        "(docs/data.md). After an interruption, the same command continues. Nothing is "
        "overwritten without --force.",
    )
    add = parser.add_argument
    add(
        "--dataset",
        nargs="+",
        type=os.path.expanduser,
        required=True,
        help="stdlib (the sources of Python's standard library), a Hugging Face dataset "
        "such as HuggingFaceFW/fineweb-edu, or files, directories and patterns: text, "
        "JSON, CSV, parquet, Arrow, also compressed with gzip, bzip2, xz or zstd",
    )
    add("--output", required=True, type=user_path, help="directory to make, for example data/NAME")
    add(
        "--tokenizer",
        type=_tokenizer_name,
        default="bpe:8192",
        help="gpt2, cl100k_base, o200k_base, bytes, bpe:SIZE trained on this text, or the "
        "directory of an open model with its tokenizer.json [%(default)s]",
    )
    add("--config", help="configuration of a Hugging Face dataset, for example sample-10BT")
    add(
        "--split",
        default="train",
        help="split of a Hugging Face dataset to read [%(default)s]",
    )
    add(
        "--column",
        default=DEFAULT_COLUMN,
        help="column with the text: text, meta.body, messages.content, or a template such as "
        '"{title}\\n\\n{text}" [%(default)s]',
    )
    add("--separator", help="text between two documents of one text file, such as '<|endoftext|>'")
    add(
        "--messages",
        nargs="?",
        const=DEFAULT_MESSAGES,
        metavar="COLUMN",
        help="rows are conversations: a list of {role, content} in this column [messages] "
        "(docs/tuning.md)",
    )
    add("--prompt", metavar="COLUMN", help="rows are pairs: the column of what is asked")
    add("--answer", metavar="COLUMN", help="and that of what the model has to answer")
    add(
        "--chat_template",
        metavar="NAME",
        help="how a conversation becomes text: chatml, llama3, plain, one of the tokenizer's "
        "named ones, or a file of jinja2 [the tokenizer's own]",
    )
    add(
        "--max_length",
        type=whole_number(2),
        metavar="TOKENS",
        help="cut longer conversations, and say how many [whole conversations]",
    )
    add(
        "--skip_bad_rows",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="leave out up to N rows that cannot be read, and name them [%(default)s]",
    )
    add(
        "--validation_fraction",
        type=non_negative,
        help="share of the documents to hold out [0.01; with fewer than twenty documents, the "
        "last 0.1 of the text]",
    )
    add(
        "--max_tokens",
        type=whole_number(1),
        help="stop after this many tokens, training and validation together [all]",
    )
    add(
        "--shard_tokens",
        type=whole_number(1),
        default=PreparationRequest.shard_tokens,
        help="tokens per file [%(default)s]",
    )
    add(
        "--workers",
        type=whole_number(1),
        default=os.cpu_count() or 1,
        help="tokenizer threads [one per core: %(default)s]",
    )
    add(
        "--force",
        action="store_true",
        help="replace a dataset, or an unfinished one, at --output",
    )
    return parser
