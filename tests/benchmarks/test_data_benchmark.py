"""The benchmark of the preparation of data runs, and its contenders give the same tokens."""

import os
from pathlib import Path

import pytest

from benchmarks.data import (
    LIBRARY,
    LIBRARY_BATCH,
    MAP,
    OURS,
    PLAIN,
    compare,
    compare_model,
    memory,
)


def test_the_contenders_give_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compare` itself raises if they do not."""
    monkeypatch.setattr(os, "environ", os.environ)  # `datasets.map` puts another object there
    rows = compare(tmp_path, 200_000, rounds=1, workers=1)
    assert [row["contender"] for row in rows] == [PLAIN, MAP, OURS]
    assert all(float(row["mb_per_processor_s"]) > 0 for row in rows)


def test_a_models_tokenizer_gives_the_tokens_of_the_library(tmp_path: Path) -> None:
    rows = compare_model(tmp_path, 100_000, rounds=1, workers=1)
    assert [row["contender"] for row in rows] == [LIBRARY, LIBRARY_BATCH, OURS]
    assert all(row["tokens_per_processor_s"] > 0 for row in rows)


def test_the_peak_of_a_process_is_reported(tmp_path: Path) -> None:
    row = memory(tmp_path, 1)
    assert 20 < float(row["peak_memory_mib"]) < 1000
    assert float(row["text_mb"]) >= 1
