"""Where the kernels' tests run: the GPU (``-m gpu``) where there is one, Triton's interpreter
elsewhere.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.ranks import RankPool

if TYPE_CHECKING:
    from tests.support.processes import Start

HAS_GPU = torch.cuda.is_available()
PROCESSES = {"pools", "compiled_ops"}  # fixtures of tests that wait for processes of their own
if not HAS_GPU:
    # Before anything imports triton, which decorates its own library once: a DeepSpeed import in
    # another test may.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rotation",
        type=int,
        metavar="N",
        help="of the cases of tests marked rotate(K), run every K-th, from the N-th on [all]",
    )
    parser.addoption(
        "--one_case_in",
        type=int,
        default=1,
        metavar="K",
        help="with --rotation: as if tests were marked rotate(K), except both_stacks [1]",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    number = config.getoption("rotation")
    return None if number is None else f"rotation: {number} (repeat with --rotation {number})"


@pytest.hookimpl(trylast=True)  # after -m and -k have left out theirs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only the emulator runs, and the cases that are another day's turn. Files
    that start ranks or commands come first, the longest before others, so that workers end
    together.
    """
    on_emulator = config.pluginmanager.hasplugin("kernels.emulator.plugin")
    elsewhere = [item for item in items if _runs_elsewhere(item, on_emulator)]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in set(elsewhere)]
    if (number := config.getoption("rotation")) is not None:
        others = others_turn(items, number, config.getoption("one_case_in"))
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    waiting = Counter(
        item.path for item in items if PROCESSES.intersection(getattr(item, "fixturenames", ()))
    )
    items.sort(key=lambda item: (-waiting[item.path], item.path))


def _runs_elsewhere(item: pytest.Item, on_emulator: bool) -> bool:
    """Some tests need the emulator; on it none starts ranks, which would run without it."""
    if on_emulator:
        return not PROCESSES.isdisjoint(getattr(item, "fixturenames", ()))
    return item.get_closest_marker("emulated") is not None


def others_turn(items: list[pytest.Item], number: int, one_in: int) -> list[pytest.Item]:
    """The cases of tests marked rotate(K) that do not run under this number: K numbers in a row
    run all. Of other tests one case in ``one_in`` runs, of those marked both_stacks all.
    """
    seen: Counter[str] = Counter()
    cases = Counter(_test_of(item) for item in items)
    others = []
    for item in items:
        test = _test_of(item)
        mark = item.get_closest_marker("rotate")
        usual = 1 if item.get_closest_marker("both_stacks") else one_in
        turns = min(cases[test], max(usual, mark.args[0] if mark else 1))
        if (seen[test] + number) % turns:
            others.append(item)
        seen[test] += 1
    return others


def _test_of(item: pytest.Item) -> str:
    """The id of a test without that of the case."""
    return item.nodeid.partition("[")[0]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of the GPU say why they do not run."""
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("no CUDA device here")


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_GPU else "cpu"])
def fused_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which ``kernels.*`` must run the Triton functions, with the launch counters at
    zero.
    """
    from kernels.launcher import reset_launches

    monkeypatch.setenv("MEGAGPT_KERNELS", "triton" if HAS_GPU else "interpret")
    monkeypatch.setenv(
        "MEGAGPT_HOPPER", "0"
    )  # the portable kernels; tests/kernels/test_hopper_attention.py has the other
    reset_launches()
    return str(request.param)


@pytest.fixture(params=["fused", "torch"])
def mode_of_bad_input(
    request: pytest.FixtureRequest, fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused, is refused whichever implementation would run."""
    if request.param == "torch":
        monkeypatch.setenv("MEGAGPT_KERNELS", "torch")


class _Pools:
    """One pool a size for the whole session, replaced where a test ended it."""

    def __init__(self) -> None:
        self.by_size: dict[int, RankPool] = {}

    def get(self, world_size: int) -> RankPool:
        pool = self.by_size.get(world_size)
        if pool is None or not pool.alive:
            pool = self.by_size[world_size] = RankPool(world_size)
        return pool

    def close(self) -> None:
        for pool in self.by_size.values():
            pool.close()


@pytest.fixture(scope="session")
def compiled_ops() -> None:
    """DeepSpeed's ops, compiled before any rank starts: minutes the first time, no deadline, a
    visible message.
    """
    build_ops("CPUAdamBuilder")


@pytest.fixture(scope="session")
def nvme(compiled_ops: None) -> None:
    """What NVMe offload needs; skips where libaio's headers are absent."""
    try:
        build_ops("AsyncIOBuilder")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no NVMe offload here: {error.stderr.strip().splitlines()[-1]}")


def build_ops(*ops: str) -> None:
    """In a process of its own, as DeepSpeed's import changes what the kernels' tests see."""
    code = f"from megagpt.parallel import ops; ops.use_private_extensions(); ops.build({list(ops)})"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="session")
def pools(compiled_ops: None) -> Iterator[_Pools]:
    found = _Pools()
    yield found
    found.close()


@pytest.fixture
def one_rank(pools: _Pools) -> RankPool:
    return pools.get(1)


@pytest.fixture
def four_ranks(pools: _Pools) -> RankPool:
    return pools.get(4)


@pytest.fixture
def eight_ranks(pools: _Pools) -> RankPool:
    return pools.get(8)


@pytest.fixture
def two_ranks(pools: _Pools) -> RankPool:
    return pools.get(2)


@pytest.fixture
def start(compiled_ops: None) -> "Iterator[Start]":
    """Starts training commands that do not outlive the test."""
    from tests.support.processes import (
        starter,
    )  # what training needs: the kernels' tests run where it is not installed

    with starter() as start_one:
        yield start_one
