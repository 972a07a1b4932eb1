"""Examine one host: software, code, memory, disks and devices. Standard library only.

`preflight/checks.py` sends this file to the Python of each host through ssh's standard input, with
a call of `answer` appended. So it works on hosts without the code, and no request appears on a
command line.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "deepspeed", "triton", "numpy", "safetensors", "pydantic")
SOURCES = ("megagpt", "kernels")


def answer(request: dict[str, Any]) -> None:
    """Do one task and print its result as the only line on standard output.

    What libraries print goes to standard error.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        result = TASKS[request.pop("task")](**request)
        print(json.dumps(result), file=out)


def facts(
    directory: str,
    run_directory: str,
    disks: list[str],
    variables: dict[str, str],
    ops: dict[str, list[str]],
) -> dict[str, Any]:
    """Return everything that a run in `directory` depends on.

    ``ops`` are the ops that it needs, by type of device.
    """
    os.environ.update(variables)
    found = {
        "name": socket.gethostname(),
        "machine": _machine(),
        "clock_s": time.time(),
        "directory": Path(directory).is_dir(),
        "software": {
            "Python": platform.python_version(),
            **{name: _version(name) for name in LIBRARIES},
        },
        "memory_bytes": _available_memory(),
        "memlock_bytes": _lockable_memory(),
        "pins": os.environ.get("DS_PIN_MEMORY_BACKEND", "torch").strip().lower(),
        "shared_memory_bytes": _free("/dev/shm"),
        "place": _place(run_directory),
        "disks": {path: _place(path) for path in disks},
    }
    if not found["directory"]:
        return found
    os.chdir(directory)
    sys.path.insert(0, directory)
    return found | {
        "code": code_fingerprint([Path(directory, name) for name in SOURCES]),
        **_devices(ops),
    }


def code_fingerprint(directories: Sequence[Path]) -> str:
    """Return a SHA-256 of the Python files' names and contents, independent of their location."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.rglob("*.py")):
            content = path.read_bytes()
            digest.update(
                f"{path.relative_to(directory.parent)} {len(content)}\n".encode() + content
            )
    return digest.hexdigest()


def leave_mark(path: str) -> bool:
    """Create a small file that the other hosts look for."""
    Path(path).touch()
    return True


def see_mark(path: str) -> bool:
    """Return whether another host's file is visible; listing the directory refreshes NFS."""
    return Path(path).name in os.listdir(Path(path).parent)


def wipe_mark(path: str) -> bool:
    """Remove the file."""
    Path(path).unlink(missing_ok=True)
    return True


TASKS: dict[str, Callable[..., Any]] = {
    "facts": facts,
    "leave_mark": leave_mark,
    "see_mark": see_mark,
    "wipe_mark": wipe_mark,
}


def _machine() -> str:
    """Return an id of this machine: two host names may mean the same one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
    )


def _lockable_memory() -> int | None:
    """Return the bytes that a process may lock; None: any number, or not known."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _free(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _place(path: str) -> dict[str, Any]:
    """Return the nearest existing directory, whether it is writable, and its free space."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return {
        "path": str(place),
        "writable": os.access(place, os.W_OK | os.X_OK),
        "free_bytes": _free(str(place)),
    }


def _state_of(op: str) -> str:
    from megagpt.parallel import ops

    return ops.missing_tools(op) or ("built" if ops.is_built(op) else "not yet")


def _devices(needed: dict[str, list[str]]) -> dict[str, Any]:
    """Return the devices that torch sees, and for each op whether it is or can be compiled."""
    try:
        import torch

        from megagpt.parallel import ops
        from megagpt.parallel.device import announce_to_deepspeed

        count = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(index) for index in range(count)]
        announce_to_deepspeed()
        ops.use_private_extensions()
        states = {op: _state_of(op) for op in needed["cuda" if count else "cpu"]}
    except Exception as error:  # any import error is a finding
        return {"failure": f"{type(error).__name__}: {error}"}
    return {"devices": names, "ops": states}
