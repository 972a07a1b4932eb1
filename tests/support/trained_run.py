"""A small run directory with its data, as training writes them but untrained: for the commands
that read a run.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megagpt.checkpoint.format import (
    MANIFEST,
    WEIGHT,
    Manifest,
    Slice,
    StoredFile,
    StoredTensor,
    TrainState,
    step_directory,
)
from megagpt.common.disk import sha256_of
from megagpt.config import ResolvedConfig
from megagpt.dataset import open_dataset
from megagpt.download_data import PreparationRequest, prepare
from megagpt.model import GPT, initialise_
from megagpt.rundir.directory import CONFIG_FILE

SEQUENCE_LENGTH = 16
TEXTS = ["Ärger im Zug.\n" * 30, "The quick brown fox.\n" * 20, "日本語のテキスト\n" * 10]


def write_dataset(directory: Path, tokenizer: str = "bytes") -> Path:
    """Three documents; the last tenth of them is the validation split."""
    texts = directory / "texts"
    texts.mkdir(parents=True)
    for index, text in enumerate(TEXTS):
        (texts / f"{index}.txt").write_text(text)
    prepare(
        PreparationRequest(f"{texts}/*.txt", directory / "data", tokenizer=tokenizer),
        report=lambda line: None,
    )
    return directory / "data"


def write_run(directory: Path, data: Path, *, steps: tuple[int, ...] = (10,), **model: Any) -> Path:
    """A run on ``data`` with a checkpoint at each step; the weights are initial ones, another
    seed a step.
    """
    vocabulary = open_dataset(data).vocabulary
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "init_std": 0.2,
        "sequence_length": SEQUENCE_LENGTH,
    }
    config = ResolvedConfig.model_validate(
        {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
            "megagpt": {
                "model": {**shape, "vocab_size": 384, "vocabulary": vocabulary, **model},
                "data": {"path": str(data)},
                "training": {"total_steps": 100},
            },
        }
    )
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(config.to_json())
    for step in steps:
        _write_checkpoint(directory / "checkpoints", config, step)
    return directory


def trained_model(config: ResolvedConfig, step: int) -> GPT:
    """The model of the checkpoint that ``write_run`` wrote at ``step``."""
    return initialise_(GPT(config.megagpt.model), seed=step)


def _write_checkpoint(checkpoints: Path, config: ResolvedConfig, step: int) -> None:
    directory, file = step_directory(checkpoints, step), "rank_00000_000.safetensors"
    directory.mkdir(parents=True)
    parameters = dict(trained_model(config, step).named_parameters())
    save_file(
        {f"{WEIGHT}/{name}": p.detach().flatten() for name, p in parameters.items()},
        directory / file,
    )
    tensors = {
        name: StoredTensor(tuple(p.shape), (_whole(file, p),)) for name, p in parameters.items()
    }
    manifest = Manifest(
        state=TrainState(step=step),
        identity=config.identity(),
        data_fingerprint="",
        topology={},
        scheduler={},
        learning_rates=[],
        loss_scaler={},
        tensors=tensors,
        files={file: StoredFile((directory / file).stat().st_size, sha256_of(directory / file))},
    )
    (directory / MANIFEST).write_text(manifest.to_json())


def _whole(file: str, parameter: torch.Tensor) -> Slice:
    return Slice(file, 0, parameter.numel(), tuple((0, size) for size in parameter.shape))
