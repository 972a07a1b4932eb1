"""Evaluation by ranks that share the model or the text, beside one process with all of both."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import REPOSITORY
from tests.conftest import _Pools
from tests.support.jobs.evaluation import evaluate
from tests.support.trained_run import TEXTS, write_dataset, write_run

EVALUATE = "tests.support.jobs.evaluation:evaluate"
LLAMA = {
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "tie_embeddings": False,
}
# Ranks, axes, and the most of the model that a rank may hold.
SHARED: dict[str, tuple[int, dict[str, int], float]] = {
    "data": (2, {}, 1.0),
    "pipeline": (2, {"pipeline": 2}, 0.75),
    "tensor": (2, {"tensor": 2}, 0.55),
    "tensor x pipeline": (4, {"tensor": 2, "pipeline": 2}, 0.4),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    data = write_dataset(tmp_path_factory.mktemp("dataset"))
    directory = tmp_path_factory.mktemp("runs")
    return {
        "gpt2": write_run(directory / "gpt2", data),
        "llama": write_run(directory / "llama", data, **LLAMA),
    }


@pytest.mark.rotate(2)
@pytest.mark.parametrize("kind", ["validation", "text"])
@pytest.mark.parametrize("shared", SHARED)
def test_ranks_find_what_one_process_finds(
    pools: _Pools, runs: dict[str, Path], tmp_path: Path, shared: str, kind: str
) -> None:
    ranks, axes, most = SHARED[shared]
    run = runs["gpt2" if kind == "text" else "llama"]
    options: dict[str, Any] = {"run_dir": run, "batch_size": 2}
    if kind == "text":
        (tmp_path / "a.txt").write_text(TEXTS[1])
        options["dataset"] = [str(tmp_path / "a.txt")]
    alone = evaluate(**options)
    found = pools.get(ranks).run(EVALUATE, **options, **axes)
    assert [result["lines"] for result in found[1:]] == [[]] * (ranks - 1)
    (line,), (expected,) = found[0]["lines"], alone["lines"]
    assert line["tokens"] > 50
    assert line == {
        **expected,
        **{key: pytest.approx(expected[key], rel=1e-6) for key in ("loss", "bits_per_byte")},
        "perplexity": pytest.approx(expected["perplexity"], rel=1e-5),
    }
    assert all(0 < result["held"] <= most * alone["held"] for result in found)
    replicas = ranks if shared == "data" else 1
    assert sum(result["batches"] for result in found) * replicas == alone["batches"] * ranks


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"tensor": 4}, "2 ranks are no multiple of tensor 4 x pipeline 1; start 4 of them"),
        ({"pipeline": 2, "tensor": 2}, "start 4 of them, or give --tensor and --pipeline"),
    ],
)
def test_axes_that_do_not_fit_are_one_line(
    pools: _Pools, runs: dict[str, Path], axes: dict[str, int], reason: str
) -> None:
    found = pools.get(2).run(EVALUATE, run_dir=runs["gpt2"], **axes)
    assert all(reason in result["refused"] for result in found)


def test_a_checkpoint_that_is_damaged_is_refused_on_every_rank(
    pools: _Pools, runs: dict[str, Path], tmp_path: Path
) -> None:
    found = pools.get(2).run(EVALUATE, run_dir=runs["gpt2"], step=7, pipeline=2)
    assert all("no checkpoint of step 7; it has steps 10" in r["refused"] for r in found)


@pytest.mark.slow
def test_the_command_runs_under_deepspeeds_launcher(
    compiled_ops: None, runs: dict[str, Path], tmp_path: Path
) -> None:
    """One line for all ranks, of a result as of an error."""
    (tmp_path / "a.txt").write_text(TEXTS[1])
    words = ["--run_dir", str(runs["gpt2"]), "--dataset", str(tmp_path / "a.txt")]
    command = ["deepspeed", "--num_accelerators", "2", str(REPOSITORY / "launch/evaluate.py")]
    done = subprocess.run(
        [*command, *words, "--pipeline", "2"], capture_output=True, text=True, check=True
    )
    (line,) = (text for text in done.stdout.splitlines() if text.startswith("{"))
    (expected,) = evaluate(run_dir=runs["gpt2"], dataset=[str(tmp_path / "a.txt")])["lines"]
    assert json.loads(line)["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    refused = subprocess.run(
        [*command, *words, "--tensor", "3"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert (refused.stdout + refused.stderr).count("2 ranks are no multiple of tensor 3") == 1
