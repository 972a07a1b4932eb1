"""The command `launch/evaluate.py`: what its options ask for, on one rank or on all of a mesh."""

import json
import logging
import os
import sys
from argparse import Namespace

import torch

from megagpt.common.network import reachable
from megagpt.data.corpora import open_source
from megagpt.data.token_files.declared import Declared
from megagpt.data.token_files.opening import tokenizer_of
from megagpt.distributed import Mesh
from megagpt.inference.evaluate import evaluate, open_validation
from megagpt.inference.generate import open_tokenizer
from megagpt.inference.placed_model import PlacedModel, mesh_sizes, place_model
from megagpt.inference.text_windows import evaluate_text
from megagpt.rundir.directory import read_config
from megagpt.rundir.tokenizer_hash import require_tokenizer
from megagpt.utils import RankEnvironment, UserError

HUB = ("huggingface.co", 443)


def evaluate_run(options: Namespace) -> None:
    """Evaluate a run as the options of launch/evaluate.py say; every rank must call it."""
    model = place(options)
    kind = evaluate_tasks if options.tasks else evaluate_texts if options.dataset else None
    (kind or evaluate_validation)(model, options)
    if model.mesh is not None:
        model.mesh.close()


def place(options: Namespace) -> PlacedModel:
    """Return the model, shared by all ranks; every rank must call it."""
    ranks = RankEnvironment.read()
    config = read_config(options.run_dir)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    mesh = None
    if ranks.world_size > 1:
        sizes = mesh_sizes(config, ranks.world_size, options.tensor, options.pipeline)
        mesh = Mesh(*sizes, device.type)
        device = device if device.type == "cpu" else torch.device(device.type, ranks.local_rank)
    return place_model(options.run_dir, step=options.step, device=device, mesh=mesh)


def evaluate_validation(model: PlacedModel, options: Namespace) -> None:
    """Evaluate on each validation set of the run."""
    for directory, stream in open_validation(model.config.megagpt):
        declared = Declared.by(model.config.megagpt)
        require_tokenizer(options.run_dir, directory, declared)
        result = evaluate(
            model,
            stream,
            tokenizer_of(directory, declared),
            batch_size=options.batch_size,
            batches=options.batches,
        )
        say(f"step {model.step}, {directory}: {result}")
        write({"step": model.step, "data": str(directory), **result.as_json()})


def evaluate_texts(model: PlacedModel, options: Namespace) -> None:
    """Evaluate on the text of `--dataset`."""
    longest = model.config.megagpt.model.sequence_length
    window = options.window or longest
    if not 2 <= window <= longest:
        raise UserError(
            f"--window {window}: must be at least 2 and at most megagpt.model.sequence_length "
            f"({longest})"
        )
    stride = options.stride or window // 2
    if stride > window:
        raise UserError(
            f"--stride {stride}: larger than the window ({window} tokens), so tokens would be "
            f"left out; use at most {window}"
        )
    corpus = open_source(
        options.dataset,
        column=options.column,
        separator=options.separator,
        skip_bad_rows=options.skip_bad_rows,
    )
    result = evaluate_text(
        model,
        corpus,
        open_tokenizer(model.config.megagpt, options.run_dir),
        window=window,
        stride=stride,
        batch_size=options.batch_size,
        batches=options.batches,
    )
    for line in (*corpus.notes, *corpus.left_out.lines()):
        say(line)
    name = " ".join(options.dataset)
    say(f"step {model.step}, {name}, windows of {window} every {stride}: {result}")
    places = {"data": name, "window": window, "stride": stride}
    write({"step": model.step, **places, **result.as_json()})


def evaluate_tasks(model: PlacedModel, options: Namespace) -> None:
    """Run tasks of lm-evaluation-harness."""
    if not reachable(*HUB):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the library would try for half a minute
    if RankEnvironment.read().rank:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # once is enough
    from megagpt.inference.harness import HarnessModel, run_tasks, scores_of

    tokenizer = open_tokenizer(model.config.megagpt, options.run_dir)
    results = run_tasks(
        HarnessModel(model, tokenizer, options.batch_size),
        options.tasks,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
    )
    for task, scores in scores_of(results).items():
        said = ", ".join(
            f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float)
        )
        say(f"step {model.step}, {task}: {said}")
        write({"step": model.step, "task": task, **scores})


def say(line: str) -> None:
    """Print a sentence on stderr, on rank 0."""
    if not RankEnvironment.read().rank:
        print(line, file=sys.stderr)


def write(result: dict[str, object]) -> None:
    """Print an object as a line of JSON on stdout, on rank 0."""
    if not RankEnvironment.read().rank:
        print(json.dumps(result), flush=True)
