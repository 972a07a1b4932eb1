"""A checkpoint of another trainer as the start of a run, with Adam's moments if it has them.

The run directory is that of `launch/import_hf.py` (megagpt/huggingface/importing.py), without what
an export to the model's own files would need.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megagpt.config import RunConfig
from megagpt.huggingface.importing import (
    IMPORTED,
    bytes_of_checkpoint,
    document_of,
    resolved_for_import,
    write_checkpoint,
)
from megagpt.huggingface.whole_directory import whole_directory
from megagpt.migration.checkpoint.sources import open_source
from megagpt.migration.checkpoint.weights import ForeignWeights
from megagpt.rundir.directory import record
from megagpt.utils import UserError, write_atomically


@dataclass(frozen=True)
class ImportedCheckpoint:
    """What was read and written."""

    description: str
    step: int
    parameters: int
    configuration: Path


def import_checkpoint(source: Path, written: RunConfig, run_directory: Path) -> ImportedCheckpoint:
    """Make a run directory from the weights in ``source``; ``written`` has the model and the rest.

    Raise UserError if an object is refused, if tensors are not those of the model, and if the run
    directory exists.
    """
    resolved = resolved_for_import(written)
    model = resolved.megagpt.model
    weights = ForeignWeights(open_source(source), model)
    steps = resolved.megagpt.training.total_steps
    if weights.steps >= steps:
        raise UserError(
            f"{source}: was trained for {weights.steps} steps, and the run ends at {steps}; "
            f"--set megagpt.training.total_steps={weights.steps + steps}"
        )
    with whole_directory(
        run_directory, option="--run_dir", room_bytes=bytes_of_checkpoint(model)
    ) as staging:
        write_checkpoint(staging / "checkpoints", weights, resolved, "import_checkpoint")
        write_atomically(
            staging / IMPORTED,
            json.dumps(document_of(written), indent=2, ensure_ascii=False) + "\n",
        )
        record(staging, resolved)
    return ImportedCheckpoint(
        weights.description, weights.steps, model.num_parameters, run_directory / IMPORTED
    )
