"""The hash of a base's weights: the same however they are stored, another for other weights."""

import json
from pathlib import Path

import pytest

from megagpt.checkpoint import base_weights
from megagpt.checkpoint.base_weights import combined, hashes, open_proven
from megagpt.checkpoint.format import MANIFEST, read_manifest, step_directory
from megagpt.checkpoint.reader import Reader
from megagpt.utils import UserError
from tests.support.trained_run import write_dataset, write_run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """At each step other weights."""
    return write_run(tmp_path / "base", write_dataset(tmp_path / "dataset"), steps=(10, 20))


def hash_of(run: Path, step: int) -> str:
    checkpoint = step_directory(run / "checkpoints", step)
    reader = Reader(checkpoint, read_manifest(checkpoint))
    return combined(hashes(reader, reader.manifest.tensors))


def test_the_hash_is_of_the_weights_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = hash_of(base, 10), hash_of(base, 20)
    assert first != second
    monkeypatch.setattr(base_weights, "PIECE", 1000)
    assert hash_of(base, 10) == first
    manifest = json.loads((step_directory(base / "checkpoints", 10) / MANIFEST).read_text())
    other = write_run(tmp_path / "other", base.parent / "dataset" / "data", steps=(10,))
    again = json.loads((step_directory(other / "checkpoints", 10) / MANIFEST).read_text())
    assert hash_of(other, 10) == first
    assert manifest["files"] == again["files"]


def test_other_weights_and_damage_are_refused_in_one_line(base: Path) -> None:
    checkpoint = step_directory(base / "checkpoints", 20)
    assert open_proven(checkpoint, hash_of(base, 20))
    with pytest.raises(UserError, match="the adapters are of another base") as refused:
        open_proven(checkpoint, hash_of(base, 10))
    assert len(str(refused.value).splitlines()) == 1
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    expected = hash_of(base, 20)
    file.write_bytes(content)
    with pytest.raises(UserError, match="the adapters are of another base"):
        open_proven(checkpoint, expected)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        open_proven(checkpoint, expected)
