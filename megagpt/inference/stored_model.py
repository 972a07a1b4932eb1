"""The trained model of a run in plain PyTorch, for generating, evaluating and exporting.

One process is enough.
"""

from pathlib import Path
from typing import Protocol

import torch

from megagpt.checkpoint.base_weights import open_proven
from megagpt.checkpoint.format import WEIGHT, DamagedCheckpointError
from megagpt.checkpoint.reader import Reader, open_checkpoint
from megagpt.config import ModelConfig, ResolvedConfig
from megagpt.lora import update_of
from megagpt.model import GPT, replace_parameters
from megagpt.parallel.rectangles import Box
from megagpt.rundir.base import find_base
from megagpt.rundir.directory import read_config
from megagpt.utils import UserError


class Weights(Protocol):
    """A function from a parameter's global name to its weight, fp32 on the CPU."""

    def __call__(self, name: str, box: Box | None = None) -> torch.Tensor:
        """Return the whole weight, or the rectangle ``box`` of it."""


def open_weights(
    run_directory: Path, step: int | None = None, *, verified: bool = False
) -> tuple[int, Weights]:
    """Return the step of a run's newest sound checkpoint, and the model's weights.

    Those of a run with adapters are the base's with their updates. ``verified``: another rank has
    verified the checkpoint and the base. Both raise UserError if no checkpoint (of ``step``) can be
    loaded.
    """
    config = read_config(run_directory)
    found_step, stored, sha256 = open_trained(run_directory, step, verified=verified)
    place = find_base(config, run_directory)
    if place is None:
        return found_step, stored
    if sha256 is None:
        raise UserError(
            f"{run_directory}: step {found_step} names no base; choose the checkpoint of another "
            "step with --step"
        )
    reader = open_proven(place.checkpoint, None if verified else sha256)
    base = _weights_of(reader, place.run_directory)

    def weight(name: str, box: Box | None = None) -> torch.Tensor:
        update = update_of(name, stored, config.megagpt)
        if update is None:
            return base(name, box)
        return base(name, box) + (update if box is None else update[tuple(slice(*s) for s in box)])

    return found_step, weight


def open_trained(
    run_directory: Path, step: int | None = None, *, verified: bool = False
) -> tuple[int, Weights, str | None]:
    """Return the step, the weights and the base's hash of a run's newest sound checkpoint.

    The weights are those that the run trains: the model's or the adapters'. The hash is None unless
    they are adapters'. ``verified`` and errors as of ``open_weights``.
    """
    reader = open_checkpoint(run_directory, step, verified=verified)
    manifest = reader.manifest
    return manifest.state.step, _weights_of(reader, run_directory), manifest.base


def _weights_of(reader: Reader, run_directory: Path) -> Weights:
    def weight(name: str, box: Box | None = None) -> torch.Tensor:
        try:
            return reader.tensor(WEIGHT, name, box)
        except DamagedCheckpointError as error:  # the manifest does not match the files
            raise UserError(
                f"{run_directory}: {error}; choose the checkpoint of another step with --step"
            ) from error

    return weight


def require_known_ids(directory: Path, vocabulary: int, model: ModelConfig) -> None:
    """Raise UserError if a dataset of ``vocabulary`` tokens has ids that the model has not learned.

    The embedding may have a row for them: rows from ``model.vocabulary`` on are padding.
    """
    known = model.vocabulary
    if vocabulary <= known:
        return
    ids = f"id {known}" if vocabulary == known + 1 else f"ids {known} to {vocabulary - 1}"
    raise UserError(
        f"{directory}: its vocabulary changed since the run (found {vocabulary} tokens, need at "
        f"most {known}: the model has not learned {ids}); prepare it again with the tokenizer of "
        "the run"
    )


def load_model(
    run_directory: Path,
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[GPT, ResolvedConfig, int]:
    """Return the model, the configuration and the step of a run's newest sound checkpoint.

    Raise UserError if the directory is not a run, or has no checkpoint (of ``step``) that can be
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
