"""What every rank has to have alike: hosts may hold different copies of anything that is not sent to them."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megagpt.config import ResolvedConfig
from megagpt.dataset import SampleStream
from megagpt.utils import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = (REPOSITORY / "megagpt", REPOSITORY / "kernels")
LIBRARIES = ("torch", "deepspeed", "triton")


def require_agreement(config: ResolvedConfig, stream: SampleStream) -> None:
    """Ranks that differ would train nonsense in silence. Every rank must call it; raises UserError on all of them."""
    mine = {
        "configuration": config.to_json(),
        "data": stream.fingerprint,
        "code": code_fingerprint(SOURCES),
        **{f"version of {library}": _version(library) for library in LIBRARIES},
    }
    of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    for what in mine:
        others = [rank for rank, theirs in enumerate(of_ranks) if theirs[what] != of_ranks[0][what]]
        if others:
            raise UserError(f"ranks {others} differ from rank 0 in their {what}: give every host the same, start again")


def code_fingerprint(directories: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of the Python files in some directories, wherever those lie."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(directory.parent)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
