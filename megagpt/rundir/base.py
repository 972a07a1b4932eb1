"""Where the base of a run with adapters is: which run, which checkpoint, which weights.

    runs/NAME/base.json     {"path", "step", "sha256"} of the base, written at the first start

Nothing in here imports torch.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megagpt.checkpoint.format import STRICT, Count, Sha256, complete_steps, step_directory
from megagpt.config import ResolvedConfig, identity_changes
from megagpt.rundir.directory import CONFIG_FILE, read_config
from megagpt.rundir.tokenizer_hash import require_tokenizer
from megagpt.utils import UserError, write_atomically

BASE_FILE = "base.json"
KEY = "megagpt.training.lora.base"
# Keys of the model that do not change what its weights compute.
FREE = {"megagpt.model.dropout", "megagpt.model.init_std", "megagpt.model.z_loss"}
LENGTH = "megagpt.model.sequence_length"  # of rotary positions


@dataclass(frozen=True, config=STRICT)
class RecordedBase:
    """What a run has recorded of its base.

    ``sha256`` is of its weights (checkpoint/base_weights.py).
    """

    path: Annotated[str, Field(min_length=1)]
    step: Count
    sha256: Sha256


@dataclass(frozen=True)
class BasePlace:
    """A base that was found: its run directory, the checkpoint, and the hash that it must have."""

    run_directory: Path
    step: int
    sha256: str | None = None

    @property
    def checkpoint(self) -> Path:
        """The directory of the checkpoint."""
        return step_directory(self.run_directory / "checkpoints", self.step)


def find_base(config: ResolvedConfig, run_directory: Path) -> BasePlace | None:
    """Return the base of a run's adapters, None if the run trains the whole model.

    The checkpoint is that which the run began with, at its first start the base's newest. Raise
    UserError if there is none, or if its model is not that of the run.
    """
    lora = config.megagpt.training.lora
    if lora is None:
        return None
    recorded = _recorded(run_directory)
    if lora.base is None:
        raise UserError(
            f"{KEY}: missing (need the run directory whose weights the adapters change; "
            f"launch/import_hf.py makes one of a published model); --set {KEY}=runs/NAME"
        )
    base = Path(lora.base)
    _require_base(base, config, run_directory)
    steps = complete_steps(base / "checkpoints")
    if not steps:
        raise UserError(f"{KEY}: {base} has no checkpoint yet; train it first, or name another run")
    if recorded is None:
        return BasePlace(base, steps[0])
    return BasePlace(base, recorded.step if recorded.step in steps else steps[0], recorded.sha256)


def record_base(run_directory: Path, place: BasePlace, sha256: str) -> None:
    """Write what the run's adapters are trained on."""
    record = RecordedBase(str(place.run_directory), place.step, sha256)
    write_atomically(run_directory / BASE_FILE, json.dumps(asdict(record), indent=2) + "\n")


def _recorded(run_directory: Path) -> RecordedBase | None:
    path = run_directory / BASE_FILE
    if not path.is_file():
        return None
    try:
        return TypeAdapter(RecordedBase).validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path}: damaged ({error.errors()[0]['msg']}); restore it, or choose another --run_dir"
        ) from error


def _require_base(base: Path, config: ResolvedConfig, run_directory: Path) -> None:
    """Raise UserError if a directory cannot be the base of the run."""
    if not (base / CONFIG_FILE).is_file():
        raise UserError(
            f"{KEY}: {base} is not a run directory (no {CONFIG_FILE}); name one, or make one of a "
            f"published model: python launch/import_hf.py --model {base} --run_dir runs/NAME ..."
        )
    if base.resolve() == run_directory.resolve():
        raise UserError(
            f"{KEY}: {base} is the run's own directory; train the adapters in another --run_dir"
        )
    recorded = read_config(base)
    if (lora := recorded.megagpt.training.lora) is not None:
        raise UserError(
            f"{KEY}: {base} holds adapters; name its own base ({lora.base}), or merge it with "
            "launch/export.py and import the result with launch/import_hf.py"
        )
    free = FREE | ({LENGTH} if config.megagpt.model.position == "rotary" else set())
    changes = {
        key: pair
        for key, pair in identity_changes(recorded.identity(), config.identity()).items()
        if key.startswith("megagpt.model.") and key not in free
    }
    if changes:
        listed = ", ".join(
            f"{key} {theirs} (not {ours})" for key, (theirs, ours) in changes.items()
        )
        raise UserError(f"{KEY}: {base} holds another model: {listed}; name a base of this model")
    require_tokenizer(base, Path(config.megagpt.data.sources[0].path))
