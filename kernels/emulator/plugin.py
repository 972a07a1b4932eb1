"""Run tests of kernels on the emulator: ``python -m pytest -p kernels.emulator.plugin FILE``.

Triton's kernels are compiled for ``--emulate sm_90`` (or sm_80) and run on the tests' CPU tensors.
Each test has an order of warps and a timing of its own, which follow from its name. A test fails if
the emulator found anything but what ``KNOWN`` explains.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import pytest

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports triton

# Findings that are not the kernels' faults, and why they do no harm.
KNOWN = {
    "wgmma multiplies registers written since the last wgmma.fence": (
        "Triton computes a product's first operand behind its fence, which the manual forbids "
        "(triton-lang/triton#9433); ptxas orders both by its own analysis"
    ),
    "threads of a warp write different values to one place": (
        "LLVM fuses a square into the first step of a sum over threads, so threads that hold one "
        "sum may differ in its last bit; each of them is as right"
    ),
}
_CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the emulated GPU."""
    parser.addoption("--emulate", choices=sorted(_CAPABILITIES), default="sm_90", help="the GPU")
    parser.addoption(
        "--timing", choices=("early", "late", "mixed"), help="of asynchronous work [by the test]"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let Triton use the emulator until the session ends."""
    import kernels.dispatch
    from kernels.emulator.driver import emulated

    kernels.dispatch.INTERPRETED = True  # MEGAGPT_KERNELS=interpret then sends CPU tensors here
    context = emulated(_CAPABILITIES[config.getoption("--emulate")])
    config.emulated_gpu = context.__enter__()  # type: ignore[attr-defined]
    config.emulated_launches = Counter()  # type: ignore[attr-defined]
    config.add_cleanup(partial(_leave, context))


def _leave(context: AbstractContextManager[object]) -> None:
    context.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[object]:
    """Give the test a schedule of its own, and look at what was found."""
    from kernels.emulator.machine import TIMINGS, Schedule

    gpu = request.config.emulated_gpu  # type: ignore[attr-defined]
    seed = zlib.crc32(request.node.nodeid.encode())
    timing = request.config.getoption("--timing") or TIMINGS[seed % len(TIMINGS)]
    gpu.schedule = Schedule(timing, seed)
    gpu.launches.clear()
    yield gpu
    counts = request.config.emulated_launches  # type: ignore[attr-defined]
    counts.update(done.kernel for done in gpu.launches)
    found = [f"{kernel}: {f}" for kernel, f in gpu.findings if f.kind not in KNOWN]
    assert not found, "\n".join(found)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how often each kernel ran."""
    counts = config.emulated_launches  # type: ignore[attr-defined]
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    terminalreporter.write_line(f"emulated {config.getoption('--emulate')}: {listed or 'nothing'}")
