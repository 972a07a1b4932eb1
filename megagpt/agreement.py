"""What every rank has to have alike: hosts may hold different copies of anything that is not sent to them."""

import importlib.metadata
from pathlib import Path

import torch.distributed as dist

from megagpt.config import RunConfig
from megagpt.dataset import SampleStream
from megagpt.host_probe import SOURCES as PACKAGES
from megagpt.host_probe import code_fingerprint
from megagpt.utils import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = [REPOSITORY / package for package in PACKAGES]
LIBRARIES = ("torch", "deepspeed", "triton")


def require_agreement(config: RunConfig, stream: SampleStream | None = None) -> None:
    """Ranks that differ would train nonsense in silence. Every rank must call it; raises UserError on all of them."""
    mine = {
        "configuration": config.to_json(),
        "data": stream.fingerprint if stream is not None else "",
        "code": code_fingerprint(SOURCES),
        **{f"version of {library}": _version(library) for library in LIBRARIES},
    }
    of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    differing = {
        what: others
        for what in mine
        if (others := [rank for rank, theirs in enumerate(of_ranks) if theirs[what] != of_ranks[0][what]])
    }
    if differing:
        lines = [f"ranks {others} differ from rank 0 in their {what}" for what, others in differing.items()]
        raise UserError("\n".join(lines) + ": give every host the same, start again")


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
