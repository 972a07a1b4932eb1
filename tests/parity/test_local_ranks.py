"""Ranks that a command starts on this machine: what it reports of one that fails."""

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from megagpt.parity.local_ranks import start
from megagpt.schema.errors import ConfigError
from megagpt.utils import ExitCode, UserError, run_command


def refuse_on(rank: int) -> None:
    """The others wait for the one that refuses."""
    if dist.get_rank() == rank:
        raise ConfigError(["libaio is missing", "apt install libaio-dev"])
    dist.barrier()


def fail() -> None:
    raise RuntimeError("no input is bad")


def test_what_one_rank_refuses_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    """By the command, and neither by ranks nor with their tracebacks."""
    assert run_command(lambda: start(2, refuse_on, 1)) == ExitCode.BAD_INPUT == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "Gloo" not in line]
    assert said == ["libaio is missing", "apt install libaio-dev"]


@pytest.mark.slow
def test_any_other_failure_keeps_its_traceback() -> None:
    with pytest.raises(ProcessRaisedException, match=r"(?s)in fail.*no input is bad") as error:
        start(1, fail)
    assert not isinstance(error.value, UserError)
