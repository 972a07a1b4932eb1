"""Ranks that mpirun started: `mpirun -n 8 python launch/train.py`, `deepspeed --launcher openmpi`.

OpenMPI and MVAPICH number the processes, but do not say where they meet. On one host that is
decided here; on several, MASTER_ADDR and MASTER_PORT have to be given.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from megagpt.utils import UserError

# A job, or a launcher's process, selects one of these: the same on every rank, different for runs
# on one host. They are below the system's ephemeral ports (from 32768).
OWN_PORTS = range(10_000, 29_000)
NAMES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
PREFIXES = ("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
# The same in all processes of a job, different in the next (OpenMPI 4 and 5; one host).
JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "MV2_COMM_WORLD_JOBID")


def variables_of_mpi(environment: Mapping[str, str], parent: int) -> dict[str, str] | None:
    """Return RANK and its companions for a process of mpirun; None for any other.

    ``parent`` is the number of the process that started this one. Raise UserError if the ranks
    could not find one another, or neighbours are on different hosts.
    """
    prefix = next((text for text in PREFIXES if environment.get(f"{text}SIZE")), None)
    if prefix is None:
        return None
    found = {name: environment.get(prefix + name, "") for name in NAMES}
    if not all(value.isascii() and value.isdecimal() for value in found.values()):
        missing = ", ".join(prefix + name for name, value in found.items() if not value)
        raise UserError(
            f"environment: {prefix}SIZE set, but {missing or 'its companions'} missing: start "
            f"with mpirun -n N python launch/train.py"
        )
    rank, size, local_rank, local_size = (int(value) for value in found.values())
    if local_size and rank % local_size != local_rank:
        raise UserError(
            "mpirun: neighbouring ranks are on different hosts; use --map-by slot, so that they "
            "share one"
        )
    variables = {name: environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
    if local_size == size:
        job = next((environment[name] for name in JOB_NAMES if environment.get(name)), str(parent))
        port = OWN_PORTS[zlib.crc32(job.encode()) % len(OWN_PORTS)]
        variables = {
            "MASTER_ADDR": variables["MASTER_ADDR"] or "127.0.0.1",
            "MASTER_PORT": variables["MASTER_PORT"] or str(port),
        }
    elif not all(variables.values()):
        raise UserError(
            "mpirun: the ranks of several hosts do not know where they meet: mpirun -x "
            "MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500 ... (deepspeed --launcher openmpi: "
            "--launcher_args '-x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500'), or deepspeed "
            "--hostfile hosts launch/train.py"
        )
    return variables | {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_SIZE": str(local_size),
    }
