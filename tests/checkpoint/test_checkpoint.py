"""Checkpoints on disk: whole or absent, found damaged before they are loaded, written whatever
the disk does.
"""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint.format import (
    _SEAL,
    MANIFEST,
    DamagedCheckpointError,
    GuardMemory,
    Manifest,
    Slice,
    StoredFile,
    TrainState,
    _text_hash,
    complete_steps,
    read_manifest,
    step_directory,
)
from megagpt.checkpoint.reader import open_checkpoint
from megagpt.checkpoint.resume import hashing_shares
from megagpt.checkpoint.resume_proof import NEXT_STEP
from megagpt.utils import UserError
from tests.conftest import _Pools
from tests.support.jobs.checkpoint import EVERY_RANK, RANK_0, gathered, run_config, train_and_die
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

TRAIN = "tests.support.jobs.checkpoint:train"
REFUSAL = "tests.support.jobs.checkpoint:refusal"
ZERO3 = (3, "none", "none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def written(
    pools: _Pools, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A run of two ranks under ZeRO-3, saved at steps 2, 4 and 6 of which two are kept, and what
    its ranks held.
    """
    directory = tmp_path_factory.mktemp("runs") / "written"
    ranks = pools.get(2).run(
        TRAIN, config=run_config(data, 6, ZERO3, save_every=2), directory=directory
    )
    return directory, ranks


@pytest.fixture
def run_directory(written: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    shutil.copytree(written[0], tmp_path / "run")
    return tmp_path / "run"


def checkpoints(run_directory: Path) -> Path:
    return run_directory / "checkpoints"


def newest(run_directory: Path) -> Path:
    return step_directory(checkpoints(run_directory), 6)


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# --------------------------------------------------------------------------------------- the format


def test_what_is_written_is_what_the_ranks_held(written: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, ranks = written
    reader = open_checkpoint(directory)
    state = reader.manifest.state
    assert len(state.guard.recent_losses) == 6
    assert replace(state, guard=GuardMemory()) == TrainState(
        step=6, cursor=48, tokens=6 * 8 * 16, applied_steps=6
    )
    for (kind, name), values in gathered(ranks, "at_end").items():
        assert torch.equal(reader.tensor(kind, name).flatten(), values)


def test_each_element_of_each_parameter_is_stored_once(run_directory: Path) -> None:
    manifest = read_manifest(newest(run_directory))
    assert len(manifest.files) > 2
    for name, tensor in manifest.tensors.items():
        ends = 0
        for piece in sorted(tensor.slices, key=lambda piece: piece.start):
            assert piece.start == ends, name
            ends += piece.numel
        assert ends == torch.Size(tensor.shape).numel(), name


def test_a_checkpoint_holds_safetensors_and_json_only(run_directory: Path) -> None:
    names = {path.name for path in newest(run_directory).iterdir()}
    assert names == {MANIFEST, *read_manifest(newest(run_directory)).files}
    before = step_directory(checkpoints(run_directory), 4)
    assert {path.name for path in before.iterdir()} == {
        MANIFEST,
        NEXT_STEP,
        *read_manifest(before).files,
    }
    for path in newest(run_directory).glob("*.safetensors"):
        (header_size,) = struct.unpack("<Q", path.read_bytes()[:8])
        json.loads(path.read_bytes()[8 : 8 + header_size])


def test_the_manifest_survives_its_own_text(run_directory: Path) -> None:
    manifest = read_manifest(newest(run_directory))
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_only_the_newest_are_kept_and_latest_names_one(run_directory: Path) -> None:
    assert complete_steps(checkpoints(run_directory)) == [6, 4]
    assert (checkpoints(run_directory) / "latest").read_text() == "step_00000006\n"


# ------------------------------------------------------------------------------------------- damage


def test_each_of_a_hundred_flipped_bits_is_found(run_directory: Path) -> None:
    chance = random.Random(0)
    files = sorted(newest(run_directory).iterdir())
    for number in range(100):
        path = files[number % len(files)]
        bit = chance.randrange(8 * path.stat().st_size)
        flip_bit(path, bit)
        with pytest.raises(UserError, match=f"step_00000006/{path.name}"):
            open_checkpoint(run_directory, 6)
        flip_bit(path, bit)
    assert open_checkpoint(run_directory, 6).manifest.state.step == 6


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, append, empty, Path.unlink])
@pytest.mark.parametrize("name", [MANIFEST, "rank_00001_000.safetensors"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_used(
    run_directory: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(newest(run_directory) / name)
    assert open_checkpoint(run_directory).manifest.state.step == 4
    with pytest.raises(
        UserError, match=rf"no checkpoint of step 6; it has steps 4, 6\n  step_00000006/{name}: "
    ):
        open_checkpoint(run_directory, 6)


def as_attacker(manifest: str, old: str, new: str) -> str:
    """A manifest with ``old`` replaced, under a hash that agrees."""
    body = f"{manifest[: _SEAL.search(manifest).start()]}\n}}"
    assert old in body
    body = body.replace(old, new)
    return f'{body[:-2]},\n "sha256": "{_text_hash(body)}"\n}}\n'


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "rank_00000_000.safetensors/..", "model.pt", "a\\nb"]
)
def test_a_manifest_names_no_file_outside_its_directory(run_directory: Path, name: str) -> None:
    manifest = (newest(run_directory) / MANIFEST).read_text()
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json: .*pattern"):
        Manifest.from_json(as_attacker(manifest, "rank_00000_000.safetensors", name))
    with pytest.raises(ValueError, match="pattern"):
        Slice(name, 0, 1, ((0, 1),))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            '"format_version": 1',
            '"format_version": "2"',
            "format_version: Input should be a valid integer",
        ),
        ('"cursor": 48', '"cursor": "48"', "state.cursor: Input should be a valid integer"),
        ('"cursor": 48', '"cursor": -1', "state.cursor: .*greater than or equal to 0"),
        ('"cursor": 48', '"cursor": 48, "__class__": "os.system"', "state.__class__: Unexpected"),
        (
            '"versions": {',
            f'"nested": {"[" * 100_000}{"]" * 100_000}, "versions": {{',
            "RecursionError",
        ),
        ('"format_version": 1', '"format_version": [', "JSONDecodeError"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(
    run_directory: Path, old: str, new: str, reason: str
) -> None:
    manifest = (newest(run_directory) / MANIFEST).read_text()
    with pytest.raises(DamagedCheckpointError, match=reason):
        Manifest.from_json(as_attacker(manifest, old, new))


def test_a_manifest_whose_pieces_leave_a_gap_is_not_read(run_directory: Path) -> None:
    manifest = read_manifest(newest(run_directory))
    name, tensor = next((n, t) for n, t in manifest.tensors.items() if len(t.slices) > 1)
    gap = {**manifest.tensors, name: replace(tensor, slices=tensor.slices[1:])}
    (newest(run_directory) / MANIFEST).write_text(replace(manifest, tensors=gap).to_json())
    with pytest.raises(
        DamagedCheckpointError, match=f"{name} is incomplete .found .* of the elements 0 to"
    ):
        open_checkpoint(run_directory).tensor("weight", name)
    with pytest.raises(DamagedCheckpointError, match="no parameter wte"):
        open_checkpoint(run_directory).tensor("weight", "wte")


GIANT_HEADER = struct.pack("<Q", 2**62) + b"{}"
PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."


@pytest.mark.parametrize(
    "content", [GIANT_HEADER, PICKLE, b"", struct.pack("<Q", 2) + b"[]"], ids=repr
)
def test_a_malformed_tensor_file_is_refused_at_once(run_directory: Path, content: bytes) -> None:
    """Even if the manifest lists its digest; nothing is executed, nothing large allocated (S1,
    S3).
    """
    manifest = read_manifest(newest(run_directory))
    name = "rank_00000_000.safetensors"
    vouched = {
        **manifest.files,
        name: StoredFile(len(content), hashlib.sha256(content).hexdigest()),
    }
    (newest(run_directory) / name).write_bytes(content)
    (newest(run_directory) / MANIFEST).write_text(replace(manifest, files=vouched).to_json())
    parameter = next(
        n for n, t in manifest.tensors.items() if any(piece.file == name for piece in t.slices)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(DamagedCheckpointError, match=f"step_00000006/{name}"):
        open_checkpoint(run_directory).tensor("weight", parameter)
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert not Path("executed").exists()


# -------------------------------------------------------------------------------- ranks that resume


def test_ranks_fall_back_together_and_set_the_damaged_aside(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    flip_bit(newest(run_directory) / "rank_00001_000.safetensors", 5000)
    (checkpoints(run_directory) / ".staging_step_00000008").mkdir()
    ranks = two_ranks.run(
        TRAIN, config=run_config(data, 6, ZERO3, save_every=1), directory=run_directory
    )
    assert [rank["first_step"] for rank in ranks] == [4, 4]
    assert complete_steps(checkpoints(run_directory)) == [
        6,
        5,
        4,
    ]  # two, and the one that was loaded
    assert {path.name for path in checkpoints(run_directory).iterdir()} == {
        "damaged_step_00000006",
        "latest",
        "step_00000004",
        "step_00000005",
        "step_00000006",
    }
    log = (run_directory / "metrics.jsonl").read_text()
    assert "step_00000006/rank_00001_000.safetensors: its content changed" in log


@pytest.mark.parametrize(
    ("latest", "damage", "name"),
    [
        ("step_00000006", truncate, "rank_00001_000.safetensors"),
        ("step_00000099", Path.unlink, "rank_00000_000.safetensors"),
        ("step_00000004", empty, "rank_00009_000.safetensors"),  # one too many
        ("step_00000099", None, ""),
        ("step_00000004", None, ""),
    ],
)
def test_every_rank_names_the_same_file_whatever_latest_says(
    two_ranks: RankPool,
    data: Path,
    run_directory: Path,
    latest: str,
    damage: Callable[[Path], None] | None,
    name: str,
) -> None:
    """``latest`` names a checkpoint that is damaged, that is not there, that is older: the scan
    decides.
    """
    (checkpoints(run_directory) / "latest").write_text(f"{latest}\n")
    if damage:
        damage(newest(run_directory) / name)
    first, second = two_ranks.run(
        "tests.support.jobs.checkpoint:resumption",
        config=run_config(data, 7, ZERO3),
        directory=run_directory,
    )
    assert first["step"] == second["step"] == (4 if damage else 6)
    assert first["passed_over"] == second["passed_over"]
    assert len(first["passed_over"]) == bool(damage)
    assert "checkpoints of steps 4, 6 in" in first["said"]
    assert (f"passed over step_00000006/{name}: " in first["said"]) == bool(damage)
    assert f"resuming at step {first['step']}, " in first["said"]


@pytest.mark.parametrize(
    ("fault", "failing_rank"), [("unreadable_hash", 0), ("unreadable_tensor", 1)]
)
def test_a_disk_that_does_not_answer_is_no_damage(
    two_ranks: RankPool, data: Path, run_directory: Path, fault: str, failing_rank: int
) -> None:
    """EIO on one rank: nobody falls back, nothing is set aside, and the run goes on once the
    disk answers.
    """
    job: dict[str, Any] = {"config": run_config(data, 7, ZERO3), "directory": run_directory}
    told = two_ranks.run(REFUSAL, **job, failing_rank=failing_rank, fault=fault)
    assert told[0] == told[1]
    assert re.search(
        rf"step_00000006: cannot be read \(.*Input/output error: .*rank_0000\d_\d+.safetensors'\); "
        rf"start again when its disk works \(rank {failing_rank}\)",
        told[0],
    )
    assert complete_steps(checkpoints(run_directory)) == [6, 4]
    assert two_ranks.run(REFUSAL, **job) == ["started at step 6"] * 2


def test_a_directory_that_hosts_do_not_share_is_no_damage(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    """Whichever host has the checkpoints: nothing is set aside, and the run does not start from
    zero.
    """
    job: dict[str, Any] = {"config": run_config(data, 7, ZERO3), "directory": run_directory}
    for told in two_ranks.run("tests.support.jobs.checkpoint:refusal_unless_shared", **job):
        assert re.search(
            r"data 1, .*does not see .*another_disk/checkpoints/step_00000006; put the run "
            r"directory on",
            told,
        )
    assert complete_steps(checkpoints(run_directory)) == [6, 4]
    elsewhere = run_directory.with_name("another_disk")
    run_directory.rename(elsewhere)
    for told in two_ranks.run("tests.support.jobs.checkpoint:refusal_unless_shared", **job):
        assert re.search(
            r"/checkpoints: .*data 1, .*sees checkpoints of steps \[6, 4\], rank 0 sees none; put "
            r"the run dir",
            told,
        )


def test_a_checkpoint_of_another_format_is_left_alone(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    """A newer version of this program wrote it: no damage, and no reason to lose the steps that
    it holds.
    """
    manifest = newest(run_directory) / MANIFEST
    manifest.write_text(
        as_attacker(manifest.read_text(), '"format_version": 1', '"format_version": 7')
    )
    job: dict[str, Any] = {"config": run_config(data, 7, ZERO3), "directory": run_directory}
    told = two_ranks.run(REFUSAL, **job)
    assert told[0] == told[1]
    assert (
        "step_00000006/manifest.json: wrong format (found 7, this version of megagpt needs 1); "
        "continue with the" in told[0]
    )
    with pytest.raises(UserError, match="found 7"):
        open_checkpoint(run_directory)
    assert complete_steps(checkpoints(run_directory)) == [6, 4]
    command = told[0].partition("without this checkpoint: ")[2]
    subprocess.run(command, shell=True, check=True)  # noqa: S602  as a user would type it
    assert two_ranks.run(REFUSAL, **job) == ["started at step 4"] * 2


def test_hashing_is_shared_by_bytes_whoever_wrote() -> None:
    """Files stay with the rank of their writer's number while that is fair."""

    def share(bytes_of_files: dict[str, int], ranks: int) -> list[list[str]]:
        files = {
            f"rank_{name}.safetensors": StoredFile(size, "0" * 64)
            for name, size in bytes_of_files.items()
        }
        shares = hashing_shares(files, ranks)
        assert sorted(name for names in shares for name in names) == sorted(files)
        return [[name[5:14] for name in names] for names in shares]

    alike = {"00000_000": 101, "00000_001": 50, "00001_000": 100, "00001_001": 50}
    assert share(alike, 2) == [["00000_000", "00000_001"], ["00001_000", "00001_001"]]
    assert share(dict.fromkeys(["00000_000", "00000_001", "00000_002", "00000_003"], 9), 2) == [
        ["00000_000", "00000_001"],
        ["00000_002", "00000_003"],
    ]
    assert [len(names) for names in share({f"00000_00{index}": 7 for index in range(8)}, 4)] == [
        2,
        2,
        2,
        2,
    ]
    assert share({"00000_000": 5}, 3) == [["00000_000"], [], []]
    assert share({}, 2) == [[], []]


def test_a_checkpoint_that_verifies_and_does_not_load_is_passed_over(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    """One rank cannot read what it needs; the other must not go on without it."""
    manifest = read_manifest(newest(run_directory))
    files = {piece.file for tensor in manifest.tensors.values() for piece in tensor.slices}
    lost = next(iter(sorted(files, reverse=True)))
    tensors = {
        name: replace(tensor, slices=tuple(piece for piece in tensor.slices if piece.file != lost))
        for name, tensor in manifest.tensors.items()
    }
    (newest(run_directory) / MANIFEST).write_text(replace(manifest, tensors=tensors).to_json())
    ranks = two_ranks.run(TRAIN, config=run_config(data, 6, ZERO3), directory=run_directory)
    assert [rank["first_step"] for rank in ranks] == [4, 4]


def test_a_checkpoint_of_another_run_is_refused(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    manifest = read_manifest(newest(run_directory))
    identity = manifest.identity | {"optimizer.params.lr": 0.5}
    (newest(run_directory) / MANIFEST).write_text(replace(manifest, identity=identity).to_json())
    told = two_ranks.run(REFUSAL, config=run_config(data, 7, ZERO3), directory=run_directory)
    assert told[0] == told[1]
    assert re.search(
        r"step_00000006: another run saved it:\n  optimizer.params.lr: 0.5 .*--run_dir",
        told[0],
        re.DOTALL,
    )


def test_a_parameter_of_another_shape_is_not_read(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    manifest = read_manifest(newest(run_directory))
    name, tensor = next(
        (name, tensor) for name, tensor in manifest.tensors.items() if len(set(tensor.shape)) > 1
    )
    turned = {**manifest.tensors, name: replace(tensor, shape=tensor.shape[::-1])}
    (newest(run_directory) / MANIFEST).write_text(replace(manifest, tensors=turned).to_json())
    told = two_ranks.run(REFUSAL, config=run_config(data, 7, ZERO3), directory=run_directory)
    assert told == ["started at step 4"] * 2


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    for step in (4, 6):
        truncate(step_directory(checkpoints(run_directory), step) / "rank_00000_000.safetensors")
    before = sorted(path.relative_to(run_directory) for path in run_directory.rglob("*"))
    (first, second) = two_ranks.run(
        REFUSAL, config=run_config(data, 7, ZERO3), directory=run_directory
    )
    assert first == second
    assert "every checkpoint is damaged" in first
    assert "step_00000004/rank_00000_000.safetensors: " in first
    assert "--run_dir" in first
    assert sorted(path.relative_to(run_directory) for path in run_directory.rglob("*")) == before


# --------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("failing_rank", "fault", "reason"),
    [
        (
            0,
            "full_disk",
            r"a checkpoint needs .*KiB, the disk has 1000 B.*free some space .*removed: "
            r".*/step_00000004\)",
        ),
        (
            1,
            "small_files",
            r"rank_00001_000.safetensors: .*a checkpoint needs .*KiB, the disk has .*\(rank 1\)",
        ),
        (0, "small_files", r"rank_00000_000.safetensors: .*\(rank 0\)"),
    ],
)
def test_a_save_that_fails_on_one_rank_ends_on_all_and_leaves_the_last_one(
    two_ranks: RankPool, data: Path, run_directory: Path, failing_rank: int, fault: str, reason: str
) -> None:
    told = two_ranks.run(
        "tests.support.jobs.checkpoint:failing_save",
        config=run_config(data, 7, ZERO3, save_every=0),
        directory=run_directory,
        failing_rank=failing_rank,
        fault=fault,
        deadline_s=60,
    )
    assert told[0] == told[1]
    assert re.search(reason, told[0], re.DOTALL), told[0]
    assert complete_steps(checkpoints(run_directory)) == [6, 4]
    assert not list(checkpoints(run_directory).glob(".staging_*"))
    assert open_checkpoint(run_directory).manifest.state.step == 6


def test_a_weight_that_is_not_finite_is_never_saved(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    config = run_config(data, 7, ZERO3, save_every=0)
    told = two_ranks.run(
        "tests.support.jobs.checkpoint:spoilt_save",
        config=config,
        directory=run_directory,
        spoilt_rank=1,
    )
    assert told[0] == told[1]
    assert re.search(
        r"weight/.*: not finite, so nothing was saved; .* lower optimizer.params.lr .*\(rank 1\)",
        told[0],
    )
    assert complete_steps(checkpoints(run_directory)) == [6, 4]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: room for one checkpoint of the test's model and the half of
    another.
    """
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.rotate(2)
@pytest.mark.parametrize("fault", ["full_disk", "unforeseen_space"])
def test_a_disk_that_fills_up_costs_no_checkpoint(
    two_ranks: RankPool, data: Path, small_disk: Path, fault: str
) -> None:
    """Found by the look before the save, or by the disk itself in the middle of it."""
    run = small_disk / "run"
    two_ranks.run(TRAIN, config=run_config(data, 1, ZERO3), directory=run)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
    told = two_ranks.run(
        "tests.support.jobs.checkpoint:failing_save",
        config=run_config(data, 2, ZERO3, save_every=0),
        directory=run,
        failing_rank=0,
        fault=fault,
    )
    assert "free some space" in told[1]
    assert open_checkpoint(run).manifest.state.step == 1
    (small_disk / "ballast").unlink()
    ranks = two_ranks.run(TRAIN, config=run_config(data, 2, ZERO3), directory=run)
    assert (ranks[0]["first_step"], ranks[0]["state"].step) == (1, 2)


@pytest.mark.rotate(2)
@pytest.mark.parametrize(("fault", "saved_step"), [("full_at_manifest", 1), ("full_at_latest", 2)])
def test_a_disk_that_fills_up_as_a_save_is_committed(
    two_ranks: RankPool, data: Path, small_disk: Path, fault: str, saved_step: int
) -> None:
    """Without its manifest it is no checkpoint; without ``latest`` it is one, and rank 0 warns
    only.
    """
    run = small_disk / "run"
    two_ranks.run(TRAIN, config=run_config(data, 1, ZERO3), directory=run)
    told = two_ranks.run(
        "tests.support.jobs.checkpoint:failing_save",
        config=run_config(data, 2, ZERO3, save_every=0),
        directory=run,
        failing_rank=0,
        fault=fault,
    )
    warned = (two_ranks.directory / "output_0").read_text()
    said = (
        told[1]
        if saved_step == 1
        else next(line for line in warned.splitlines() if "is complete, but" in line)
    )
    assert re.search(
        r"No space left on device.*a checkpoint needs .* KiB, the disk has 0 B", said, re.DOTALL
    ), said
    assert (told[1] == "saved") == (saved_step == 2)
    assert open_checkpoint(run).manifest.state.step == saved_step
    assert not list(checkpoints(run).glob(".*"))
    for ballast in run.rglob("ballast"):
        ballast.unlink()
    ranks = two_ranks.run(TRAIN, config=run_config(data, 3, ZERO3, save_every=0), directory=run)
    assert (ranks[0]["first_step"], ranks[0]["state"].step) == (saved_step, 3)


# ------------------------------------------------------------------------------------- killed saves

QUICK = [("within a file", 1), ("after the manifest", 0)]
SLOW = [(point, rank) for point in EVERY_RANK for rank in (0, 1)] + [(point, 0) for point in RANK_0]
KILLS = [
    *QUICK,
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in QUICK),
]
COMMITTED = ("after the rename", "before latest", "while retiring", "after the commit")


@pytest.mark.rotate(2)
@pytest.mark.parametrize(("point", "victim"), KILLS)
def test_a_rank_killed_during_a_save_costs_no_sound_checkpoint(
    two_ranks: RankPool, data: Path, tmp_path: Path, point: str, victim: int
) -> None:
    """kill -9: the resumed run picks the newest checkpoint that was committed, and clears away the
    rest.

    Once every rank has reported, rank 0 commits by itself: a rank 1 that is killed meanwhile costs
    nothing.
    """
    config = run_config(data, 6, ZERO3, save_every=2)
    codes = train_and_die(config, tmp_path, victim, point)
    assert codes[victim] == -9
    committed = point in COMMITTED or (point, victim) == ("after the report", 1)
    ranks = two_ranks.run(
        TRAIN, config=run_config(data, 7, ZERO3, save_every=0), directory=tmp_path
    )
    assert [rank["first_step"] for rank in ranks] == [6 if committed else 4] * 2
    assert ranks[0]["state"].step == 7
    left = {path.name for path in checkpoints(tmp_path).iterdir()}
    assert left <= {"latest", "step_00000002", "step_00000004", "step_00000006"}
