"""Which ptxas there are on this machine. No torch, no triton."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from kernels.verification.assembler import version_of

VARIABLE = "TRITON_PTXAS_PATH"


@dataclass(frozen=True)
class Assembler:
    """One ptxas: where it was found, its path, its version such as 12.8.93, or what is wrong
    with it.
    """

    source: str
    path: str
    version: str = ""
    problem: str = ""

    @property
    def label(self) -> str:
        """For a case's name and a folder: ``ptxas-12.8.93``."""
        return f"ptxas-{self.version or 'unknown'}"


def in_use() -> Assembler | None:
    """The one that triton would call now: TRITON_PTXAS_PATH's, else the one it carries; None
    without triton.
    """
    named = os.environ.get(VARIABLE)
    return _asked(VARIABLE, named) if named else bundled()


def bundled() -> Assembler | None:
    """The one in triton's own package."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return _asked(
        "triton's own", str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas")
    )


def available() -> list[Assembler]:
    """The one in use first, then the others: triton's, the wheel nvidia-cuda-nvcc's, the CUDA
    toolkit's; each version once, and TRITON_PTXAS_PATH's also where it does not work.
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
    """(source, path) of those outside triton."""
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
            source, path, problem=f"{source}, {path}: cannot be run, or tells no version"
        )
    return Assembler(source, path, version)
