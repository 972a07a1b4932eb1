"""What ranks do in the tests of validation and evaluation."""

import io
import json
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from megagpt.dataset import Batch, SampleStream
from megagpt.inference import evaluation_command
from megagpt.inference.placed_model import PlacedModel
from megagpt.model import IGNORED
from megagpt.parallel.validation import Losses, ValidationSet
from megagpt.utils import UserError
from tests.support.configurations import Config
from tests.support.jobs.training import build, destroy


class SomeTargets:
    """A stream of which some targets count: another share of them in each sample, none in some."""

    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.stream.batch(indices)
        places = np.arange(batch.targets.shape[1])
        counted = places[None] % 5 < (batch.sample_ids // 2 % 4)[:, None]
        return replace(batch, targets=np.where(counted, batch.targets, IGNORED))


def validation_stream(data: Sequence[tuple[Path, float]], config: Config) -> SampleStream:
    length = config["megagpt"]["model"]["sequence_length"]
    stream = SampleStream.open(
        data, split="val", sequence_length=length, seed=0, document_mask=False
    )
    return SomeTargets(stream)  # type: ignore[return-value]


def validation_losses(config: Config, data: Sequence[tuple[Path, float]]) -> Losses:
    """Of the initial model."""
    engine = build(config)
    try:
        stream = validation_stream(data, config)
        found = ValidationSet(None, stream, engine.config, engine.mesh, engine.device)
        return found.losses(engine)
    finally:
        destroy(engine)


def options_of(**given: Any) -> Namespace:
    """The options of the command."""
    absent = ("step", "batches", "dataset", "tasks", "stride", "window", "separator")
    of_tasks = ("num_fewshot", "limit", "include_path", "tensor", "pipeline")
    some = {"batch_size": 4, "column": "text", "skip_bad_rows": 0}
    return Namespace(**dict.fromkeys((*absent, *of_tasks)) | some | given)


def answers(**options: Any) -> dict[str, Any]:
    """What the model answers to each request of the harness's tasks, and the metrics."""
    from megagpt.inference.generate import open_tokenizer
    from megagpt.inference.harness import HarnessModel, run_tasks, scores_of

    given = options_of(**options)
    model = evaluation_command.place(given)
    tokenizer = open_tokenizer(model.config.megagpt, given.run_dir)
    results = run_tasks(HarnessModel(model, tokenizer, given.batch_size), given.tasks)
    if model.mesh is not None:
        model.mesh.close()
    return answers_in(results) | {"scores": scores_of(results)}


def answers_in(results: dict[str, Any]) -> dict[str, Any]:
    """By task, the answers to each document's requests."""
    return {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in results["samples"].items()
    }


def evaluate(**options: Any) -> dict[str, Any]:
    """What `launch/evaluate.py` prints on this rank, and how much it holds of the model."""
    held = []
    loss, scores = PlacedModel.loss, PlacedModel.scores

    def weighed(method: Any) -> Any:
        def call(model: PlacedModel, *arguments: Any) -> Any:
            parts = [part for part in (model.trunk, model.head) if part is not None]
            numbers = {id(p): p.numel() for part in parts for p in part.parameters()}
            held.append(sum(numbers.values()))
            return method(model, *arguments)

        return call

    said = io.StringIO()
    with (
        redirect_stdout(said),
        patch.object(PlacedModel, "loss", weighed(loss)),
        patch.object(PlacedModel, "scores", weighed(scores)),
    ):
        try:
            evaluation_command.evaluate_run(options_of(**options))
        except UserError as error:
            return {"refused": str(error)}
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    return {"lines": lines, "held": max(held, default=0), "batches": len(held)}
