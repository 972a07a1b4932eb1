"""What must be identical on every rank: configuration, data, code, library versions.

Hosts may hold different copies of them.
"""

import importlib.metadata
import socket
from collections.abc import Sequence

import torch.distributed as dist

from megagpt.config import RunConfig
from megagpt.dataset import SampleStream
from megagpt.preflight.host_probe import SOURCES as PACKAGES
from megagpt.preflight.host_probe import code_fingerprint
from megagpt.utils import REPOSITORY, UserError

SOURCES = [REPOSITORY / package for package in PACKAGES]
LIBRARIES = ("torch", "deepspeed", "triton")
MOST_NAMED = 8  # ranks in one line
HOST = "host"


def require_agreement(
    config: RunConfig, streams: Sequence[SampleStream] = (), changes: str = ""
) -> None:
    """Raise UserError on all ranks if their configuration, data, code or libraries differ.

    ``changes`` is what the run differs in from its checkpoints.
    Every rank must call it. Ranks that differ would train nonsense silently.
    """
    mine = {
        "configuration": config.to_json(),
        "data": " ".join(stream.fingerprint for stream in streams),
        "--allow_change": changes,
        "code": code_fingerprint(SOURCES),
        **{f"version of {library}": _version(library) for library in LIBRARIES},
    }
    of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {HOST: socket.gethostname(), **mine})
    differing = {
        what: others
        for what in mine
        if (
            others := [
                rank for rank, theirs in enumerate(of_ranks) if theirs[what] != of_ranks[0][what]
            ]
        )
    }
    if differing:
        hosts = [theirs[HOST] for theirs in of_ranks]
        lines = [
            f"{_named(others, hosts)} {'differs' if len(others) == 1 else 'differ'} from "
            f"{_named([0], hosts)} in {what}"
            for what, others in differing.items()
        ]
        raise UserError("\n".join(lines) + "; give every host the same and start again")


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return `rank 1 (host b), rank 2 (host c)`, the first few of many with a count of the rest."""
    named = ", ".join(f"rank {rank} (host {hosts[rank]})" for rank in ranks[:MOST_NAMED])
    if not (more := ranks[MOST_NAMED:]):
        return named
    theirs = list(dict.fromkeys(hosts[rank] for rank in more))
    listed = ", ".join(theirs[:MOST_NAMED]) + (
        f" and {len(theirs) - MOST_NAMED} more" * (len(theirs) > MOST_NAMED)
    )
    return f"{named} and {len(more)} more (on {listed})"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
