"""Every legal combination of mesh, schedule, ZeRO stage, offload and batch trains as one plain PyTorch process does.

In ``make test`` a selection in which every two levels of the axes meet (``tests/matrix.py``); all in ``make test-all``.
Each row also shows, on every rank, that what it asks for acted.
"""

import itertools
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megagpt import plain as plain_process
from megagpt.model import GPT
from megagpt.plain import PlainRun
from tests import plain
from tests.configurations import Config
from tests.equality import WRAPPERS, Ranks, assert_equal_training
from tests.matrix import AXES, LENGTH, MOST_RANKS, SAMPLES, STEPS, TOKENS, Row, all_rows, document, is_legal, pairs
from tests.shards import KINDS, whole_tensors
from tests.test_bf16 import ROUNDING, ComputesInBf16, straying, weights_straying

SELECTED = (  # printed by `python -m tests.matrix`
    Row(0, "none", "none", "none", "layers", 1, "per_micro_batch", False, 6, "fp32"),
    Row(0, "none", "none", "none", "layers", 2, "per_micro_batch", True, 6, "fp32"),
    Row(0, "none", "none", "none", "none", 2, "per_micro_batch", True, 1, "fp32"),
    Row(0, "none", "none", "none", "sequence", 2, "per_micro_batch", False, 2, "fp32"),
    Row(1, "cpu", "none", "gpipe", "none", 2, "per_step", True, 6, "fp32"),
    Row(1, "cpu", "none", "interleaved", "none", 2, "per_step", True, 1, "fp32"),
    Row(1, "cpu", "none", "interleaved", "sequence", 1, "per_step", True, 1, "bf16"),
    Row(1, "none", "none", "1f1b", "none", 2, "per_step", True, 1, "bf16"),
    Row(1, "none", "none", "1f1b", "sequence", 1, "per_step", True, 1, "fp32"),
    Row(1, "none", "none", "interleaved", "layers", 1, "per_step", True, 1, "fp32"),
    Row(1, "none", "none", "none", "layers", 2, "per_micro_batch", False, 6, "fp32"),
    Row(1, "none", "none", "none", "sequence", 2, "per_step", True, 2, "fp32"),
    Row(2, "cpu", "none", "1f1b", "none", 2, "per_step", True, 2, "fp32"),
    Row(2, "cpu", "none", "interleaved", "none", 2, "per_micro_batch", False, 6, "bf16"),
    Row(2, "none", "none", "gpipe", "layers", 1, "per_step", True, 1, "fp32"),
    Row(2, "none", "none", "gpipe", "none", 2, "per_step", True, 1, "fp32"),
    Row(2, "none", "none", "none", "layers", 2, "per_step", True, 1, "fp32"),
    Row(2, "none", "none", "none", "sequence", 2, "per_step", False, 1, "bf16"),
    Row(3, "cpu", "cpu", "none", "layers", 2, "per_step", False, 2, "bf16"),
    Row(3, "cpu", "nvme", "none", "sequence", 2, "per_step", True, 6, "bf16"),
    Row(3, "none", "cpu", "1f1b", "none", 1, "per_step", True, 6, "fp32"),
    Row(3, "none", "cpu", "1f1b", "none", 2, "per_step", True, 1, "fp32"),
    Row(3, "none", "cpu", "interleaved", "none", 2, "per_micro_batch", True, 2, "fp32"),
    Row(3, "none", "cpu", "none", "sequence", 2, "per_step", True, 6, "fp32"),
    Row(3, "none", "nvme", "1f1b", "layers", 1, "per_step", False, 1, "bf16"),
    Row(3, "none", "nvme", "gpipe", "none", 2, "per_micro_batch", False, 2, "bf16"),
    Row(3, "nvme", "cpu", "gpipe", "none", 2, "per_step", True, 1, "fp32"),
    Row(3, "nvme", "cpu", "gpipe", "sequence", 1, "per_micro_batch", False, 2, "fp32"),
    Row(3, "nvme", "none", "none", "sequence", 2, "per_micro_batch", True, 2, "fp32"),
    Row(3, "nvme", "nvme", "1f1b", "none", 2, "per_micro_batch", False, 6, "bf16"),
    Row(3, "nvme", "nvme", "interleaved", "none", 2, "per_step", False, 1, "bf16"),
    Row(3, "nvme", "nvme", "none", "layers", 2, "per_step", True, 1, "bf16"),
)
Cell = tuple[int, str, str, str, str]  # ZeRO stage, where optimizer and parameters lie, schedule, precision


def rows_of(cell: Cell) -> Iterator[Row]:
    """Those that are legal."""
    *first, precision = cell
    others = itertools.product(AXES.tensor, AXES.data, AXES.reduction, AXES.tied, AXES.micro_batches)
    return filter(is_legal, (Row(*first, *levels, precision) for levels in others))


def has_rows(cell: Cell) -> bool:
    """Whether its plainest row is legal."""
    *first, precision = cell
    return is_legal(Row(*first, "none", 2, "per_micro_batch", False, 2, precision))


CELLS = [
    cell
    for cell in itertools.product(AXES.stage, AXES.optimizer, AXES.parameters, AXES.pipeline, AXES.precision)
    if has_rows(cell)
]


def test_in_the_selection_every_two_levels_meet_that_legally_can() -> None:
    """Of runs of few ranks; with replicas and without."""
    legal = {row for row in all_rows() if is_legal(row)}
    assert set(SELECTED) <= legal
    can_meet = set().union(*(pairs(row) for row in legal if row.ranks <= MOST_RANKS))
    assert can_meet - set().union(*map(pairs, SELECTED)) == set()
    assert {row for cell in CELLS for row in rows_of(cell)} == legal


@pytest.mark.parametrize("row", SELECTED, ids=str)
def test_a_row_equals_one_plain_process(request: pytest.FixtureRequest, pools: Any, tmp_path: Path, row: Row) -> None:
    if "nvme" in row:
        request.getfixturevalue("nvme")
    check(pools, row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_all_rows_of_a_cell_equal_one_plain_process(
    request: pytest.FixtureRequest, pools: Any, tmp_path: Path, cell: Cell
) -> None:
    if "nvme" in cell:
        request.getfixturevalue("nvme")
    wrong = {}
    for index, row in enumerate(rows_of(cell)):
        try:
            check(pools, row, tmp_path / str(index))
        except AssertionError as error:
            wrong[str(row)] = error
    assert not wrong, "\n\n".join(f"{row}\n{error}" for row, error in wrong.items())


def check(pools: Any, row: Row, swap: Path) -> None:
    """Train a row and assert all that is to be seen of it."""
    config = document(row, swap)
    ranks = pools.get(row.ranks).run("tests.jobs:train_swapping_small_tensors", config=config, steps=STEPS)
    reference = plain_run(identity(config), GPT)
    if row.precision == "fp32":
        head_size = config["megagpt"]["model"]["hidden_size"] // 4 if row.tied else None  # rotated keys: biases count
        assert_equal_training(ranks, reference, head_size, tolerance=2e-5)
    else:
        rounded = plain_run(identity(config), ComputesInBf16)
        assert_strays_no_further_than_bf16(ranks, reference, rounded, samples=config["train_batch_size"])
    assert_padding_is_zero(ranks, config)
    for index, rank in enumerate(ranks):
        assert_rank_holds_its_part(rank["evidence"], row)
        pipeline_rank = index * row.stages // row.ranks
        assert_rank_sent_its_part(rank, row, pipeline_rank, config["megagpt"]["model"])


def identity(config: Config) -> str:
    """What one plain process makes the same of: a key for its result."""
    left_out = ("zero_optimization", "aio", "bf16")
    megagpt = {key: section for key, section in config["megagpt"].items() if key != "parallel"}
    return json.dumps({key: value for key, value in config.items() if key not in left_out} | {"megagpt": megagpt})


@cache
def plain_run(document: str, model: type[GPT]) -> PlainRun:
    with patch.object(plain_process, "GPT", model):
        return plain.train(json.loads(document) | {"bf16": {"enabled": False}}, STEPS)


def assert_strays_no_further_than_bf16(ranks: Ranks, exact: PlainRun, rounded: PlainRun, samples: int) -> None:
    """From fp32 at most twice as far as one plain process does that computes in bf16: ``tests/test_bf16.py``."""
    of_weights = weights_straying(rounded.state["weight"], exact)
    fall = (exact.losses[0] - exact.losses[-1]) / exact.losses[-1]
    of_losses = max(straying(rounded.losses, exact.losses), ROUNDING / math.sqrt(samples * LENGTH), of_weights * fall)
    of_norms = max(straying(rounded.norms, exact.norms), ROUNDING)
    for results in (rank["results"] for rank in ranks):
        assert straying([step.loss for step in results], exact.losses) <= 2 * of_losses
        assert straying([step.grad_norm for step in results], exact.norms) <= 2 * of_norms
    state = whole_tensors(rank["state"] for rank in ranks)
    weights = {name: values for (kind, name), values in state.items() if kind == "weight"}
    assert 0 < weights_straying(weights, exact) <= 2 * of_weights


def assert_padding_is_zero(ranks: Ranks, config: Config) -> None:
    """Rows of the vocabulary that stand for no token."""
    state, width = whole_tensors(rank["state"] for rank in ranks), config["megagpt"]["model"]["hidden_size"]
    for kind, name in itertools.product(KINDS, ("embedding.tokens.weight", "head.weight")):
        if (kind, name) in state:
            rows = state[kind, name].view(-1, width)
            assert len(rows) > TOKENS
            assert not rows[TOKENS:].any(), f"{kind} of {name}"
            assert rows[:TOKENS].any(), f"{kind} of {name}"


def assert_rank_holds_its_part(seen: dict[str, Any], row: Row) -> None:
    """Of its stage and layers the share of one replica, in the precision and at the place that was asked for."""
    assert seen["wrapper"] == WRAPPERS[row.stage]
    assert seen["adam"] == ("AdamW" if row.optimizer == "none" else "DeepSpeedCPUAdam")
    assert seen["parameter_type"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[row.precision]
    assert seen["optimizer_offloaded"] == (row.optimizer != "none")
    assert seen["parameters_offloaded"] == (row.parameters != "none")
    parts = row.stages * row.shards
    assert seen["stage_elements"] <= (1 if parts == 1 else 1.5 / parts) * seen["whole_elements"]
    share = seen["stage_elements"] / (row.data if row.stage else 1)
    assert seen["master_elements"] == pytest.approx(share, rel=0.02)
    on_disk = {"optimizer": 0, "param": 0}
    for name, size in seen["swap_files"]:
        on_disk["param" if "param" in name else "optimizer"] += size
    assert (on_disk["optimizer"] >= 0.95 * 12 * share) if row.optimizer == "nvme" else on_disk["optimizer"] == 0
    if row.stage == 3:
        assert seen["parameter_elements"] == 0
        assert seen["shard_elements"] == pytest.approx(share, rel=0.02)
    if row.parameters == "nvme":
        assert seen["elements_on_nvme"] > 0.8 * share
        assert seen["shard_elements_in_memory"] < 0.2 * share
        assert on_disk["param"] >= 2 * seen["elements_on_nvme"]
    else:
        assert seen["elements_on_nvme"] == on_disk["param"] == 0


def assert_rank_sent_its_part(rank: dict[str, Any], row: Row, pipeline_rank: int, model: Config) -> None:
    """In the last step: elements over each axis. Losses, norms and overflows are a number each."""
    traffic, numbers = rank["traffic"], 16
    hidden = SAMPLES * LENGTH * model["hidden_size"]
    if row.pipeline != "none":
        last = row.stages * (2 if row.pipeline == "interleaved" else 1) - 1
        neighbours = sum((stage > 0) + (stage < last) for stage in range(pipeline_rank, last + 1, row.stages))
        calls = neighbours * row.micro_batches
        shares = row.shards if row.tensor == "sequence" else 1
        assert traffic["pipeline", "send"] == (calls, calls * hidden // shares)
    if row.data > 1:
        operation = "reduce_scatter" if row.stage == 3 else "all_reduce"
        times = row.micro_batches if row.reduction == "per_micro_batch" and row.stage > 1 else 1  # ZeRO 1 waits
        elements = times * rank["evidence"]["stage_elements"]
        assert traffic["data", operation][1] == pytest.approx(elements, rel=0.01, abs=numbers)
        if row.stage == 3:
            assert traffic["data", "all_gather"][1] >= 0.95 * rank["evidence"]["stage_elements"]
    if row.tensor != "none":  # docs/parallelism.md: the two row layers forward, the two column layers backward
        operation = "reduce_scatter" if row.tensor == "sequence" else "all_reduce"
        sums = 4 * model["num_layers"] + (1 if row.tensor == "sequence" else 2)  # embedding, head
        expected = sums * row.micro_batches * hidden
        if row.pipeline == "none":
            assert traffic["tensor", operation][1] == pytest.approx(expected, abs=numbers)
        else:
            assert 4 * row.micro_batches * hidden <= traffic["tensor", operation][1] < expected
