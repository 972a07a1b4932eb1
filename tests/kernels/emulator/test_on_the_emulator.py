"""Compiled kernels run without a GPU: the tests marked ``emulated``, in a process that compiles.

This process interprets kernels, and Triton cannot do both in one. ``make test`` runs a selection,
other cases each day; the slow tests run all of them, and the kernels' other tests too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GPUS = ("sm_80", "sm_90")
OWN = ("emulator/test_shipped_kernels.py", "test_hopper_attention.py")
OTHERS = (
    "test_activations.py", "test_attention.py", "test_cross_entropy.py", "test_dropout.py",
    "test_norms.py", "test_rotary.py",
)  # fmt: skip
DIRECTORY = Path(__file__).parents[1]


def emulate(gpu: str, *arguments: str, timeout_s: int) -> None:
    """Run tests on the emulator; they must pass, and some must run."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRITON_INTERPRET", "MEGAGPT_KERNELS", "PYTEST_ADDOPTS")
        and not key.startswith("PYTEST_XDIST")
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "kernels.emulator.plugin", "--emulate", gpu, "-q",
         "-p", "no:cacheprovider", *arguments],
        env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
        cwd=DIRECTORY.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"emulated {gpu}: " in done.stdout
    assert f"emulated {gpu}: nothing" not in done.stdout


@pytest.mark.parametrize("gpu", GPUS)
def test_a_selection(gpu: str, request: pytest.FixtureRequest) -> None:
    rotation = request.config.getoption("rotation") or 0
    files = [str(DIRECTORY / name) for name in (OWN if gpu == "sm_90" else OWN[:1])]
    emulate(
        gpu, "-m", "emulated and not slow", "--rotation", str(rotation), *files, timeout_s=900
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("file", [*OWN, "emulator/test_mutations.py"])
def test_all_that_is_for_the_emulator_alone(file: str, gpu: str) -> None:
    if (file, gpu) == ("test_hopper_attention.py", "sm_80"):
        pytest.skip("for compute capability 9.0 alone")
    emulate(gpu, "-m", "emulated", str(DIRECTORY / file), timeout_s=7200)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("file", OTHERS)
def test_the_kernels_own_tests(file: str, gpu: str) -> None:
    """Those that the interpreter runs, on what was compiled."""
    emulate(gpu, "-m", "not slow and not gpu", str(DIRECTORY / file), timeout_s=7200)
