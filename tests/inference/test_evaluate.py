"""Evaluation: every token once and alike, against sums done by hand; the commands evaluate and
generate on a run.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.config import ResolvedConfig
from megagpt.data.byte_level_bpe import (
    ByteLevelTokenizer,
    bytes_only,
    train_byte_level_bpe,
)
from megagpt.dataset import Batch
from megagpt.inference.evaluate import Evaluation, evaluate, open_validation
from megagpt.inference.generate import generate, open_tokenizer
from megagpt.inference.placed_model import PlacedModel
from megagpt.rundir.directory import read_config
from megagpt.utils import UserError
from tests import REPOSITORY
from tests.support.trained_run import SEQUENCE_LENGTH, trained_model, write_dataset, write_run

BYTES = ByteLevelTokenizer(bytes_only())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small", data, steps=(10, 20))


class SevenSamples:
    """Seven samples of five random bytes each, the last of every sample being the end of a
    document.
    """

    samples_per_epoch = 7

    def batch(self, indices: Iterable[int]) -> Batch:
        tokens = np.stack([np.random.default_rng(index).integers(0, 256, 6) for index in indices])
        tokens[:, -1] = BYTES.end_of_document
        return Batch(tokens[:, :-1], tokens[:, 1:], None, np.array(list(indices)))


class LargerForLargerIds(PlacedModel):
    """A loss that is larger for larger ids, so that a sample counted twice or never shows."""

    def __init__(self) -> None:
        self.mesh = None

    def loss(self, batch: Batch) -> Tensor:
        return torch.from_numpy(batch.targets).double().mean()


def placed(config: ResolvedConfig, step: int) -> PlacedModel:
    return PlacedModel(trained_model(config, step), config, step, torch.device("cpu"), None)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_token_counts_once_whatever_the_batch_size(batch_size):
    result = evaluate(LargerForLargerIds(), SevenSamples(), BYTES, batch_size=batch_size)
    targets = SevenSamples().batch(range(7)).targets
    assert result.loss == pytest.approx(targets.mean())
    assert (result.tokens, result.text_bytes) == (35, 28)


def test_a_number_of_batches_takes_the_first_ones():
    result = evaluate(LargerForLargerIds(), SevenSamples(), BYTES, batch_size=2, batches=2)
    assert result.loss == pytest.approx(SevenSamples().batch(range(4)).targets.mean())
    assert result.tokens == 20


def test_perplexity_and_bits_of_a_model_that_knows_nothing():
    uniform = Evaluation(loss=math.log(256), tokens=1000, text_bytes=2000)
    assert uniform.perplexity == pytest.approx(256)
    assert uniform.bits_per_byte == pytest.approx(8 * 1000 / 2000)
    assert "perplexity 256.00, 4.0000 bits per byte (1,000 tokens, 2,000 bytes)" in str(uniform)


def test_a_perplexity_past_the_range_of_floats_is_infinite_and_null_in_json():
    diverged = Evaluation(loss=1e4, tokens=1, text_bytes=1)
    assert diverged.perplexity == math.inf
    assert diverged.as_json()["perplexity"] is None


def test_tokens_stand_for_the_bytes_of_their_text():
    tokenizer = ByteLevelTokenizer(train_byte_level_bpe(["the cat and the hat " * 5], 300))
    text = "the hat, né"
    targets = np.array([*tokenizer.encode(text), tokenizer.end_of_document])
    assert tokenizer.text_bytes(np.zeros_like(targets), targets) == len(text.encode())


def test_the_loss_of_a_run_equals_one_sum_over_its_validation_split(run_directory):
    config = read_config(run_directory)
    model = trained_model(config, 10)
    ((_, stream),) = open_validation(config.megagpt)
    batch = stream.batch(range(stream.samples_per_epoch))
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens)).double().flatten(0, 1)
    logits = logits[:, : config.megagpt.model.vocabulary]  # what pads it is no class
    expected = F.cross_entropy(logits, torch.from_numpy(batch.targets).flatten())
    result = evaluate(placed(config, 10), stream, BYTES, batch_size=3)
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.tokens == stream.samples_per_epoch * SEQUENCE_LENGTH


def test_further_validation_sets_are_evaluated_too(run_directory, data):
    config = read_config(run_directory).megagpt
    more = config.data.model_copy(update={"validation": {"again": str(data)}})
    opened = open_validation(config.model_copy(update={"data": more}))
    assert [directory for directory, _ in opened] == [data, data]


@pytest.mark.parametrize(
    ("vocabulary", "ids"),
    [(256, "has not learned id 256"), (250, "has not learned ids 250 to 256")],
)
def test_ids_that_the_model_never_learnt_are_refused_though_the_embedding_has_rows_for_them(
    run_directory, vocabulary, ids
):
    config = read_config(run_directory).megagpt
    assert config.model.vocab_size == 384
    model = config.model.model_copy(update={"vocabulary": vocabulary})
    older = config.model_copy(update={"model": model})
    for opening in (open_validation, lambda config: open_tokenizer(config, run_directory)):
        with pytest.raises(
            UserError, match=rf"found 257 tokens, need at most {vocabulary}: .*{ids}\)"
        ):
            opening(older)


# ----------------------------------------------------------------------------------------- commands


def command(
    name: str, *arguments: object, python: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run launch/NAME.py from another directory than the repository's."""
    line = [
        sys.executable,
        *python,
        str(REPOSITORY / "launch" / f"{name}.py"),
        *map(str, arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        line, capture_output=True, text=True, cwd=REPOSITORY.parent, env=environment, check=False
    )


def test_generate_writes_each_prompt_with_its_continuation(run_directory):
    settings = {"max_new_tokens": 12, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "seed": 3}
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    result = command(
        *("generate", "--run_dir", run_directory),
        *("--prompt", "The", "日本", "--prompt", "n", *options),
    )
    assert result.returncode == 0, result.stderr
    config = read_config(run_directory)
    model = trained_model(config, 20)
    texts = generate(
        lambda tokens, cache: model(tokens, cache=cache),
        BYTES,
        ["The", "日本", "n"],
        sequence_length=SEQUENCE_LENGTH,
        **settings,
    )
    assert result.stdout.endswith(f"The{texts[0]}\n\n日本{texts[1]}\n\nn{texts[2]}\n\n")


def test_evaluate_prints_a_sentence_and_a_line_of_json(run_directory, data):
    result = command(
        "evaluate", "--run_dir", run_directory, "--step", 10, "--batch_size", 2, "--batches", 3
    )
    assert result.returncode == 0, result.stderr
    config = read_config(run_directory)
    ((_, stream),) = open_validation(config.megagpt)
    expected = evaluate(placed(config, 10), stream, BYTES, batch_size=2, batches=3)
    line = json.loads(result.stdout.splitlines()[-1])
    assert line == {
        "step": 10,
        "data": str(data),
        **{k: pytest.approx(v) for k, v in expected.as_json().items()},
    }
    assert f"step 10, {data}: loss {expected.loss:.4f}" in result.stderr


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("generate", ["--run_dir", "nowhere"], "nowhere: not a run directory (config.json: "),
        (
            "evaluate",
            ["--run_dir", "{run}", "--step", "15"],
            "no checkpoint of step 15; it has steps 10, 20",
        ),
    ],
)
def test_what_cannot_be_read_costs_one_line_and_exit_code_2(run_directory, name, options, reason):
    prompt = ["--prompt", "a"] if name == "generate" else []
    result = command(name, *prompt, *(option.format(run=run_directory) for option in options))
    assert result.returncode == 2
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--temperature", "-1"], "argument --temperature: -1 is below 0"),
        (["--temperature", "nan"], "argument --temperature: nan is not a finite number"),
        (["--temperature", "warm"], "argument --temperature: 'warm' is not a number"),
        (["--top_p", "0"], "argument --top_p: 0 is not above 0 and at most 1"),
        (["--top_k", "0"], "argument --top_k: 0 is below 1"),
        (["--max_new_tokens", "1.5"], "argument --max_new_tokens: '1.5' is not a whole number"),
    ],
)
def test_generate_refuses_settings_out_of_range(options, reason):
    result = command("generate", "--run_dir", "any", "--prompt", "a", *options)
    assert result.returncode == 2
    assert reason in result.stderr


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_help_needs_no_torch(name):
    result = command(name, "--help", python=("-X", "importtime"))
    assert result.returncode == 0
    assert "--run_dir" in result.stdout
    assert "megagpt.common.arguments" in result.stderr
    assert "torch" not in result.stderr
