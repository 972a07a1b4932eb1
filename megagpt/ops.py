"""DeepSpeed's compiled ops: which ones a run needs, built once, visibly, in a directory of their own.

DeepSpeed compiles an op when it is first used, minutes into a start, silently, and every rank at once. Here one process
of a host builds while the others wait; a lock that a killed build left behind is named instead of waited for.
"""

import fcntl
import hashlib
import logging
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megagpt.config import RunConfig
from megagpt.utils import UserError, human_duration

EXTENSIONS_VARIABLE = "TORCH_EXTENSIONS_DIR"
NOTICE_S, PAUSE_S = 5.0, 0.1
BUILT_FOR_CUDA = ("FusedAdamBuilder", "AsyncIOBuilder")
STALE_LOCK_AGE_S = 15 * 60  # the longest build seen took 3 minutes on two cores

log = logging.getLogger(__name__)


def use_private_extensions() -> None:
    """Point torch's extension cache at this environment's own directory, unless the user chose one.

    Two environments that share a cache rebuild each other's ops for ever, and ops are compiled for the exact processor
    (-march=native), so the directory belongs to the environment and is named after the processor's features.
    """
    if EXTENSIONS_VARIABLE not in os.environ:
        os.environ[EXTENSIONS_VARIABLE] = str(_private_directory())
    _prefer_own_ninja()


def _prefer_own_ninja() -> None:
    """Let the ninja of this environment build, also where it was not activated (`.venv/bin/python launch/train.py`).

    Two releases of ninja do not read each other's logs: each start over, minutes long, what the other has built.
    """
    own = str(Path(sys.executable).parent)
    search = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if search[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *search])


def _private_directory() -> Path:
    prefix = Path(sys.prefix)
    if os.access(prefix, os.W_OK):
        return prefix / "torch_extensions" / _processor()
    environment = hashlib.sha256(str(prefix).encode()).hexdigest()[:8]
    return Path.home() / ".cache" / "megagpt" / environment / _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "unknown")
    return hashlib.sha256(features.encode()).hexdigest()[:8]


def needed_ops(config: RunConfig, device_type: str) -> list[str]:
    """The builders of the compiled ops that this configuration's optimizer and offload will call."""
    zero = config.zero_optimization
    devices = {part.device for part in (zero.offload_optimizer, zero.offload_param) if part is not None}
    optimizer_offloaded = zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
    ops = []
    if not config.optimizer.params.torch_adam:
        if optimizer_offloaded:
            ops.append("CPUAdamBuilder")
        elif device_type == "cuda":
            ops.append("FusedAdamBuilder")
    if "nvme" in devices:
        ops.append("AsyncIOBuilder")
    return ops


def has_substitute(op: str) -> bool:
    """Whether a run can do without an op: torch's Adam stands in for DeepSpeed's, nothing does for NVMe offload."""
    return op != "AsyncIOBuilder"


def missing_tools(op: str) -> str | None:
    """What keeps an op from being compiled here, in words; None where nothing does."""
    if is_built(op):
        return None
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler (Debian, Ubuntu: apt install g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's own headers are missing (Debian, Ubuntu: apt install python3-dev)"
    return _missing_of_cuda() if op in BUILT_FOR_CUDA and _builds_for_cuda() else None


def require_tools(ops: list[str]) -> None:
    """Raise UserError where an op that nothing stands in for is not built and cannot be; loads DeepSpeed."""
    for op in ops:
        if not has_substitute(op) and (reason := missing_tools(op)):
            raise UserError(f"zero_optimization: offload to NVMe needs DeepSpeed's {_name(op)}, and {reason}")


def _builds_for_cuda() -> bool:
    """Whether DeepSpeed compiles these ops against CUDA: it does where torch can use a GPU, and only for its own
    choice of accelerator (op_builder/builder.py:580, op_builder/cpu/async_io.py)."""
    import torch
    from deepspeed.accelerator import get_accelerator

    return torch.version.cuda is not None and torch.cuda.is_available() and get_accelerator().device_name() == "cuda"


def _missing_of_cuda() -> str | None:
    """Name what is absent of the toolkit that torch found (CUDA_HOME, or the place of nvcc, or /usr/local/cuda)."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    remedy = (
        f"install NVIDIA's CUDA toolkit {torch.version.cuda} (https://developer.nvidia.com/cuda-downloads) and "
        "export CUDA_HOME=/usr/local/cuda, or where it is"
    )
    if CUDA_HOME is None:
        return f"there is no CUDA toolkit; {remedy}"
    # DeepSpeed asks nvcc for its version also where nvcc has nothing to compile (op_builder/builder.py:893).
    for needed in ("bin/nvcc", "include/cuda_runtime_api.h"):
        if not Path(CUDA_HOME, needed).exists():
            return f"the CUDA toolkit in {CUDA_HOME} has no {needed}; {remedy}"
    return None


def build(ops: list[str]) -> None:
    """Compile and load each op, or load it from the cache. Safe to call from several processes at once."""
    for op in ops:
        started = time.monotonic()
        with _one_builder(op):
            if is_built(op):
                _load(op)
                continue
            _say(f"compiling DeepSpeed's {_name(op)}: once, one to three minutes ...")
            _load(op)
            _say(f"{_name(op)} ready after {human_duration(time.monotonic() - started)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load(op: str) -> None:
    try:
        _builder(op).load(verbose=False)
    except Exception as error:  # whatever the compiler or the loader had to say belongs to the reader
        raise UserError(f"DeepSpeed's {_name(op)} did not build: {error}\nsee the compiler's output above") from error


def _builder(op: str):  # type: ignore[no-untyped-def]  # DeepSpeed's builders have no common public type
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(op)
    if op == "AsyncIOBuilder" and not builder.is_compatible(verbose=False):
        raise UserError(
            "NVMe offload needs libaio's headers (Debian, Ubuntu: apt install libaio-dev), then start again"
        )
    return builder


def _name(op: str) -> str:
    return op.removesuffix("Builder")


def _op_directory(op: str) -> Path:
    return Path(os.environ[EXTENSIONS_VARIABLE]) / _builder(op).name


def is_built(op: str) -> bool:
    """Whether an op is compiled already."""
    return any(_op_directory(op).glob("*.so"))


@contextmanager
def _one_builder(op: str) -> Iterator[None]:
    """One process of this host at a time; the kernel frees the lock when its holder dies, however it dies."""
    directory = _op_directory(op)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".megagpt_lock").open("a+") as ours:
        _take(ours, op)
        _clear_stale_lock(directory / "lock")
        yield


def _take(lock: TextIO, op: str) -> None:
    """Wait for the process that compiles the op, and sign as the next. One that hangs is named, by the first rank."""
    notice_at = time.monotonic() + NOTICE_S if os.environ.get("LOCAL_RANK", "0") == "0" else math.inf
    while not _locked(lock):
        if time.monotonic() > notice_at:
            notice_at = math.inf
            lock.seek(0)
            holder = lock.read().strip()
            _say(f"process {holder} compiles DeepSpeed's {_name(op)}: waiting for it (to end it: kill {holder})")
        time.sleep(PAUSE_S)
    lock.truncate(0)
    print(os.getpid(), file=lock, flush=True)


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear_stale_lock(torch_lock: Path) -> None:
    """torch marks a build by a file that a killed build leaves behind, and waits for it silently and for ever."""
    try:
        age_s = time.time() - torch_lock.stat().st_mtime
    except FileNotFoundError:
        return
    if Path(os.environ[EXTENSIONS_VARIABLE]) == _private_directory() or age_s > STALE_LOCK_AGE_S:
        # Nobody else builds in our own directory while we hold our lock; elsewhere no build takes this long.
        log.warning("removed %s, left by a build that was killed %s ago", torch_lock, human_duration(age_s))
        torch_lock.unlink(missing_ok=True)
        return
    raise UserError(
        f"{torch_lock} says that another program is compiling this op since {human_duration(age_s)}. "
        f"If none is: rm {torch_lock}"
    )
