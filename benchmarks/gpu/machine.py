"""What this machine has, and what every number depends on.

A process of its own asks torch, so that the command itself uses no memory of the GPU.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import assembler
from benchmarks.gpu.case import Case

REPOSITORY = Path(__file__).parent.parent.parent
SOURCES = ("benchmarks", "kernels", "megagpt", "launch", "tests", "ds_configs", "pyproject.toml")
GIB = 2**30
QUESTION_LIMIT_S = 120.0


@dataclass(frozen=True)
class Machine:
    """A device and its host.

    ``device`` is torch's name for it; ``lack`` is why no case at all can run.
    """

    device: str
    name: str
    capability: tuple[int, int] = (0, 0)
    device_gib: float = 0.0  # free now
    cores: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    assembler_problem: str = ""
    lack: str = ""

    def refusal(self, case: Case) -> str:
        """Return why a case cannot run here; empty if it can."""
        if self.lack or case.refusal:
            return self.lack or case.refusal
        missing = [name for name in case.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"missing package; type: pip install {' '.join(missing)}"
        if self.device == "cuda" and self.capability < case.capability:
            return (
                f"compute capability {_dotted(self.capability)} is below {_dotted(case.capability)}"
            )
        if case.compiles and self.assembler_problem and assembler.VARIABLE not in case.environment:
            return f"unknown ptxas: {self.assembler_problem}"
        if self.device == "cuda" and self.device_gib < case.device_gib:
            return (
                f"too little device memory: {self.device_gib:.0f} GiB free, needs "
                f"{case.device_gib:.0f}"
            )
        host_gib = free_host_gib()
        if host_gib < case.host_gib:
            return f"too little host memory: {host_gib:.0f} GiB free, needs {case.host_gib:.0f}"
        return ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def this_machine() -> Machine:
    """Return this machine; its ``lack`` is whatever keeps torch from answering."""
    used = assembler.in_use()
    problem = "" if used is None else used.problem
    common: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "assembler_problem": problem}
    try:
        told = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.machine"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=QUESTION_LIMIT_S,
        )
        answer = json.loads(told.stdout.splitlines()[-1]) if told.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        told, answer = None, {}
    if not answer:
        last = told.stderr.strip().splitlines()[-1:] if told is not None else ["it gave no answer"]
        return Machine(
            "none", "none", lack=f"torch cannot be asked for a GPU: {' '.join(last)}", **common
        )
    answer["capability"] = tuple(answer["capability"])
    return Machine(**common | answer)


def _ask_torch() -> Machine:
    """Return what torch knows; called in a process of its own."""
    import torch

    versions = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "deepspeed": _version("deepspeed"),
    }
    if not torch.cuda.is_available():
        return Machine("none", "no GPU", versions=versions, lack="no GPU")
    from kernels.bench.machine import driver

    versions |= {
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "driver": driver(),
    }
    free, _ = torch.cuda.mem_get_info()
    capability = torch.cuda.get_device_capability()
    return Machine("cuda", torch.cuda.get_device_name(), capability, free / GIB, versions=versions)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def free_host_gib() -> float:
    """Return the host memory that can be allocated now, in GiB.

    The kernel's MemAvailable, or less if a control group allows less.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(
        int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
    )
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        cached = dict(
            line.split() for line in (group / "memory.stat").read_text().splitlines()
        ).get("inactive_file", "0")
        if limit != "max":
            available = min(available, int(limit) - int(used) + int(cached))
    except (OSError, ValueError):
        pass  # no version 2 control group
    return available / GIB


# ----------------------------------------------------------------------------------------- identity


@dataclass(frozen=True)
class Identity:
    """What must be equal for an earlier number to be reused: code, versions, assembler, device."""

    commit: str
    tree: str  # clean, dirty, or unknown without git
    sources: str  # a digest of the code, for a copy without git
    device: str
    python: str
    ptxas: str
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """Return a short hash of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def reusable(self) -> bool:
        """Return False if the tree has uncommitted changes."""
        return not self.tree.startswith("dirty")


def identity_of(machine: Machine) -> Identity:
    """Return the identity of this repository on this machine."""
    used = assembler.in_use()
    ptxas = "none" if used is None else used.label
    commit, tree = _commit()
    return Identity(
        commit,
        tree,
        _digest(),
        machine.name,
        platform.python_version(),
        ptxas,
        dict(sorted(machine.versions.items())),
    )


def _commit() -> tuple[str, str]:
    """Return (commit, "clean", "dirty: files" or "unknown")."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            ).stdout
            for words in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--", *SOURCES],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "no git", "unknown"
    files = [line[3:] for line in changes.splitlines()]
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return commit.strip(), f"dirty: {', '.join(files[:3])}{more}" if files else "clean"


def _digest() -> str:
    """Return a digest of every source that a case can run."""
    digest = hashlib.sha256()
    for name in SOURCES:
        root = REPOSITORY / name
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.suffix in (".py", ".json", ".toml") and path.is_file():
                digest.update(
                    f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes() + b"\0"
                )
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    print(json.dumps(asdict(_ask_torch()), default=str))
