"""Find every ptxas on this machine. No torch, no triton."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from kernels.verification.assembler import version_of

VARIABLE = "TRITON_PTXAS_PATH"


@dataclass(frozen=True)
class Assembler:
    """One ptxas: where it was found, its path, and its version, such as 12.8.93, or its problem."""

    source: str
    path: str
    version: str = ""
    problem: str = ""

    @property
    def label(self) -> str:
        """Return a name for a case and a folder: ``ptxas-12.8.93``."""
        return f"ptxas-{self.version or 'unknown'}"


def in_use() -> Assembler | None:
    """Return the ptxas that triton would call now, or None without triton.

    That of TRITON_PTXAS_PATH if it is set, else triton's own.
    """
    named = os.environ.get(VARIABLE)
    return _asked(VARIABLE, named) if named else bundled()


def bundled() -> Assembler | None:
    """Return the ptxas in triton's own package."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return _asked(
        "triton's own", str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas")
    )


def available() -> list[Assembler]:
    """Return the ptxas in use, then the others, each version once.

    The others are triton's, that of the wheel nvidia-cuda-nvcc and that of the CUDA toolkit.
    TRITON_PTXAS_PATH's is included even if it does not work.
    """
    others = [bundled(), *(_asked(source, path) for source, path in _elsewhere())]
    found = {
        assembler.version: assembler
        for assembler in reversed(others)
        if assembler and not assembler.problem
    }
    first = in_use()
    if first is not None:
        found.pop(first.version, None)
    return ([first] if first else []) + list(reversed(found.values()))


def _elsewhere() -> list[tuple[str, str]]:
    """Return (source, path) of each ptxas outside triton."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    wheels = [path for folder in folders or () for path in sorted(Path(folder).glob("*/bin/ptxas"))]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    toolkit = shutil.which("ptxas") or str(Path(home, "bin", "ptxas"))
    found = [("the wheel nvidia-cuda-nvcc", str(path)) for path in wheels]
    return found + ([("the CUDA toolkit", toolkit)] if Path(toolkit).is_file() else [])


def _asked(source: str, path: str) -> Assembler:
    version = version_of(path)
    if version is None:
        return Assembler(
            source, path, problem=f"{source}, {path}: cannot be run, or prints no version"
        )
    return Assembler(source, path, version)
