"""Which ptxas turns Triton's PTX into machine code, and whether it may miscompile attention.

Triton uses the program that TRITON_PTXAS_PATH names (TRITON_PTXAS_BLACKWELL_PATH for compute
capability 10.0 and above). If that does not run, it silently uses its own.
"""

import functools
import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# triton-lang/triton#11781 names 13.3 as the first version with the fix; one reporter found 13.1.80
# correct.
_MENDED = (13, 3)
_PACKAGE = "nvidia-cuda-nvcc"
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Assembler:
    """One ptxas: its version, e.g. "12.8.93", or None if unknown, and why triton uses it."""

    version: str | None
    origin: str
    variable: str  # the environment variable that selects another one

    def __str__(self) -> str:
        return f"ptxas {self.version or 'of unknown version'} ({self.origin})"

    def reported_wrong(self) -> bool:
        """Return whether this version may miscompile products that read registers.

        True if the version is unknown.
        """
        return (
            self.version is None
            or tuple(int(part) for part in self.version.split(".")[:2]) < _MENDED
        )

    def advice(self) -> str:
        """Return what to type after a wrong result on compute capability 9.0."""
        if not self.reported_wrong():
            return "this ptxas is not known to be wrong: please report it"
        first = ".".join(map(str, _MENDED))
        path = _installed()
        install = "" if path else f"pip install '{_PACKAGE}>={first}'; "
        return (
            f"ptxas before {first} is reported to miscompile such products "
            f"(triton-lang/triton#11781); {install}export "
            f"{self.variable}={path or '<site-packages>/nvidia/cu13/bin/ptxas'}"
        )


def assembler(capability: tuple[int, int]) -> Assembler:
    """Return the ptxas that triton uses for GPUs of this compute capability. Never raises."""
    name = "ptxas_blackwell" if capability[0] >= 10 else "ptxas"
    variable = f"TRITON_{name.upper()}_PATH"
    try:
        import triton

        used = str(getattr(triton.knobs.nvidia, name).path)
    except Exception as error:  # a broken installation may raise anything; here it is only named
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return Assembler(None, f"triton cannot use it: {reason}", variable)
    wanted = os.environ.get(variable)
    if wanted is None or used == wanted:
        return Assembler(
            version_of(used), f"{variable}={wanted}" if wanted else "triton's own", variable
        )
    return Assembler(
        version_of(used), f"triton's own, as {variable}={wanted} does not run", variable
    )


@functools.cache
def version_of(path: str) -> str | None:
    """Return the version that ``path --version`` prints, e.g. "12.8.93", or None."""
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+\.\d+[\d.]*)", said.stdout) or re.search(
        r"release (\d+\.\d+)", said.stdout
    )
    return found[1] if found else None


@functools.cache
def _installed() -> str | None:
    """Return the path of nvidia-cuda-nvcc's ptxas, if it is installed and new enough, or None."""
    try:
        found = importlib.util.find_spec("nvidia.cu13")
    except ImportError:
        return None
    for directory in (found.submodule_search_locations or ()) if found else ():
        path = Path(directory, "bin", "ptxas")
        version = version_of(str(path))
        if version is not None and not Assembler(version, "", "").reported_wrong():
            return str(path)
    return None
