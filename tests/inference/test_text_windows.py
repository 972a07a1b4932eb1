"""Evaluation on any text, beside transformers' documented perplexity of the exported model."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagpt.huggingface.export import export
from megagpt.inference.text_windows import windows
from megagpt.model import IGNORED
from tests.support.jobs.evaluation import evaluate
from tests.support.trained_run import SEQUENCE_LENGTH, write_dataset, write_run

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_dataset(tmp_path_factory.mktemp("dataset"))
    return write_run(tmp_path_factory.mktemp("runs") / "small", data)


@pytest.fixture(scope="module")
def exported(run: Path) -> tuple[Any, Any]:
    export(run, run.parent / "exported")
    model = AutoModelForCausalLM.from_pretrained(run.parent / "exported")
    return model.eval(), AutoTokenizer.from_pretrained(run.parent / "exported")


def documented(model: Any, tokens: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' page on the perplexity of fixed-length models: the mean and the
    number of targets.

    The page takes one from every window's count for the shift of the labels. Only a window whose
    first token has a label loses one; here the labels that are left after the shift are counted.
    """
    nats, targets, previous_end = 0.0, 0, 0
    length = tokens.shape[1]
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        labels = tokens[:, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        counted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(tokens[:, begin:end], labels=labels).loss
        if counted:
            nats += float(loss) * counted
            targets += counted
        previous_end = end
        if end == length:
            break
    return nats / targets, targets


@pytest.mark.parametrize(
    ("window", "stride"), [(None, None), (16, 1), (16, 15), (16, 16), (7, 3), (16, 8)]
)
def test_a_text_has_the_perplexity_that_transformers_documents(
    run: Path, exported: tuple[Any, Any], tmp_path: Path, window: int | None, stride: int | None
) -> None:
    model, tokenizer = exported
    (tmp_path / "a.txt").write_text(TEXT)
    result = evaluate(run_dir=run, dataset=[str(tmp_path / "a.txt")], window=window, stride=stride)
    (line,) = result["lines"]
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    used = window or SEQUENCE_LENGTH
    loss, targets = documented(model, tokens, used, stride or used // 2)
    assert (line["window"], line["stride"]) == (used, stride or used // 2)
    assert line["tokens"] == targets
    assert line["loss"] == pytest.approx(loss, rel=1e-6)
    assert line["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    # A token is a byte here.
    assert line["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-6)
    assert line["text_bytes"] == targets
    if line["stride"] < used:
        assert targets == len(TEXT.encode()) - 1  # each but the first, once


def test_windows_are_of_one_document_and_short_ones_count(run: Path, tmp_path: Path) -> None:
    """Rows of a compressed file, each with windows of its own; batches hold rows of any length."""
    rows = [TEXT, "ab", "a", TEXT[:40]]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"body": row}) + "\n" for row in rows))
    options: dict[str, Any] = {"run_dir": run, "stride": 8, "column": "body"}
    (whole,) = evaluate(dataset=[str(tmp_path / "rows.jsonl.gz")], **options)["lines"]
    nats = tokens = 0
    for number, row in enumerate(rows):
        if len(row) == 1:
            continue
        (tmp_path / f"{number}.txt").write_text(row)
        name = str(tmp_path / f"{number}.txt")
        (line,) = evaluate(run_dir=run, dataset=[name], stride=8, batch_size=1)["lines"]
        nats += line["loss"] * line["tokens"]
        tokens += line["tokens"]
    assert whole["tokens"] == tokens == sum(len(row.encode()) - 1 for row in rows)
    assert whole["loss"] == pytest.approx(nats / tokens, rel=1e-6)


def spans(length: int, window: int, stride: int) -> Iterator[list[int]]:
    for _, targets in windows(np.arange(length), window, stride):
        yield targets[targets != IGNORED].tolist()


def test_each_token_is_scored_once() -> None:
    for window, stride, length in [(8, 1, 20), (8, 5, 23), (8, 7, 8), (8, 4, 3), (2, 1, 9)]:
        scored = [token for span in spans(length, window, stride) for token in span]
        assert scored == list(range(1, length))
    assert [*spans(1, 8, 4)] == []


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ("", {}, "nothing in it (empty: "),
        ("a", {}, "no token to predict"),
        (TEXT, {"stride": 17}, "--stride 17: larger than the window (16 tokens)"),
        (TEXT, {"window": 8, "stride": 9}, "--stride 9: larger than the window (8 tokens)"),
        (TEXT, {"window": 17}, "--window 17: must be at least 2 and at most"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    run: Path, tmp_path: Path, content: str, options: dict[str, int], reason: str
) -> None:
    (tmp_path / "a.txt").write_text(content)
    refused = evaluate(run_dir=run, dataset=[str(tmp_path / "a.txt")], **options)["refused"]
    assert reason in refused
    assert "\n" not in refused
