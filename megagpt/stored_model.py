"""The trained model of a run as plain PyTorch: for generating, evaluating and exporting, in one process."""

from pathlib import Path

import torch

from megagpt.checkpoint_format import WEIGHT, DamagedCheckpointError
from megagpt.checkpoint_reader import open_checkpoint
from megagpt.config import ResolvedConfig
from megagpt.model import GPT, replace_parameters
from megagpt.run_directory import read_config
from megagpt.utils import UserError


def load_model(
    run_directory: Path,
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[GPT, ResolvedConfig, int]:
    """The plain model of a run, in one process: (model, configuration, step) of its newest sound checkpoint.

    Raises UserError where the directory is no run, or has no checkpoint (of that step) that can be loaded.
    """
    config = read_config(run_directory)
    reader = open_checkpoint(run_directory, step)
    with torch.device("meta"):
        model = GPT(config.megagpt.model)
    templates = {parameter: name for name, parameter in model.named_parameters()}
    try:
        replace_parameters(
            model, lambda p: torch.nn.Parameter(reader.tensor(WEIGHT, templates[p]).to(device=device, dtype=dtype))
        )
    except DamagedCheckpointError as error:  # its manifest vouches for what it should not
        raise UserError(f"{run_directory}: {error}; choose the checkpoint of another step with --step") from error
    return model.eval(), config, reader.manifest.state.step
