"""wandb and tensorboard, enabled by DeepSpeed's own config sections.

DeepSpeed's own monitors are not used: they run on its rank 0, which holds no loss under pipeline
parallelism.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megagpt.common.network import reachable
from megagpt.monitoring.metrics import Line
from megagpt.utils import write_atomically

if TYPE_CHECKING:
    from megagpt.config import RunConfig

logger = logging.getLogger(__name__)

WANDB_DEFAULT_URL = "https://api.wandb.ai"
# To open a run and to upload its last lines; wandb itself waits 90 s, and without a limit.
WANDB_TIMEOUT_S = 30


def scalars(line: Line) -> dict[str, float]:
    """Return the numbers of a line by their names in trackers: `train/loss`, `eval/val_loss`."""
    group = line.get("event", "train")
    return {
        f"{group}/{key}": value
        for key, value in line.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class WandbTracker:
    """The outlet to wandb, one wandb run per run directory: a resumed run continues its curves.

    It goes offline by itself, with one warning, if there is no key or no network.
    """

    name = "wandb"
    retried = False

    def __init__(self, config: RunConfig, run_directory: Path) -> None:
        import wandb

        offline_reason = why_offline()
        settings = wandb.Settings(
            silent=True,  # its banners would break the live table
            console="off",  # it would capture the table's control characters
            save_code=False,
            # wandb stores the diff of a dirty tree, which may contain a secret
            disable_git=True,
            init_timeout=WANDB_TIMEOUT_S,
            finish_timeout=WANDB_TIMEOUT_S,
        )
        self._run = wandb.init(
            project=config.wandb.project,
            group=config.wandb.group,
            entity=config.wandb.team,
            name=run_directory.resolve().name,
            id=_run_id(run_directory),
            resume="allow",
            dir=str(run_directory),
            config=json.loads(config.to_json()),
            mode="offline" if offline_reason else None,
            settings=settings,
        )
        # Steps are an ordinary metric: wandb's own counter refuses steps that a resumed run
        # repeats.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if offline_reason:
            logger.warning(
                "wandb is offline: %s; upload later with: wandb sync %s",
                offline_reason,
                self._sync_directory(),
            )

    def _sync_directory(self) -> Path:
        return Path(self._run.dir).parent

    def write(self, line: Line) -> None:
        self._run.log({"step": line["step"], **scalars(line)})

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """The outlet to an event file in `output_path/job_name`; default path: the run directory."""

    name = "tensorboard"
    retried = False

    def __init__(self, config: RunConfig, run_directory: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        section = config.tensorboard
        root = Path(section.output_path) if section.output_path else run_directory
        # Steps after the checkpoint that a resume starts from are repeated: hide their first
        # version.
        purge_step = start_step + 1 if start_step else None
        self._writer = SummaryWriter(log_dir=str(root / section.job_name), purge_step=purge_step)

    def write(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


def why_offline() -> str | None:
    """Return why wandb's files are written without uploading, or None.

    If WANDB_MODE is set, it decides.
    """
    if os.environ.get("WANDB_MODE"):
        return None
    url = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_DEFAULT_URL))
    if not _has_wandb_login(url.hostname or ""):
        return "no API key (WANDB_API_KEY, or wandb login)"
    if not reachable(url.hostname or "", url.port or (80 if url.scheme == "http" else 443)):
        return f"{url.hostname} cannot be reached"
    return None


def _has_wandb_login(host: str) -> bool:
    """Return whether wandb would find a key in the environment or in its netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_directory: Path) -> str:
    """Return this run directory's identity in wandb, drawn once and kept.

    A resume therefore continues the same curves.
    """
    path = run_directory / "wandb" / "run_id.txt"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text().strip()
