"""The trained model of a run as plain PyTorch: for generating, evaluating and exporting, in one
process.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from megagpt.checkpoint.format import WEIGHT, DamagedCheckpointError
from megagpt.checkpoint.reader import open_checkpoint
from megagpt.config import ModelConfig, ResolvedConfig
from megagpt.model import GPT, replace_parameters
from megagpt.rundir.directory import read_config
from megagpt.utils import UserError


def open_weights(
    run_directory: Path, step: int | None = None
) -> tuple[int, Callable[[str], torch.Tensor]]:
    """(step, a function from a global name to that whole weight, fp32 on the CPU) of a run's newest
    sound checkpoint.

    Raises UserError where there is no checkpoint (of ``step``) that can be loaded; so does the
    function.
    """
    reader = open_checkpoint(run_directory, step)

    def weight(name: str) -> torch.Tensor:
        try:
            return reader.tensor(WEIGHT, name)
        except DamagedCheckpointError as error:  # its manifest vouches for what it should not
            raise UserError(
                f"{run_directory}: {error}; choose the checkpoint of another step with --step"
            ) from error

    return reader.manifest.state.step, weight


def require_known_ids(directory: Path, vocabulary: int, model: ModelConfig) -> None:
    """Raise UserError where a dataset of ``vocabulary`` tokens has ids that the model never learnt.

    The embedding may have a row for them: rows from ``model.vocabulary`` on are padding.
    """
    known = model.vocabulary
    if vocabulary <= known:
        return
    ids = f"id {known}" if vocabulary == known + 1 else f"ids {known} to {vocabulary - 1}"
    raise UserError(
        f"{directory}: its vocabulary is {vocabulary}, the model's {known}: the model never learnt "
        f"{ids}; the dataset was prepared anew since the run, prepare it again with the tokenizer "
        "of the run"
    )


def load_model(
    run_directory: Path,
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[GPT, ResolvedConfig, int]:
    """The plain model of a run, in one process: (model, configuration, step) of its newest sound
    checkpoint.

    Raises UserError where the directory is no run, or has no checkpoint (of that step) that can be
    loaded.
    """
    config = read_config(run_directory)
    found_step, weight = open_weights(run_directory, step)
    with torch.device("meta"):
        model = GPT(config.megagpt.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    replace_parameters(
        model, lambda p: torch.nn.Parameter(weight(names[p]).to(device=device, dtype=dtype))
    )
    return model.eval(), config, found_step
