"""Token files of other trainers are read where they lie, as they are, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import RunConfig
from megagpt.data.token_files.declared import Declared
from megagpt.data.token_files.ids_only import IdsOnly
from megagpt.data.token_files.opening import is_token_files, manifest_of, tokenizer_of
from megagpt.data.token_files.segments import SearchedStarts, StoredStarts
from megagpt.data.tokenizer import store_tokenizer
from megagpt.dataset import Dataset, SampleStream, open_dataset
from megagpt.download_data import main as download_data
from megagpt.rundir.data import open_validation_sets, prepare_vocabulary, splits_of
from megagpt.utils import UserError
from tests import REPOSITORY
from tests.data.token_files import (
    GPT2_MAGIC,
    LLAMA3_MAGIC,
    write_llm_c,
    write_megatron,
    write_nanogpt,
)

WRITTEN = REPOSITORY / "tests" / "fixtures" / "megatron"
# What tests/fixtures/megatron/write.py gave to megatron-core's builder.
DOCUMENTS = [[[256, 1, 2], [3, 4]], [[]], [[5, 6, 7, 8, 300]], [[9], [10, 11], [65535]]]
IDS = [256, 1, 2, 3, 4, 5, 6, 7, 8, 300, 9, 10, 11, 65535]
ANY_ID = Declared(vocabulary=2**16)


def everything(dataset: Dataset, split: str = "train") -> list[int]:
    stream = dataset.split(split)  # type: ignore[arg-type]
    return stream.read(0, len(stream)).tolist()


def declared(**more: object) -> Declared:
    return Declared(**({"vocabulary": 2**16} | more))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- formats


def test_nanogpt_is_read_with_the_validation_beside_it(tmp_path: Path) -> None:
    ids = [0, 1, 50256, 7] * 30
    write_nanogpt(tmp_path / "owt" / "train.bin", ids)
    write_nanogpt(tmp_path / "owt" / "val.bin", [9, 8, 7])
    before = {
        file: (file.stat().st_mtime_ns, file.read_bytes())
        for file in tmp_path.rglob("*")
        if file.is_file()
    }
    for path in (tmp_path / "owt", tmp_path / "owt" / "train.bin"):
        dataset = open_dataset(path, Declared(vocabulary=50257))
        assert everything(dataset) == ids
        assert everything(dataset, "val") == [9, 8, 7]
    after = {
        file: (file.stat().st_mtime_ns, file.read_bytes())
        for file in tmp_path.rglob("*")
        if file.is_file()
    }
    assert after == before


@pytest.mark.parametrize(("magic", "vocabulary"), [(GPT2_MAGIC, 50257), (LLAMA3_MAGIC, 128256)])
def test_llm_c_says_its_vocabulary_and_comes_in_shards(
    tmp_path: Path, magic: int, vocabulary: int
) -> None:
    largest = vocabulary - 1
    write_llm_c(tmp_path / "web_train_000001.bin", [1, largest, 3], magic)
    write_llm_c(tmp_path / "web_train_000002.bin", [4, 5], magic)
    write_llm_c(tmp_path / "web_val_000000.bin", [6, 7], magic)
    dataset = open_dataset(tmp_path / "web_train_*.bin")
    assert dataset.vocabulary == vocabulary
    assert everything(dataset) == [1, largest, 3, 4, 5]
    assert everything(dataset, "val") == [6, 7]
    one = open_dataset(tmp_path / "web_train_000001.bin", Declared(validation_fraction=0.34))
    assert (everything(one), everything(one, "val")) == ([1, largest], [3])


@pytest.mark.parametrize("name", ["uint16", "int32"])
def test_what_megatron_core_wrote_is_read_with_its_documents(name: str) -> None:
    for path in (WRITTEN / name, WRITTEN / f"{name}.bin", WRITTEN / f"{name}.idx"):
        dataset = open_dataset(path, declared(validation_fraction=0.0))
        assert everything(dataset) == IDS
        numbers = dataset.split("train").document_ids(0, len(IDS))
        # The second document is empty: a number without a token.
        assert numbers.tolist() == [0] * 5 + [2] * 5 + [3] * 4


def test_megatron_core_writes_what_the_tests_write(tmp_path: Path) -> None:
    """The same bytes, of each type of ids; and its reader agrees with ours."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    for code, dtype in ((1, np.uint8), (4, np.int32), (5, np.int64), (8, np.uint16)):
        documents = [[[number % 250 for number in s] for s in document] for document in DOCUMENTS]
        theirs, ours = tmp_path / f"theirs{code}", tmp_path / f"ours{code}"
        builder = indexed.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
        for document in documents:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{theirs}.idx")
        write_megatron(ours, documents, code)
        for suffix in (".bin", ".idx"):
            assert Path(f"{theirs}{suffix}").read_bytes() == Path(f"{ours}{suffix}").read_bytes()
        read = indexed.IndexedDataset(str(theirs))
        sequences = [token for number in range(len(read)) for token in read[number].tolist()]
        assert everything(open_dataset(theirs, declared(validation_fraction=0.0))) == sequences


def test_a_fraction_cuts_where_a_document_begins(tmp_path: Path) -> None:
    documents = [[[number] * 10] for number in range(10)]
    path = write_megatron(tmp_path / "ten", documents, code=4)
    dataset = open_dataset(path, declared(validation_fraction=0.25))
    assert everything(dataset) == [number for number in range(7) for _ in range(10)]
    assert everything(dataset, "val") == [7] * 10 + [8] * 10 + [9] * 10
    assert dataset.split("val").document_ids(5, 15).tolist() == [0] * 5 + [1] * 5
    assert len(open_dataset(path, declared()).split("val")) == 10  # a document for one hundredth


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    cut=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_searched_starts_equal_stored_ones(lengths: list[int], cut: tuple[int, int]) -> None:
    starts = np.cumsum([0, *lengths[:-1]])
    low, high = sorted(cut)
    stored = StoredStarts(starts[(low <= starts) & (starts < high)] - low)
    searched = SearchedStarts(starts.tolist(), low, high)
    assert len(searched) == len(stored)
    for position in range(high - low):
        assert searched.count(position) == stored.count(position)
    assert searched.between(0, len(stored)).tolist() == stored.between(0, len(stored)).tolist()


# --------------------------------------------------------------------------------- what is declared


def run_config(path: object, **data: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "megagpt": {
                "model": {"preset": "gpt2"},
                "data": {"path": path, **data},
                "training": {"total_steps": 1},
            },
        }
    )


def test_the_model_says_how_many_ids_there_are_where_no_tokenizer_does(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", [1, 2, 3])
    assert prepare_vocabulary(run_config(str(path))) == 50257  # of the preset
    store_tokenizer("bytes", tmp_path, list)
    assert prepare_vocabulary(run_config(str(path), tokenizer=str(tmp_path))) == 257
    with pytest.raises(UserError, match=r"megagpt\.data\.tokenizer=DIR"):
        open_dataset(path)


def test_a_key_for_token_files_is_refused_where_there_are_none(tmp_path: Path) -> None:
    config = run_config(str(tmp_path), validation_fraction=0.5)
    with pytest.raises(UserError, match=r"megagpt\.data\.validation_fraction: has no effect"):
        prepare_vocabulary(config)


def test_a_further_validation_set_of_token_files_is_read_whole(tmp_path: Path) -> None:
    train = write_nanogpt(tmp_path / "train.bin", range(5000))
    path = write_megatron(tmp_path / "held_out", [[list(range(1500))], [list(range(1500))]])
    config = run_config(str(train), validation={"pile": str(path)}).resolved(
        world_size=1, vocabulary=50257, bf16_native=False
    )
    assert splits_of(config) == ("train", "val")
    training = manifest_of(train, Declared.by(config.megagpt))
    (found,) = open_validation_sets(config.megagpt, training).values()
    assert found.samples_per_epoch == 2  # of 1,024 tokens


def test_text_is_that_of_the_tokenizer_or_ids(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", [1, 2, 3])
    assert isinstance(tokenizer_of(path, ANY_ID), IdsOnly)
    ids = IdsOnly(300)
    assert ids.encode("12 299") == [12, 299]
    assert ids.decode([12, 299]) == "12 299"
    assert "".join(ids.decode_stream([5, 6])) == " 5 6"
    for text in ("", "The", "12 300", "-1"):
        with pytest.raises(UserError, match="ids without a tokenizer"):
            ids.encode(text)
    store_tokenizer("bytes", tmp_path, list)
    assert tokenizer_of(path, Declared(tokenizer=tmp_path)).decode([72, 105]) == "Hi"


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    ids = list(range(400)) * 4
    first = open_dataset(write_nanogpt(tmp_path / "a" / "train.bin", ids), ANY_ID)
    moved = open_dataset(write_nanogpt(tmp_path / "b" / "other.bin", ids), declared())
    ids[-1] = 5
    changed = open_dataset(write_nanogpt(tmp_path / "c" / "train.bin", ids), ANY_ID)
    cut = open_dataset(tmp_path / "a" / "train.bin", declared(validation_fraction=0.5))
    store_tokenizer("bytes", tmp_path, list)
    write_nanogpt(tmp_path / "d" / "train.bin", [3] * 10)
    named = open_dataset(tmp_path / "d" / "train.bin", Declared(tokenizer=tmp_path))
    alone = open_dataset(tmp_path / "d" / "train.bin", ANY_ID)
    assert first.fingerprint == moved.fingerprint
    found = [first, changed, cut, named, alone]
    assert len({dataset.fingerprint for dataset in found}) == len(found)


def test_the_fingerprint_notices_other_documents_of_the_same_ids(tmp_path: Path) -> None:
    one = open_dataset(write_megatron(tmp_path / "one", [[[1, 2, 3]], [[4]]]), ANY_ID)
    other = open_dataset(write_megatron(tmp_path / "other", [[[1, 2], [3]], [[4]]]), ANY_ID)
    assert one.fingerprint != other.fingerprint


def stream(*paths: Path, document_mask: bool = False, **more: object) -> SampleStream:
    return SampleStream.open(
        [(path, 1.0) for path in paths],
        split="train",
        sequence_length=4,
        seed=0,
        document_mask=document_mask,
        declared=declared(**more),
    )


def test_samples_are_windows_of_the_file_with_their_documents(tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "text", [[[1, 2, 3]], [[4, 5, 6, 7, 8, 9]]], code=4)
    samples = stream(path, document_mask=True, validation_fraction=0.0)
    found = {tuple(samples.sample(i).tokens): samples.sample(i).document_ids for i in range(2)}
    assert {tokens: ids.tolist() for tokens, ids in found.items()} == {
        (1, 2, 3, 4): [0, 0, 0, 1],
        (5, 6, 7, 8): [0, 0, 0, 0],
    }


def test_a_mask_needs_documents(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", range(50))
    with pytest.raises(UserError, match="does not say where documents begin"):
        stream(path, document_mask=True)


# ---------------------------------------------------------------------------------------- bad files


def _idx_of_another(directory: Path) -> Path:
    write_megatron(directory / "other", [[[1, 2, 3, 4]]])
    path = write_megatron(directory / "data", [[[1, 2, 3]]])
    os.replace(directory / "other.idx", directory / "data.idx")
    return path


def _idx(directory: Path, edit) -> Path:
    path = write_megatron(directory / "data", [[[1, 2, 3]], [[4, 5]]])
    content = bytearray((directory / "data.idx").read_bytes())
    edited = edit(content)
    (directory / "data.idx").write_bytes(content if edited is None else edited)
    return path


def _set(content: bytearray, place: int, value: int) -> None:
    content[place] = value


def _file(directory: Path, content: bytes) -> Path:
    (directory / "train.bin").write_bytes(content)
    return directory / "train.bin"


BAD = {
    "an index of another file": (
        _idx_of_another,
        r"data\.idx: does not belong to .*data\.bin \(found 6 bytes there, need 8\)",
    ),
    "an index that is cut": (lambda d: _idx(d, lambda c: c[:-1]), "data.idx: truncated"),
    "an index with more": (lambda d: _idx(d, lambda c: c + b"\0"), "something was appended"),
    "several modalities": (lambda d: _idx(d, lambda c: c + b"\0\0"), "several modalities"),
    "another mark": (lambda d: _idx(d, lambda c: _set(c, 0, 0)), "data.idx: not an index"),
    "fairseq's format": (lambda d: _idx(d, lambda c: b"TNTIDX\0\0" + c), "older format"),
    "another version": (lambda d: _idx(d, lambda c: _set(c, 9, 2)), "version 2, need 1"),
    "ids that are floats": (lambda d: _idx(d, lambda c: _set(c, 17, 6)), "type 6 of ids"),
    "sequences with a gap": (lambda d: _idx(d, lambda c: _set(c, 34, 2)), "sequence 1 does not"),
    "documents in disorder": (lambda d: _idx(d, lambda c: _set(c, -16, 3)), "do not cover its 2"),
    "an odd number of bytes": (lambda d: _file(d, b"\1\0\2"), "train.bin: 3 bytes, need pairs"),
    "an empty file": (lambda d: _file(d, b""), "train.bin: 0 bytes"),
    "a checkpoint of PyTorch": (lambda d: _file(d, b"PK\3\4" + bytes(8)), "zip archive"),
    "a pickle": (lambda d: _file(d, b"\x80\x02}q\0."), "is a pickle"),
    "questions of llm.c": (
        lambda d: write_llm_c(d / "x.bin", [1], GPT2_MAGIC + 2),
        "multiple-choice questions",
    ),
    "llm.c's other version": (
        lambda d: write_llm_c(d / "x.bin", [1], version=2),
        "version 2 of magic 20240520, need 1",
    ),
    "llm.c's wrong length": (
        lambda d: write_llm_c(d / "x.bin", [1, 2], tokens=3),
        "its header says 3 ids of 2 bytes",
    ),
    "an id that is too large": (
        lambda d: write_llm_c(d / "x.bin", [1, 50257]),
        r"x\.bin: id 50257 at byte 1026 is beyond the vocabulary \(need ids below 50257\)",
    ),
    "a pattern without a file": (lambda d: d / "train_*.bin", "no file has such a name"),
    "a file that is not there": (lambda d: d / "train.bin", "cannot be read"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named_in_one_line(tmp_path: Path, what: str) -> None:
    make, message = BAD[what]
    path = make(tmp_path)
    assert is_token_files(path)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(path, declared(validation_fraction=0.0))
    assert "\n" not in str(error.value)


def test_a_negative_id_is_beyond_every_vocabulary(tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "data", [[[1, -2, 3]]], code=4)
    with pytest.raises(UserError, match="id 4294967294 at byte 4"):
        open_dataset(path, declared())


def test_an_id_far_into_the_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    ids = np.zeros(2**16 + 10, np.uint16)
    ids[-2] = 400
    path = write_nanogpt(tmp_path / "train.bin", ids)
    opened = open_dataset(path, Declared(vocabulary=300, validation_fraction=0.0)).split("train")
    with pytest.raises(UserError, match=f"token id 400 found at byte {2 * (2**16 + 8)}, ids below"):
        opened.read(len(opened) - 4, len(opened))


def test_files_of_several_formats_are_no_dataset(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "a1.bin", [1])
    write_llm_c(tmp_path / "a2.bin", [1])
    with pytest.raises(UserError, match="files of several formats"):
        open_dataset(tmp_path / "a*.bin", ANY_ID)


def test_the_preparation_says_that_ids_need_none(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", range(100))
    with pytest.raises(UserError, match=r"train on it as it is: --set megagpt\.data\.path="):
        download_data(["--dataset", str(path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
