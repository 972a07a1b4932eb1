"""Preparing datasets: sources, splits, interruption, full disks, and nothing overwritten by
accident.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megagpt.data import encoding_pool, text_files
from megagpt.data import writer as dataset_writer
from megagpt.data.byte_level_bpe import train_byte_level_bpe
from megagpt.data.columns import Column
from megagpt.data.corpora import HubDataset, LocalFiles, StandardLibrary, TextPiece, open_source
from megagpt.data.tokenizer import load_tokenizer
from megagpt.data.validation_split import assign_splits
from megagpt.dataset import Dataset, open_dataset, verify
from megagpt.download_data import PreparationRequest, main, prepare, prepare_embedded_corpus
from megagpt.utils import UserError
from tests import REPOSITORY

DOCUMENTS = [
    f"Document {number}: naïve 🙂\n" + f"word{number} " * (number % 7 * 10) for number in range(60)
]


def write_jsonl(path: Path, documents=DOCUMENTS, column="text") -> Path:
    path.write_text(
        "".join(json.dumps({column: text, "number": n}) + "\n" for n, text in enumerate(documents))
    )
    return path


def write_text(path: Path, lines=4000) -> Path:
    path.write_text(
        "".join(
            f"line {number} says\n{number * number}\n\n" * (number % 3) for number in range(lines)
        )
    )
    return path


def request(dataset: Path | str, output: Path, **options) -> PreparationRequest:
    return PreparationRequest(str(dataset), output, **{"tokenizer": "bytes", **options})


def quietly(wanted: PreparationRequest) -> Dataset:
    prepare(wanted, report=lambda line: None)
    verify(wanted.output, full=True)
    return open_dataset(wanted.output)


def texts(prepared: Dataset, split: str) -> list[str]:
    """The documents of a split, decoded."""
    if not prepared.manifest.tokens(split):
        return []
    tokenizer, stream = load_tokenizer(prepared.directory), prepared.split(split)
    tokens, numbers = stream.read(0, len(stream)), stream.document_ids(0, len(stream))
    return [tokenizer.decode(tokens[numbers == number].tolist()) for number in np.unique(numbers)]


def ended(documents: list[str]) -> list[str]:
    return [f"{text}<|endoftext|>" for text in documents]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Sources


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_a_column_of_local_files_becomes_documents(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path, row_group_size=7)
    else:
        lines = write_jsonl(tmp_path / "data.jsonl").read_bytes()
        path.write_bytes(zstandard.compress(lines) if suffix == "jsonl.zst" else lines)
    prepared = quietly(request(path, tmp_path / "out", validation_fraction=0.1))
    assert texts(prepared, "val") == ended(DOCUMENTS[::10])
    assert texts(prepared, "train") == ended([text for n, text in enumerate(DOCUMENTS) if n % 10])


def test_a_dataset_s_split_and_rows_are_chosen_as_on_the_hub(tmp_path):
    """A local directory in the hub's layout, through the same arguments as a name on the hub."""
    for split in ("train", "test"):
        table = pyarrow.table({"body": [f"{split} {number}" for number in range(30)]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    source = HubDataset(str(tmp_path), None, "test", Column("body"))
    assert [piece.text for piece in source.pieces()] == [f"test {number}" for number in range(30)]
    assert list(source.pieces(skip=28)) == [TextPiece(28, "test 28"), TextPiece(29, "test 29")]


def test_the_standard_library_is_read_in_one_order_without_its_tests():
    source = open_source("stdlib")
    pieces = list(source.pieces())
    assert isinstance(source, StandardLibrary)
    assert len(pieces) == source.description["files"] > 100
    assert any("class JSONEncoder" in piece.text for piece in pieces)
    assert not any("test" in path.parts or "site-packages" in path.parts for path in source._paths)
    assert list(source.pieces(skip=len(pieces) - 2)) == pieces[-2:]


def test_a_long_text_file_comes_in_pieces_that_tokenise_as_the_whole(tmp_path, monkeypatch):
    path = write_text(tmp_path / "long.txt")
    whole = path.read_bytes().decode()
    monkeypatch.setattr(text_files, "TEXT_BLOCK_BYTES", 1000)
    pieces = list(LocalFiles([str(path)], Column()).pieces())
    encoding = train_byte_level_bpe([whole], 400)
    assert len(pieces) > 50
    assert "".join(piece.text for piece in pieces) == whole
    assert [
        token for piece in pieces for token in encoding.encode_ordinary(piece.text)
    ] == encoding.encode_ordinary(whole)
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_character_cut_by_a_block_survives(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "TEXT_BLOCK_BYTES", 3)
    path = tmp_path / "a.txt"
    path.write_text("aé🙂\nb🙂🙂\nc", encoding="utf-8")
    assert (
        "".join(piece.text for piece in LocalFiles([str(path)], Column()).pieces())
        == "aé🙂\nb🙂🙂\nc"
    )


def test_two_workers_encode_at_the_same_time(tmp_path, monkeypatch):
    """The first batch is not encoded before somebody has the second, too."""
    meeting, encode = threading.Barrier(2, timeout=30), encoding_pool.encode_batch
    numbers = itertools.count()

    def encode_together(tokenizer, batch):
        if next(numbers) < 2:
            meeting.wait()
        return encode(tokenizer, batch)

    monkeypatch.setattr(encoding_pool, "BATCH_PIECES", 1)
    monkeypatch.setattr(encoding_pool, "encode_batch", encode_together)
    path = write_jsonl(tmp_path / "data.jsonl", [f"text {index}" for index in range(6)])
    quietly(request(path, tmp_path / "out", workers=2))
    assert next(numbers) >= 6


def test_workers_change_nothing_but_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding_pool, "BATCH_CHARACTERS", 300)
    path = write_jsonl(tmp_path / "data.jsonl")
    one = quietly(request(path, tmp_path / "one", workers=1, tokenizer="bpe:300"))
    two = quietly(request(path, tmp_path / "two", workers=2, tokenizer="bpe:300"))
    assert one.fingerprint == two.fingerprint


def test_a_text_cannot_end_a_document(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", ["before<|endoftext|>after", "", "next"])
    prepared = quietly(request(path, tmp_path / "out", validation_fraction=0))
    assert texts(prepared, "train") == [
        "before<|endoftext|>after<|endoftext|>",
        "next<|endoftext|>",
    ]
    stream = prepared.split("train")
    assert (stream.read(0, len(stream)) == 256).sum() == 2


# Splits and sizes


def test_few_documents_are_one_text_whose_end_is_held_out(tmp_path):
    path = write_text(tmp_path / "a.txt")
    prepared = quietly(request(path, tmp_path / "out"))
    train, val = texts(prepared, "train"), texts(prepared, "val")
    assert "".join(train + val) == path.read_text() + "<|endoftext|>"
    assert len(val[0]) / len(path.read_text()) == pytest.approx(0.1, abs=0.001)
    assert train[-1].endswith("\n")


@pytest.mark.parametrize("block_bytes", [20, 100, 1000, 10**6])
def test_the_cut_does_not_depend_on_pieces(tmp_path, monkeypatch, block_bytes):
    path = write_text(tmp_path / "a.txt", lines=200)
    source = LocalFiles([str(path)], Column())
    whole = path.read_text()
    monkeypatch.setattr(text_files, "TEXT_BLOCK_BYTES", block_bytes)
    pieces = list(assign_splits(source, 0.3))
    cut = whole.find("\n", round(0.7 * len(whole))) + 1
    for split, text in (("train", whole[:cut]), ("val", whole[cut:])):
        held = [piece for name, piece in pieces if name == split]
        assert "".join(piece.text for piece in held) == text
        assert [piece.starts for piece in held] == [True] + [False] * (len(held) - 1)


def test_few_documents_of_several_files(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n" * 50)
    prepared = quietly(request(tmp_path / "*.txt", tmp_path / "out"))
    assert texts(prepared, "train") == ended([f"{number}\n" * 50 for number in range(9)])
    assert texts(prepared, "val") == ended(["9\n" * 50])


@pytest.mark.parametrize("fraction", [0, 0.005, 0.1, 0.37])
def test_many_documents_are_held_out_at_even_distances(tmp_path, fraction):
    class Many:
        def pieces(self, skip=0):
            return (TextPiece(number, "x") for number in range(skip, 1000))

    splits = [split for split, _ in assign_splits(Many(), fraction)]
    for n in range(1, 1001):
        assert abs(splits[:n].count("val") - n * fraction) < 1
    assert (splits[0] == "val") == (fraction > 0)
    assert [split for split, _ in assign_splits(Many(), fraction, skip=333)] == splits[333:]


def test_max_tokens_is_exact_and_shards_are_cut_at_documents(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    prepared = quietly(
        request(path, tmp_path / "out", max_tokens=3000, shard_tokens=500, validation_fraction=0.1)
    )
    manifest = prepared.manifest
    assert (manifest.tokens("train"), manifest.tokens("val")) == (2700, 300)
    assert len(manifest.shards("train")) > 3
    assert all(500 <= shard.tokens < 1200 for shard in manifest.shards("train")[:-1])


def test_the_manifest_says_what_the_data_are(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", column="body")
    prepared = quietly(request(path, tmp_path / "out", column="body", tokenizer="bpe:300"))
    manifest = prepared.manifest
    assert manifest.source["dataset"] == str(path)
    assert (manifest.source["column"], manifest.source["tokenizer"]) == ("body", "bpe:300")
    assert (manifest.dtype, manifest.vocabulary, manifest.end_of_document) == ("uint16", 300, 299)
    assert names(prepared.directory) == {
        *("manifest.json", "tokenizer.json", "train-00000.bin", "train-00000.offsets"),
        *("val-00000.bin", "val-00000.offsets"),
    }


# Bad input: one line, exit code 2, nothing left behind


BAD_REQUESTS = {
    "no such file": ({"dataset": "none/*.jsonl"}, "no such file; check the pattern"),
    "no such kind": (
        {"dataset": "a/b/c.csv"},
        "a/b/c.csv: no such file; nor a/b",
    ),
    "no such column": (
        {"column": "body"},
        "none of its 60 rows up to here has a text: no column 'body'; choose one with --column: "
        "text, number",
    ),
    "not a text": (
        {"column": "number"},
        r"data\.jsonl:1: column 'number' holds int, not text; choose another with --column",
    ),
    "no such tokenizer": ({"tokenizer": "gpt3"}, 'did you mean "gpt2"'),
    "fraction of one": ({"validation_fraction": 1.0}, "use a number from 0 to below 1"),
    "no workers": ({"workers": 0}, "--workers 0: use a whole number above 0"),
    "no name": ({"output": Path("..")}, r"--output \.\.: name a directory to make"),
    "no tokens": ({"max_tokens": 0}, "--max_tokens 0"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_leave_nothing_behind(tmp_path, name):
    options, message = BAD_REQUESTS[name]
    path = write_jsonl(tmp_path / "data.jsonl")
    with pytest.raises(UserError, match=message):
        quietly(request(**{"dataset": path, "output": tmp_path / "out", **options}))
    assert names(tmp_path) == {"data.jsonl"}


@pytest.mark.parametrize("content", ["", '{"text": ""}\n' * 30, '{"text": null}\n'])
def test_an_empty_corpus_is_refused(tmp_path, content):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"data\.jsonl"):
        quietly(request(tmp_path / "data.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: not JSON .*--skip_bad_rows"):
        quietly(request(tmp_path / "data.jsonl", tmp_path / "out"))


def test_text_in_another_encoding_is_refused_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "TEXT_BLOCK_BYTES", 4)
    (tmp_path / "a.txt").write_bytes("ab🙂 caf".encode() + b"\xe9 au lait")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 10 .*iconv -f LATIN1 -t UTF-8"):
        quietly(request(tmp_path / "a.txt", tmp_path / "out"))


def test_the_command_answers_without_heavy_imports(tmp_path):
    heavy = {"torch", "deepspeed", "datasets", "tokenizers", "tiktoken", "pyarrow"}
    code = (
        f"import sys, megagpt.download_data as d; d._parser(); sys.exit(bool({heavy} & "
        f"set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def run_command_line(*arguments) -> subprocess.CompletedProcess:
    script = str(REPOSITORY / "launch" / "download_data.py")
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command_line(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    options = ("--dataset", path, "--output", tmp_path / "out", "--tokenizer", "bytes")
    done = run_command_line(*options, "--workers", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert "60 documents, vocabulary 257, in" in done.stdout
    again = run_command_line(*options)
    assert (again.returncode, again.stdout.split(": ")[1]) == (0, "already prepared")
    refused = run_command_line(*options, "--max-tokens", 5)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (
        "differs in max_tokens; choose another --output, or replace it with --force"
        in refused.stderr
    )
    assert run_command_line("--help").returncode == 0
    assert run_command_line("--output", "x").returncode == 2


def test_a_pattern_that_the_shell_expanded_is_several_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b"):
        write_text(tmp_path / f"{name}.txt")
    words = ["--tokenizer", "bytes", "--workers", "1", "--dataset"]
    main([*words, "~/a.txt", "~/b.txt", "--output=~/together"])
    main([*words, "~/*.txt", "--output=~/pattern"])
    together, pattern = (open_dataset(tmp_path / name) for name in ("together", "pattern"))
    assert together.manifest.source["files"] == 2
    assert together.manifest.source["dataset"] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert together.fingerprint == pattern.fingerprint
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        main([*words, "~/a.txt", "~/none.txt", "--output=~/other"])
    write_jsonl(tmp_path / "x.jsonl")
    main([*words, "~/a.txt", "~/x.jsonl", "--output=~/mixed"])
    assert open_dataset(tmp_path / "mixed").manifest.documents == 1 + len(DOCUMENTS)
    with pytest.raises(UserError, match="stdlib: among several names"):
        main([*words, "~/a.txt", "stdlib", "--output=~/other"])


# Nothing is overwritten by accident


def test_another_dataset_is_replaced_only_by_force(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    before = quietly(request(path, tmp_path / "out"))
    with pytest.raises(UserError, match="already holds a dataset that differs in tokenizer"):
        quietly(request(path, tmp_path / "out", tokenizer="bpe:300"))
    assert open_dataset(tmp_path / "out").fingerprint == before.fingerprint
    after = quietly(request(path, tmp_path / "out", tokenizer="bpe:300", force=True))
    assert after.vocabulary == 300
    assert names(tmp_path) == {"data.jsonl", "out"}


def test_a_directory_of_something_else_is_never_touched(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    for place in ("out", "other.partial"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match=r"out: exists and is not a dataset"):
            quietly(request(path, tmp_path / "out", force=force))
        with pytest.raises(
            UserError, match=r"other\.partial: contains thesis\.tex, which no preparation wrote"
        ):
            quietly(request(path, tmp_path / "other", force=force))
    quietly(request(path, tmp_path / "done"))
    shutil.copytree(tmp_path / "other.partial", tmp_path / "done.partial")
    quietly(
        request(path, tmp_path / "done")
    )  # already prepared: what lies beside it is none of our business
    assert (tmp_path / "done.partial" / "thesis.tex").exists()
    assert names(tmp_path) == {"data.jsonl", "out", "other.partial", "done", "done.partial"}
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "other.partial" / "thesis.tex").read_text() == "years of work"


def test_a_damaged_dataset_is_not_called_prepared(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    quietly(request(path, tmp_path / "out"))
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        quietly(request(path, tmp_path / "out"))


# Interruption


WORKER = """
    import os, signal, sys
    from pathlib import Path
    from megagpt import download_data
    from megagpt.data import encoding_pool, text_files
    from megagpt.data import writer as dataset_writer
    from megagpt.utils import run_command

    download_data.COMMIT_TOKENS = 700
    encoding_pool.BATCH_CHARACTERS = text_files.TEXT_BLOCK_BYTES = 200
    {trouble}
    if __name__ == "__main__":
        arguments = {arguments}
        sys.exit(run_command(lambda: download_data.main(arguments)))
"""


def run_with_trouble(tmp_path: Path, trouble: str, *arguments) -> subprocess.CompletedProcess:
    """The command in a process of its own, with commit points close together and something going
    wrong.
    """
    script = tmp_path / "worker.py"
    trouble = textwrap.indent(textwrap.dedent(trouble), "    ").strip()
    script.write_text(
        textwrap.dedent(WORKER.format(trouble=trouble, arguments=[str(a) for a in arguments]))
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )


KILL_AFTER_COMMITS = """
    commit, commits = dataset_writer.DatasetWriter.commit, []
    write = dataset_writer.SplitWriter.write
    def counting_commit(writer, pieces):
        commit(writer, pieces)
        commits.append(pieces)
    def killing_write(writer, tokens, **options):
        write(writer, tokens, **options)
        if len(commits) == {commits}:
            os.kill(os.getpid(), signal.SIGKILL)
    dataset_writer.DatasetWriter.commit = counting_commit
    dataset_writer.SplitWriter.write = killing_write
"""
KILL_BEFORE = """
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    dataset_writer.{function} = download_data.{function} = kill
"""


def killed(commits: int | str) -> str:
    if isinstance(commits, int):
        return KILL_AFTER_COMMITS.format(commits=commits)
    return KILL_BEFORE.format(function=commits)


CASES = [
    ("txt", 0),
    ("txt", 1),
    ("txt", 3),
    ("txt", "_sealed_shard"),
    ("txt", "publish"),
    ("jsonl", 2),
    ("chat.jsonl", 2),
]


@pytest.mark.parametrize(("suffix", "when"), CASES)
def test_a_killed_preparation_continues_to_the_same_dataset(tmp_path, monkeypatch, suffix, when):
    path = tmp_path / f"data.{suffix}"
    write_text(path, lines=400) if suffix == "txt" else write_jsonl(path)
    options = {"tokenizer": "bpe:300", "shard_tokens": 900}
    if suffix == "chat.jsonl":  # of which --max_length leaves some nothing to learn from
        options |= {"prompt": "text", "answer": "{number}", "chat_template": "plain"}
        options |= {"max_length": 200, "skip_bad_rows": 60}
    arguments = ("--dataset", path, "--workers", 1)
    for name, value in options.items():
        arguments += (f"--{name}", value)
    dead = run_with_trouble(tmp_path, killed(when), *arguments, "--output", tmp_path / "out")
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has not finished"):
        open_dataset(tmp_path / "out")
    said = []
    wanted = request(path, tmp_path / "out", **options)
    monkeypatch.setattr(encoding_pool, "BATCH_CHARACTERS", 200)
    monkeypatch.setattr(text_files, "TEXT_BLOCK_BYTES", 200)
    prepare(wanted, report=said.append)
    assert ("continuing after" in said[0]) == (when != 0)
    verify(wanted.output, full=True)
    undisturbed = quietly(replace(wanted, output=tmp_path / "undisturbed"))
    assert open_dataset(wanted.output).fingerprint == undisturbed.fingerprint
    assert names(wanted.output) == names(undisturbed.directory)
    assert open_dataset(wanted.output).manifest.source == undisturbed.manifest.source


def test_unfinished_work_for_another_request_is_kept(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    arguments = (
        "--dataset",
        path,
        "--tokenizer",
        "bytes",
        "--workers",
        1,
        "--output",
        tmp_path / "out",
    )
    run_with_trouble(tmp_path, killed(2), *arguments)
    left = names(tmp_path / "out.partial")
    with pytest.raises(
        UserError, match="unfinished preparation of other data or with other options; give --force"
    ):
        quietly(request(path, tmp_path / "out", max_tokens=100))
    write_jsonl(path, DOCUMENTS[:50])  # the corpus changed meanwhile
    with pytest.raises(UserError, match="unfinished preparation of other data"):
        quietly(request(path, tmp_path / "out"))
    assert names(tmp_path / "out.partial") == left
    assert quietly(request(path, tmp_path / "out", force=True)).manifest.documents == 50


# Full disks


def test_a_full_disk_says_need_and_have_and_the_work_continues(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: the write is cut short and the next one fails."""
    path = write_text(tmp_path / "data.txt", lines=800)
    arguments = (
        "--dataset",
        path,
        "--tokenizer",
        "bytes",
        "--workers",
        1,
        "--output",
        tmp_path / "out",
    )
    limit = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, "
        "resource.getrlimit(1)[1]))"
    )
    full = run_with_trouble(tmp_path, limit, *arguments)
    assert full.returncode == 2
    assert "File too large: need" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "out").exists()
    resumed = run_with_trouble(tmp_path, "", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after" in resumed.stdout
    assert "".join(
        t for s in ("train", "val") for t in texts(open_dataset(tmp_path / "out"), s)
    ) == (path.read_text() + "<|endoftext|>")


def test_a_disk_that_became_read_only_is_not_called_full(tmp_path):
    """Linux mounts a file system read-only after an error of its disk: no room would help."""
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with (
        pytest.raises(UserError, match="Read-only file system; make its disk writable"),
        dataset_writer.explain_full_disk(tmp_path, 0),
    ):
        raise refused


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_a_small_disk_is_refused_before_anything_is_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=17m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    try:
        path = tmp_path / "data.txt"
        path.write_text("0123456789abcde\n" * 100_000)
        with pytest.raises(
            UserError, match=r"need at least 19\.05 MiB more, have 1\d\.\d\d MiB\. Free some space"
        ):
            quietly(request(path, disk / "out"))
        assert names(disk) == set()
        shutil.copy(write_jsonl(tmp_path / "data.jsonl"), disk)
        quietly(request(disk / "data.jsonl", disk / "out"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# The embedded corpus


def test_the_embedded_corpus_is_prepared_once_by_whoever_comes_first(tmp_path):
    """Several ranks of one host find it missing at the same moment."""
    code = (
        "import sys; from pathlib import Path; from megagpt.download_data import "
        "prepare_embedded_corpus as p;"
    )
    command = [
        sys.executable,
        "-c",
        code + "p(Path(sys.argv[1]))",
        str(tmp_path / "data" / "stdlib"),
    ]
    ranks = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert sum(", in " in output for output in outputs) == 1
    prepared = open_dataset(tmp_path / "data" / "stdlib")
    verify(prepared.directory, full=True)
    assert names(tmp_path / "data") == {"stdlib"}
    assert prepared.vocabulary == 4096
    assert prepared.manifest.tokens("train") > 1_000_000
    assert prepared.manifest.tokens("val") > 50_000
    assert prepared.manifest.source["python"].endswith(sys.version.split()[0])
    prepare_embedded_corpus(prepared.directory)
    assert open_dataset(prepared.directory).fingerprint == prepared.fingerprint


def test_a_stream_that_ends_early_is_refused(tmp_path):
    """The card of a dataset says how many rows a split has; `datasets` checks it only in full."""
    table = pyarrow.table({"body": [f"row {number}" for number in range(30)]})
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    card = (
        "---\ndataset_info:\n  features:\n  - name: body\n    dtype: string\n  splits:\n"
        "  - name: train\n    num_bytes: 1000\n    num_examples: {}\n---\n"
    )
    source = HubDataset(str(tmp_path), None, "train", Column("body"))
    (tmp_path / "README.md").write_text(card.format(30))
    assert len(list(source.pieces())) == 30
    (tmp_path / "README.md").write_text(card.format(31))
    with pytest.raises(UserError, match="ended after 30 rows, the hub says 31"):
        list(source.pieces())
