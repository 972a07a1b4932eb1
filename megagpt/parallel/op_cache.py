"""Load an op of DeepSpeed that is compiled already, without its compiler.

DeepSpeed asks the processor, the compiler and ninja again on every load: six processes, 1 s of CPU
per rank (op_builder/builder.py `jit_load`). Here the directory of a compiled op holds a stamp with
a digest of all that the library was made from; while it agrees, the library is opened directly.
"""

import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

STAMP = ".megagpt_built"
# The op whose library must be open first, as its own `load` opens it.
NEEDED_FIRST = {"async_io": "PinMemoryBuilder"}
# What changes how an op is compiled, beside its sources and these packages.
PACKAGES = ("deepspeed", "torch")
VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")


def load(builder: Any, directory: Path) -> bool:
    """Register an op's library with DeepSpeed if its stamp agrees; return whether it did."""
    stamp = _read_stamp(directory)
    if stamp is None or stamp != _stamp(builder, directory):
        return False
    first = NEEDED_FIRST.get(builder.name)
    if first is not None:
        needed = _sibling(builder, first)
        if not load(needed, directory.parent / needed.name):
            return False
        needed.load(verbose=False)  # makes its symbols visible to the next library
    loaded = _loaded_ops(builder)
    if builder.name not in loaded:
        loaded[builder.name] = _open_library(builder.name, directory)
    return True


def record(builder: Any, directory: Path) -> None:
    """Write the stamps of an op that DeepSpeed has just loaded, and of the op it needs."""
    first = NEEDED_FIRST.get(builder.name)
    if first is not None:
        needed = _sibling(builder, first)
        record(needed, directory.parent / needed.name)
    stamp = _stamp(builder, directory)
    if stamp is not None and _read_stamp(directory) != stamp:
        unfinished = directory / f"{STAMP}.{os.getpid()}"
        unfinished.write_text(stamp)
        unfinished.replace(directory / STAMP)


def _open_library(name: str, directory: Path) -> types.ModuleType:
    """Import an extension module by its file, as torch does (utils/cpp_extension.py)."""
    spec = importlib.util.spec_from_file_location(name, directory / f"{name}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sibling(builder: Any, name: str) -> Any:
    return getattr(sys.modules[type(builder).__module__.rpartition(".")[0]], name)()


def _loaded_ops(builder: Any) -> dict[str, Any]:
    """Return DeepSpeed's own record of the libraries that this process has opened."""
    return builder._loaded_ops


def _read_stamp(directory: Path) -> str | None:
    try:
        return (directory / STAMP).read_text()
    except OSError:
        return None


def _stamp(builder: Any, directory: Path) -> str | None:
    """Return the digest of the library's origin, its size and its time; None without a library."""
    try:
        library = (directory / f"{builder.name}.so").stat()
    except OSError:
        return None
    return f"{_origin(builder)} {library.st_size} {library.st_mtime_ns}\n"


def _origin(builder: Any) -> str:
    """Return the SHA-256 of the sources, the versions and the settings of a compilation."""
    import torch

    parts = [sys.version, *(f"{name} {metadata.version(name)}" for name in PACKAGES)]
    parts += [f"{name}={os.environ.get(name)}" for name in VARIABLES]
    parts.append(processor())
    parts.append(f"CUDA {torch.version.cuda if torch.cuda.is_available() else None}")
    digest = hashlib.sha256("\n".join(parts).encode())
    for file in _sources(builder):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def processor() -> str:
    """Return a digest of this processor's features, for which ops are compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "unknown")
    return hashlib.sha256(features.encode()).hexdigest()[:8]


def _sources(builder: Any) -> Iterator[Path]:
    """Yield the op's sources and all other files of their directories, headers among them."""
    sources = [Path(builder.deepspeed_src_path(source)) for source in builder.sources()]
    common = Path(builder.deepspeed_src_path("csrc/includes"))
    for directory in sorted({source.parent for source in sources} | {common}):
        yield from sorted(file for file in directory.rglob("*") if file.is_file())
