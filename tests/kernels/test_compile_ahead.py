"""Shipped kernels compile for GPUs that are not here: no spills, no serialised wgmma, wide loads;
and never get worse.

In ``make test`` a selection does, in seconds; the slow tests compile all, for each compute
capability.

``tests/kernels/compiled_kernels.csv`` holds every shipped configuration: python -m
kernels.ahead.compiler --write it.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kernels.ahead.compiler import shipped
from kernels.ahead.table import read_table

triton = pytest.importorskip("triton")
TRITONS = ("3.6.0", "3.7.1")  # of the two stacks
TABLE = Path(__file__).with_name("compiled_kernels.csv")
MUST_BE_CLEAN = (
    "attention_forward_64_bf16",
    "attention_backward_keys_64_bf16",
    "layer_norm_768_backward",
    "layer_norm_residual_12288_backward",
    "rms_norm_residual_4096_forward",
)
# They load nothing but rows, of whole 16 bytes. Others load numbers of a row too: its mean, its
# log-sum-exp.
ROWS_ALONE = (
    "attention_forward_64_bf16",
    "rms_norm_residual_4096_forward",
)
ELSEWHERE = (
    "attention_forward_64_bf16",
    "attention_backward_keys_64_bf16",
    "layer_norm_768_backward",
)
CAPABILITIES = (80, 90, 100)
WORSE_WHEN_LARGER = (
    "registers", "spill_bytes", "serialised_wgmma", "narrow_loads", "overwritten_operands",
    "missing_fences",
)  # fmt: skip
WORSE_WHEN_SMALLER = ("wide_loads",)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: this one may interpret kernels, and compiling needs
    one that does not.
    """
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRITON_INTERPRET", "MEGAGPT_KERNELS")
    }
    return subprocess.run(
        [sys.executable, "-m", "kernels.ahead.compiler", *arguments],
        env=inherited | environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def compiled(*arguments: str) -> list[dict[str, Any]]:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_no_worse_than_the_table(rows: list[dict[str, Any]]) -> None:
    table = read_table(TABLE)
    for row in rows:
        known = table[triton.__version__, f"sm_{row['capability']}", row["name"]]
        for key in WORSE_WHEN_LARGER:
            assert row[key] <= known[key], f"{row['name']}: {key} was {known[key]}, is {row[key]}"
        for key in WORSE_WHEN_SMALLER:
            assert row[key] >= known[key], f"{row['name']}: {key} was {known[key]}, is {row[key]}"


def test_what_matters_most_is_clean_on_hopper() -> None:
    rows = compiled("--names", *MUST_BE_CLEAN)
    assert sorted(row["name"] for row in rows) == sorted(MUST_BE_CLEAN)
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["serialised_wgmma"] == 0, row
        assert row["overwritten_operands"] == 0, row
        assert row["missing_fences"] == 0, row
        assert row["wide_loads"] > 0, row
        assert row["narrow_loads"] == 0 or row["name"] not in ROWS_ALONE, row
        assert (row["wgmma"] > 0) == row["name"].startswith("attention"), row
    assert_no_worse_than_the_table(rows)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "100"])
def test_the_main_kernels_compile_for_other_gpus(capability: str) -> None:
    assert_no_worse_than_the_table(compiled("--capability", capability, "--names", *ELSEWHERE))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_table_has_every_shipped_configuration(capability: int) -> None:
    names = {entry.name for entry in shipped() if entry.capability in (None, capability)}
    listed: dict[str, set[str]] = defaultdict(set)
    for version, gpu, name in read_table(TABLE):
        if gpu == f"sm_{capability}":
            listed[version].add(name)
    assert listed == dict.fromkeys(TRITONS, names)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shipped_configuration_is_as_good_as_the_table_says(capability: int) -> None:
    assert_no_worse_than_the_table(compiled("--capability", str(capability)))


def test_a_process_that_interprets_cannot_compile() -> None:
    done = run("--names", MUST_BE_CLEAN[0], TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set; run in a process without it" in done.stderr


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    done = run("--names", "atention")
    assert done.returncode == 2
    assert "unknown configurations ['atention']; known: attention_forward_" in done.stderr
