"""Reading prepared data: what is written is read, damage is named, and the order is a pure
function.
"""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.data import integrity
from megagpt.data.manifest import TokenizerRecord
from megagpt.data.sample_order import Blend, permute
from megagpt.data.tokenizer import store_tokenizer
from megagpt.data.writer import DatasetWriter, PreparationProgress
from megagpt.dataset import SampleStream, open_dataset, verify
from megagpt.utils import UserError

Documents = list[list[int]]


def write_dataset(
    directory: Path,
    train: Documents,
    val: Documents = (),
    *,
    vocabulary: int = 257,
    shard_tokens: int = 10**9,
) -> Path:
    """A dataset of given token ids, as a preparation would leave it."""
    directory.mkdir(parents=True)
    store_tokenizer("bytes", directory, list)
    writer = DatasetWriter(
        directory, PreparationProgress(request={}), vocabulary=vocabulary, shard_tokens=shard_tokens
    )
    for split, documents in (("train", train), ("val", val)):
        for document in documents:
            writer.write(split, np.array(document, np.uint32), starts_document=True)
    tokenizer = TokenizerRecord(
        **integrity.record_file(directory / "tokenizer.json").model_dump(), name="bytes"
    )
    writer.finish(tokenizer=tokenizer, end_of_document=256, source={"dataset": "test"})
    return directory


def open_stream(
    *directories: Path, split="train", sequence_length=4, seed=0, document_mask=False, weights=None
):
    data = [
        (path, weight)
        for path, weight in zip(directories, weights or [1] * len(directories), strict=True)
    ]
    return SampleStream.open(
        data, split=split, sequence_length=sequence_length, seed=seed, document_mask=document_mask
    )


def edit_manifest(directory: Path, edit) -> None:
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def small(tmp_path) -> Path:
    return write_dataset(
        tmp_path / "small", [list(range(100)), list(range(50, 150))], [list(range(20))]
    )


# Round trips


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4"), (200019, "<u4")]
)
def test_every_id_of_the_vocabulary_survives(tmp_path, vocabulary, dtype):
    tokens = [0, 1, vocabulary - 1, 255, vocabulary - 2]
    directory = write_dataset(tmp_path / "data", [tokens], vocabulary=vocabulary)
    stream = open_dataset(directory).split("train")
    assert stream.read(0, 5).tolist() == tokens
    assert np.fromfile(directory / "train-00000.bin", dtype).tolist() == tokens


def test_an_id_that_the_vocabulary_does_not_have_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="token id 70000 in a vocabulary of 65536"):
        write_dataset(tmp_path / "data", [[70000]], vocabulary=65536)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents=st.lists(
        st.lists(st.integers(0, 256), min_size=1, max_size=9), min_size=1, max_size=12
    ),
    shard_tokens=st.integers(1, 30),
    data=st.data(),
)
def test_shards_read_as_one_stream_with_its_documents(
    tmp_path_factory, documents, shard_tokens, data
):
    directory = write_dataset(
        tmp_path_factory.mktemp("shards") / "data", documents, shard_tokens=shard_tokens
    )
    stream = open_dataset(directory).split("train")
    tokens = [token for document in documents for token in document]
    numbers = [number for number, document in enumerate(documents) for _ in document]
    start = data.draw(st.integers(0, len(tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens)))
    assert len(stream) == len(tokens)
    assert stream.read(start, stop).tolist() == tokens[start:stop]
    assert stream.document_ids(start, stop).tolist() == numbers[start:stop]


def test_a_document_that_runs_over_shards_keeps_its_number(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    store_tokenizer("bytes", directory, list)
    writer = DatasetWriter(
        directory, PreparationProgress(request={}), vocabulary=257, shard_tokens=3
    )
    for starts, tokens in (
        (True, [1]),
        (True, [2, 2, 2]),
        (False, [2, 2, 2]),
        (False, [2]),
        (True, [3, 3]),
    ):
        writer.write("train", np.array(tokens, np.uint32), starts_document=starts)
    tokenizer = TokenizerRecord(
        **integrity.record_file(directory / "tokenizer.json").model_dump(), name="bytes"
    )
    writer.finish(tokenizer=tokenizer, end_of_document=256, source={})
    stream = open_dataset(directory).split("train")
    assert [shard.documents for shard in open_dataset(directory).manifest.shards("train")] == [
        2,
        0,
        1,
    ]
    assert stream.document_ids(0, 10).tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    assert stream.document_ids(5, 9).tolist() == [1, 1, 1, 2]


def test_reading_outside_the_stream_is_an_error(small):
    stream = open_dataset(small).split("train")
    for start, stop in ((0, 201), (-1, 3), (5, 5)):
        with pytest.raises(IndexError):
            stream.read(start, stop)


def test_fingerprint_is_of_the_contents(tmp_path, small):
    twin = write_dataset(
        tmp_path / "twin", [list(range(100)), list(range(50, 150))], [list(range(20))]
    )
    other = write_dataset(
        tmp_path / "other", [list(range(100)), list(range(49, 149))], [list(range(20))]
    )
    joined = write_dataset(tmp_path / "joined", [[*range(100), *range(50, 150)]], [list(range(20))])
    fingerprints = {open_dataset(path).fingerprint for path in (small, twin, other, joined)}
    assert open_dataset(small).fingerprint == open_dataset(twin).fingerprint
    assert len(fingerprints) == 3


# Damage: each is named with file, place, found and expected, and with what to type


def truncate_by_a_byte(directory):
    path = directory / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])


def change_a_token(directory):
    path = directory / "train-00000.bin"
    path.write_bytes(b"\x07\x00" + path.read_bytes()[2:])


def as_uint32(directory):
    path = directory / "train-00000.bin"
    np.fromfile(path, "<u2").astype("<u4").tofile(path)


def write_an_id_out_of_range(directory):
    tokens = np.memmap(directory / "train-00000.bin", "<u2", mode="r+")
    tokens[123] = 40000
    tokens.flush()


def shard(content, split="train"):
    return content["splits"][split][0]


DAMAGE = {
    "truncated by a byte": (
        truncate_by_a_byte,
        r"train-00000\.bin: 399 bytes found, 400 expected \(truncated at byte",
    ),
    "empty": (
        lambda d: (d / "val-00000.bin").write_bytes(b""),
        r"val-00000\.bin: empty, 40 bytes expected",
    ),
    "appended": (
        lambda d: (d / "train-00000.bin").open("ab").write(b"x"),
        "401 bytes found.*appended at byte 400",
    ),
    "missing": (
        lambda d: (d / "train-00000.bin").unlink(),
        r"train-00000\.bin: cannot be read \(No such file",
    ),
    "changed": (
        change_a_token,
        r"train-00000\.bin: changed since preparation at byte 0 .* found, .* expected",
    ),
    "other dtype": (as_uint32, r"800 bytes found, 400 expected: the other dtype"),
    "offsets cut": (
        lambda d: (d / "train-00000.offsets").write_bytes(b"\0" * 8),
        r"\.offsets: 8 bytes found, 16",
    ),
    "offsets changed": (
        lambda d: (d / "train-00000.offsets").write_bytes(b"\1" * 16),
        r"\.offsets: changed since",
    ),
    "tokenizer changed": (
        lambda d: (d / "tokenizer.json").write_bytes(b"{}"),
        r"tokenizer\.json: 2 bytes found",
    ),
    "manifest of another dtype": (
        lambda d: edit_manifest(d, lambda m: m.update(dtype="uint32")),
        r"2 bytes per token found, uint32 has 4",
    ),
    "id out of range": (
        write_an_id_out_of_range,
        r"train-00000\.bin: token id 40000 found at byte 246, ids below 257 expected",
    ),
    "vocabulary too small": (
        lambda d: edit_manifest(d, lambda m: m.update(vocabulary=100)),
        r"token id 149 found, ids below the vocabulary of 100 expected",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(small, name):
    damage, message = DAMAGE[name]
    open_dataset(small)
    damage(small)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(small)
    assert f"python launch/download_data.py --dataset ... --output {small} --force" in str(
        caught.value
    )


def test_all_damage_is_named_at_once(small):
    truncate_by_a_byte(small)
    (small / "val-00000.bin").unlink()
    with pytest.raises(UserError, match=r"(?s)train-00000\.bin.*val-00000\.bin"):
        open_dataset(small)


def set_file_name(name):
    return lambda directory: edit_manifest(directory, lambda m: shard(m).update(file=name))


BAD_MANIFESTS = {
    "missing": (lambda d: (d / "manifest.json").unlink(), r"not a dataset \(no manifest.json\)"),
    "a pickle": (
        lambda d: (d / "manifest.json").write_bytes(pickle.dumps({"format_version": 1})),
        "Invalid JSON",
    ),
    "not JSON": (lambda d: (d / "manifest.json").write_text("{"), "Invalid JSON"),
    "another version": (
        lambda d: edit_manifest(d, lambda m: m.update(format_version=2)),
        "format_version: Input",
    ),
    "an unknown key": (
        lambda d: edit_manifest(d, lambda m: m.update(extra=1)),
        "extra: Extra inputs",
    ),
    "a path upwards": (
        set_file_name("../train-00000.bin"),
        r"splits\.train\.0\.file: String should match",
    ),
    "an absolute path": (
        set_file_name("/etc/passwd"),
        r"splits\.train\.0\.file: String should match",
    ),
    "a line break": (
        set_file_name("train-00000.bin\n"),
        r"splits\.train\.0\.file: String should match",
    ),
    "too narrow a dtype": (
        lambda d: edit_manifest(d, lambda m: m.update(vocabulary=70000)),
        "does not fit into uint16",
    ),
    "no tokens": (
        lambda d: edit_manifest(d, lambda m: shard(m).update(tokens=0)),
        r"tokens: Input should be greater",
    ),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(small, name):
    damage, message = BAD_MANIFESTS[name]
    damage(small)
    with pytest.raises(UserError, match=message):
        open_dataset(small)


def test_missing_data_says_what_to_type(tmp_path):
    with pytest.raises(
        UserError, match=r"no dataset here; prepare one: python launch/download_data\.py"
    ):
        open_dataset(tmp_path / "none")
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(UserError, match="has not finished; rerun the same command to continue"):
        open_dataset(tmp_path / "half")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a dataset is a directory"):
        open_dataset(tmp_path / "file")


def test_full_verification_finds_one_bit_between_the_probes(tmp_path):
    directory = write_dataset(tmp_path / "data", [[1] * 2**20])
    path = directory / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[70_000] ^= 1
    path.write_bytes(content)
    open_dataset(directory)  # the quick check reads 1 MiB of 2
    with pytest.raises(UserError, match=r"train-00000\.bin: sha256 .* found, .* expected"):
        verify(directory, full=True)


def test_an_id_out_of_range_between_the_probes_is_never_trained_on(tmp_path):
    directory = write_dataset(tmp_path / "data", [[1] * 2**20])
    tokens = np.memmap(directory / "train-00000.bin", "<u2", mode="r+")
    tokens[35_000] = 300
    tokens.flush()
    stream = open_dataset(directory).split("train")
    assert set(stream.read(0, 35_000)) == {1}
    with pytest.raises(
        UserError,
        match=r"train-00000\.bin: token id 300 found at byte 70000, ids below 257 expected",
    ):
        stream.read(34_990, 35_010)


def test_ids_and_offsets_that_a_wrong_manifest_vouches_for_are_found(small):
    """An id in a probed block at once, the others by full verification."""
    tokens = np.ones(2**20, "<u2")
    tokens[35_000] = 900
    np.array([2**21], "<u8").tofile(small / "val-00000.offsets")

    def vouch(content):
        tokens.tofile(small / "val-00000.bin")
        record = shard(content, "val")
        record.update(
            integrity.record_file(small / "val-00000.bin").model_dump(mode="json"),
            tokens=2**20,
            max_token=4,
        )
        record["offsets"] = integrity.record_file(small / "val-00000.offsets").model_dump(
            mode="json"
        )

    edit_manifest(small, vouch)
    verify(small)
    with pytest.raises(UserError) as caught:
        verify(small, full=True)
    assert "val-00000.bin: token id 900 found at byte 70000, ids below 257 expected" in str(
        caught.value
    )
    assert f"offsets: offset {2**21} at byte 0, increasing offsets below {2**20} expected" in str(
        caught.value
    )
    tokens[1] = 901
    edit_manifest(small, vouch)
    with pytest.raises(UserError, match="token id 901 found at byte 2, ids below 257 expected"):
        verify(small)


def test_full_verification_passes_what_was_prepared(small):
    assert verify(small, full=True) == open_dataset(small).manifest


# The order


@settings(deadline=None)
@given(
    count=st.integers(1, 700), seed=st.integers(-(2**63), 2**63 - 1), epoch=st.integers(0, 2**40)
)
def test_each_epoch_is_a_permutation(count, seed, epoch):
    assert sorted(permute(index, count, seed=seed, epoch=epoch) for index in range(count)) == list(
        range(count)
    )


@settings(deadline=None)
@given(count=st.integers(1, 2**62), data=st.data())
def test_large_epochs_stay_in_range_and_do_not_collide(count, data):
    indices = data.draw(st.lists(st.integers(0, count - 1), max_size=20, unique=True))
    places = {permute(index, count, seed=1, epoch=2) for index in indices}
    assert len(places) == len(indices)
    assert all(0 <= place < count for place in places)


def test_the_order_looks_random():
    """For a random permutation |place - index| has mean n / 3, and neighbours are as far apart
    as strangers.
    """
    count = 4096
    for epoch in range(3):
        places = np.array([permute(index, count, seed=0, epoch=epoch) for index in range(count)])
        assert abs(np.abs(places - np.arange(count)).mean() / (count / 3) - 1) < 0.05
        assert abs(np.abs(np.diff(places)).mean() / (count / 3) - 1) < 0.05
        assert abs(np.corrcoef(places, np.arange(count))[0, 1]) < 0.05


def test_the_order_depends_on_seed_and_epoch():
    orders = {
        tuple(permute(index, 50, seed=seed, epoch=epoch) for index in range(50))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_the_order_never_changes():
    """Checkpoints hold a cursor into this order: another version must visit the same samples."""
    assert [permute(index, 1000, seed=7, epoch=3) for index in range(8)] == GOLDEN_ORDER


GOLDEN_ORDER = [917, 79, 897, 992, 34, 166, 567, 840]


def test_a_billion_samples_take_no_memory(tmp_path):
    directory = write_dataset(tmp_path / "data", [[0] * 600_000])
    tokens = 2_000_000_001
    with (directory / "train-00000.bin").open("r+b") as file:
        file.truncate(2 * tokens)  # sparse: it takes no room on the disk

    def grow(content):
        probes = integrity.probes_of(directory / "train-00000.bin")
        shard(content).update(tokens=tokens, bytes=2 * tokens, probes=probes)

    edit_manifest(directory, grow)
    tracemalloc.start()
    stream = open_stream(directory, sequence_length=2, document_mask=True)
    sample_ids = [0, 1, 999_999_999, 1_000_000_000, 123_456_789_012]
    batch = stream.batch(sample_ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stream.samples_per_epoch == 1_000_000_000
    assert batch.sample_ids.tolist() == sample_ids
    assert peak < 2**20


# Samples


def test_an_epoch_visits_every_window_once(small):
    stream = open_stream(small, sequence_length=8)
    tokens = open_dataset(small).split("train").read(0, 200)
    assert stream.samples_per_epoch == 199 // 8
    for epoch in range(2):
        first = epoch * stream.samples_per_epoch
        samples = [stream.sample(first + index) for index in range(stream.samples_per_epoch)]
        starts = [stream.locate(sample.sample_id)[1] for sample in samples]
        assert sorted(starts) == list(range(0, 8 * stream.samples_per_epoch, 8))
        assert starts != sorted(starts)
        for start, sample in zip(starts, samples, strict=True):
            assert sample.tokens.tolist() == tokens[start : start + 8].tolist()
            assert sample.targets.tolist() == tokens[start + 1 : start + 9].tolist()


def test_a_sample_depends_on_its_index_only(small):
    first, second = open_stream(small, seed=5), open_stream(small, seed=5)
    backwards = {index: second.sample(index).tokens.tolist() for index in reversed(range(120))}
    assert all(first.sample(index).tokens.tolist() == backwards[index] for index in range(120))
    other_seed = open_stream(small, seed=6)
    assert any(other_seed.sample(index).tokens.tolist() != backwards[index] for index in range(10))


def test_a_batch_stacks_its_samples(small):
    stream = open_stream(small, sequence_length=5, document_mask=True)
    indices = [3, 0, 41, 3]
    batch = stream.batch(indices)
    for row, index in enumerate(indices):
        sample = stream.sample(index)
        assert batch.tokens[row].tolist() == sample.tokens.tolist()
        assert batch.targets[row].tolist() == sample.targets.tolist()
        assert batch.document_ids[row].tolist() == sample.document_ids.tolist()
    assert (batch.tokens.dtype, batch.targets.dtype, batch.document_ids.dtype) == (
        np.int64,
        np.int64,
        np.int32,
    )
    assert batch.sample_ids.tolist() == indices


def test_the_first_samples_of_a_validation_split_are_a_choice_from_all_of_it(tmp_path):
    data = write_dataset(tmp_path / "data", [[1] * 9], val=[[1] * 801])
    stream = open_stream(data, split="val", sequence_length=4, seed=3)
    windows = [stream.locate(index)[1] // 4 for index in range(200)]
    assert windows == [permute(index, 200, seed=3, epoch=0) for index in range(200)]
    assert windows[:20] != sorted(windows[:20])
    assert 60 < np.mean(windows[:20]) < 140  # the first 20 windows of the split would have 9.5
    assert stream.sample(1).document_ids is None


def test_a_share_counts_windows_that_are_visited_twice_once(tmp_path):
    ones = write_dataset(tmp_path / "ones", [[1] * 41])  # 10 windows
    twos = write_dataset(tmp_path / "twos", [[2] * 9])  # 2 windows
    alone = open_stream(ones, sequence_length=4)
    assert [alone.share(samples) for samples in (0, 3, 10, 13)] == [0, 0.3, 1, 1]
    blend = open_stream(ones, twos, weights=[0.5, 0.5], sequence_length=4)
    assert [blend.share(samples) for samples in (4, 8, 20)] == [4 / 12, 6 / 12, 1]


def test_document_ids_separate_the_documents_of_a_sample(tmp_path):
    directory = write_dataset(tmp_path / "data", [[1, 256], [2, 2, 256], [3, 3, 3, 256]])
    stream = open_stream(directory, split="train", sequence_length=8, document_mask=True)
    sample = stream.sample(0)
    assert sample.tokens.tolist() == [1, 256, 2, 2, 256, 3, 3, 3]
    assert sample.document_ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]


def test_a_split_too_short_for_a_sample_is_refused(small, tmp_path):
    with pytest.raises(
        UserError,
        match=r"val split has 20 tokens, but a sample needs 33; set megagpt.model.sequence_length",
    ):
        open_stream(small, split="val", sequence_length=32)
    without = write_dataset(tmp_path / "without", [[1, 2, 3]])
    with pytest.raises(UserError, match=r"no tokens in its val split.*--validation_fraction"):
        open_stream(without, split="val", sequence_length=1)


# Blends


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_prefix_of_a_blend_has_its_shares(weights):
    blend = Blend(weights)
    counts = [0] * len(weights)
    for index in range(2 * blend.period + 3):
        number, rank = blend.locate(index)
        assert rank == counts[number]
        counts[number] += 1
        for share, count in zip(blend.shares, counts, strict=True):
            assert abs(count - (index + 1) * share) < 1


def test_weights_are_decimal_and_of_any_sum():
    assert Blend([0.7, 0.2, 0.1]).period == 10
    assert Blend([14, 4, 2]).shares == Blend([0.7, 0.2, 0.1]).shares
    assert Blend([0.7, 0.2, 0.1]).locate(10**18 + 1)[0] == Blend([0.7, 0.2, 0.1]).locate(1)[0]


def test_weights_without_a_short_period_are_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"repeat only after .* for example \[0\.1389, 0\.8611\]"):
        Blend([1234567, 7654321])


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(UserError, match="must be a positive number"):
        Blend(weights)


def test_a_blend_draws_from_each_dataset_at_its_own_pace(tmp_path):
    ones = write_dataset(tmp_path / "ones", [[1] * 41])
    twos = write_dataset(tmp_path / "twos", [[2] * 9])
    stream = open_stream(ones, twos, weights=[0.75, 0.25], sequence_length=4)
    firsts = stream.batch(range(40)).tokens[:, 0]
    assert stream.samples_per_epoch == 12
    for n in range(1, 41):
        assert abs(int((firsts[:n] == 2).sum()) - n * 0.25) < 1
    assert stream.fingerprint != open_stream(ones, twos, weights=[0.5, 0.5]).fingerprint
    assert stream.fingerprint == open_stream(ones, twos, weights=[3, 1]).fingerprint


def test_a_blend_of_two_tokenizers_is_refused(tmp_path, small):
    other = write_dataset(tmp_path / "other", [[1, 2, 3, 4, 5, 6]])
    edit_manifest(other, lambda m: m["tokenizer"].update(sha256="0" * 64, name="bpe:500"))
    with pytest.raises(
        UserError, match=r"its tokenizer \(bpe:500\) is not that of .*small \(bytes\)"
    ):
        open_stream(small, other)
