"""DeepSpeed's compiled ops: which ones a run needs, and how they are built once, visibly.

DeepSpeed compiles an op on first use, minutes into a start, silently, and on every rank at once.
Here one process per host builds, in a directory of this environment, while the others wait. A lock
left by a killed build is reported instead of waited for.
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
from megagpt.parallel import op_cache
from megagpt.utils import RankEnvironment, UserError, human_duration

EXTENSIONS_VARIABLE = "TORCH_EXTENSIONS_DIR"
NOTICE_S = 5.0
PAUSE_S = 0.1
BUILT_FOR_CUDA = ("FusedAdamBuilder", "AsyncIOBuilder")
STALE_LOCK_AGE_S = 15 * 60  # the longest build seen took 3 minutes on two cores

log = logging.getLogger(__name__)


def use_private_extensions() -> None:
    """Point torch's extension cache at this environment's own directory, unless the user chose one.

    Environments that share a cache rebuild each other's ops every time. Ops are compiled for the
    exact processor (-march=native), so the directory is named after the processor's features.
    """
    if EXTENSIONS_VARIABLE not in os.environ:
        os.environ[EXTENSIONS_VARIABLE] = str(_private_directory())
    _prefer_own_ninja()


def _prefer_own_ninja() -> None:
    """Put this environment's ninja first in PATH, even if the environment is not activated.

    For example with `.venv/bin/python launch/train.py`. Two releases of ninja cannot read each
    other's logs: each would rebuild, for minutes, what the other has built.
    """
    own = str(Path(sys.executable).parent)
    search = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if search[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *search])


def _private_directory() -> Path:
    prefix = Path(sys.prefix)
    if os.access(prefix, os.W_OK):
        return prefix / "torch_extensions" / op_cache.processor()
    environment = hashlib.sha256(str(prefix).encode()).hexdigest()[:8]
    return Path.home() / ".cache" / "megagpt" / environment / op_cache.processor()


def needed_ops(config: RunConfig, device_type: str) -> list[str]:
    """Return the builders of the compiled ops that this optimizer and offload will call."""
    zero = config.zero_optimization
    devices = {
        part.device for part in (zero.offload_optimizer, zero.offload_param) if part is not None
    }
    optimizer_offloaded = (
        zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
    )
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
    """Return whether a run can do without an op.

    torch's Adam can replace DeepSpeed's; nothing replaces NVMe offload.
    """
    return op != "AsyncIOBuilder"


def missing_tools(op: str) -> str | None:
    """Return why an op cannot be compiled here, in words; None if it can be, or is built."""
    if is_built(op):
        return None
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler (Debian, Ubuntu: apt install g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's own headers are missing (Debian, Ubuntu: apt install python3-dev)"
    if op == "AsyncIOBuilder" and not _builder(op).is_compatible(verbose=False):
        return "libaio's headers are missing (Debian, Ubuntu: apt install libaio-dev)"
    return _missing_of_cuda() if op in BUILT_FOR_CUDA and _builds_for_cuda() else None


def require_tools(ops: list[str]) -> None:
    """Raise UserError if an op without a substitute is not built and cannot be built.

    Imports DeepSpeed.
    """
    for op in ops:
        if not has_substitute(op) and (reason := missing_tools(op)):
            raise UserError(
                f"zero_optimization: offload to NVMe needs DeepSpeed's {_name(op)}, but {reason}"
            )


def _builds_for_cuda() -> bool:
    """Return whether DeepSpeed compiles these ops against CUDA.

    It does if torch can use a GPU and DeepSpeed's accelerator is cuda (op_builder/builder.py:580,
    op_builder/cpu/async_io.py).
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    return (
        torch.version.cuda is not None
        and torch.cuda.is_available()
        and get_accelerator().device_name() == "cuda"
    )


def _missing_of_cuda() -> str | None:
    """Return what the CUDA toolkit lacks, with the remedy; None if nothing.

    The toolkit is the one that torch found: CUDA_HOME, the place of nvcc, or /usr/local/cuda.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    remedy = (
        f"install NVIDIA's CUDA toolkit {torch.version.cuda} "
        f"(https://developer.nvidia.com/cuda-downloads) and "
        "export CUDA_HOME=/usr/local/cuda (or its directory)"
    )
    if CUDA_HOME is None:
        return f"there is no CUDA toolkit; {remedy}"
    # DeepSpeed asks nvcc for its version also where nvcc has nothing to compile
    # (op_builder/builder.py:893).
    for needed in ("bin/nvcc", "include/cuda_runtime_api.h"):
        if not Path(CUDA_HOME, needed).exists():
            return f"the CUDA toolkit in {CUDA_HOME} has no {needed}; {remedy}"
    return None


def build(ops: list[str]) -> None:
    """Compile and load each op, or load it from the cache.

    Several processes may call it at once.
    """
    for op in ops:
        started = time.monotonic()
        with _one_builder(op):
            if op_cache.load(_builder(op), _op_directory(op)):
                continue
            if is_built(op):
                _load(op)
                continue
            _say(f"compiling DeepSpeed's {_name(op)} (once, 1 to 3 minutes) ...")
            _load(op)
            _say(f"{_name(op)} ready after {human_duration(time.monotonic() - started)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load(op: str) -> None:
    """Let DeepSpeed load an op, which compiles what is not compiled, and stamp it."""
    builder = _builder(op)
    try:
        builder.load(verbose=False)
    except Exception as error:  # the compiler and the loader raise many types
        raise UserError(
            f"DeepSpeed's {_name(op)}: build failed: {error}\nsee the compiler's output above"
        ) from error
    op_cache.record(builder, _op_directory(op))


def _builder(op: str):  # type: ignore[no-untyped-def]  # DeepSpeed's builders have no common public type
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder(op)


def _name(op: str) -> str:
    return op.removesuffix("Builder")


def _op_directory(op: str) -> Path:
    return Path(os.environ[EXTENSIONS_VARIABLE]) / _builder(op).name


def is_built(op: str) -> bool:
    """Return whether an op is already compiled."""
    return any(_op_directory(op).glob("*.so"))


@contextmanager
def _one_builder(op: str) -> Iterator[None]:
    """Let one process of this host at a time build the op.

    The kernel releases the lock when its holder dies, however it dies.
    """
    directory = _op_directory(op)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".megagpt_lock").open("a+") as ours:
        _take(ours, op)
        _clear_stale_lock(directory / "lock")
        yield


def _take(lock: TextIO, op: str) -> None:
    """Wait for the process that is compiling the op, then write this process id into the lock.

    The first rank reports a holder that takes longer than ``NOTICE_S``.
    """
    speaks = RankEnvironment.read().is_first_of_host
    notice_at = time.monotonic() + NOTICE_S if speaks else math.inf
    while not _locked(lock):
        if time.monotonic() > notice_at:
            notice_at = math.inf
            lock.seek(0)
            holder = lock.read().strip()
            _say(
                f"waiting for process {holder}, which is compiling DeepSpeed's {_name(op)} (to "
                f"stop it: kill {holder})"
            )
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
    """Remove the lock file that a killed build left in torch's cache; raise if it may be in use.

    torch would wait for that file silently and for ever.
    """
    try:
        age_s = time.time() - torch_lock.stat().st_mtime
    except FileNotFoundError:
        return
    if Path(os.environ[EXTENSIONS_VARIABLE]) == _private_directory() or age_s > STALE_LOCK_AGE_S:
        # In our own directory nobody else builds while we hold our lock; in another directory no
        # build takes this long.
        log.warning("removed %s, left by a build killed %s ago", torch_lock, human_duration(age_s))
        torch_lock.unlink(missing_ok=True)
        return
    raise UserError(
        f"another process has been compiling this op for {human_duration(age_s)} (lock: "
        f"{torch_lock}); if none is running: rm {torch_lock}"
    )
