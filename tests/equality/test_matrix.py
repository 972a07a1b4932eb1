"""Every legal combination of mesh, schedule, ZeRO stage, offload and batch trains as one plain
PyTorch process does.

In ``make test`` a selection in which every two levels of the axes meet
(``tests/support/matrix.py``). In ``make test-all`` all in fp32 with the default reduction, and of
the others a selection in which every three levels meet. Each row also shows, on every rank, that
what it asks for acted.
"""

import itertools
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.parity.plain import PlainRun
from megagpt.planning.layout import Layout, model_layers
from tests.support import plain
from tests.support.configurations import Config
from tests.support.equality import (
    WRAPPERS,
    Ranks,
    assert_equal_training,
    assert_rank_ran_its_passes,
    assert_strays_no_further_than_bf16,
)
from tests.support.matrix import (
    AXES,
    LENGTH,
    MOST_RANKS,
    STEPS,
    TOKENS,
    Row,
    document,
    is_legal,
    legal_rows,
    pairs,
    representatives,
    resolved,
    rows_in,
    selection,
    triples,
)
from tests.support.ranks import RankPool
from tests.support.shards import KINDS, whole_tensors

# As `python -m tests.support.matrix` printed them without masked targets, which then were spread
# over them so that every pair meets.
SELECTED = rows_in("""
0 none none none layers 2 per_micro_batch llama3 untied 2 fp32 masked lora
0 none none none none 1 per_micro_batch neox untied 1 fp32 masked lora
0 none none none none 2 per_micro_batch gemma2 untied 1 fp32 all lora
0 none none none none 2 per_micro_batch gpt2 untied 1 fp32 masked lora
0 none none none none 2 per_micro_batch neox untied 1 fp32 masked lora
0 none none none sequence 2 per_micro_batch qwen3 tied 6 fp32 masked all
1 cpu none 1f1b sequence 1 per_step llama3 untied 2 bf16 masked lora
1 cpu none gpipe none 2 per_micro_batch qwen3 untied 1 fp32 masked all
1 cpu none gpipe sequence 1 per_micro_batch gemma2 untied 1 fp32 masked lora
1 cpu none interleaved none 2 per_micro_batch gpt2 untied 1 bf16 all all
1 cpu none none sequence 2 per_micro_batch llama3 tied 1 fp32 all all
1 none none 1f1b none 2 per_step gemma2 tied 2 fp32 masked lora
1 none none interleaved none 2 per_micro_batch qwen3 untied 1 fp32 all all
1 none none interleaved sequence 1 per_step llama3 tied 1 fp32 all lora
1 none none none layers 2 per_step neox tied 6 bf16 masked lora
2 cpu none 1f1b none 2 per_step gpt2 untied 1 fp32 all all
2 cpu none gpipe none 2 per_step qwen3 untied 2 bf16 masked lora
2 cpu none none layers 2 per_step gemma2 tied 1 fp32 all lora
2 none none 1f1b none 2 per_micro_batch neox untied 1 fp32 all all
2 none none interleaved layers 1 per_micro_batch gpt2 tied 6 fp32 masked lora
2 none none interleaved none 2 per_step gemma2 untied 6 fp32 masked lora
2 none none none sequence 2 per_micro_batch llama3 tied 1 fp32 all all
3 cpu cpu 1f1b none 2 per_micro_batch llama3 tied 6 fp32 masked all
3 cpu cpu none layers 2 per_micro_batch gemma2 untied 2 fp32 masked all
3 cpu cpu none sequence 2 per_micro_batch neox untied 2 bf16 masked lora
3 cpu nvme interleaved none 2 per_micro_batch llama3 tied 2 bf16 all lora
3 none cpu gpipe layers 1 per_micro_batch qwen3 tied 2 fp32 masked all
3 none cpu gpipe none 2 per_micro_batch gpt2 untied 1 fp32 masked all
3 none nvme gpipe none 2 per_micro_batch neox untied 1 bf16 masked all
3 nvme cpu interleaved none 2 per_step neox untied 1 fp32 all lora
3 nvme none gpipe none 2 per_step llama3 tied 6 fp32 all all
3 nvme nvme 1f1b layers 1 per_micro_batch qwen3 untied 1 bf16 all lora
3 nvme nvme 1f1b none 2 per_micro_batch gemma2 untied 6 bf16 masked lora
3 nvme nvme none layers 2 per_step qwen3 tied 1 bf16 all all
3 nvme nvme none sequence 2 per_step gpt2 tied 2 bf16 masked all
""")
ALL_AXES = Row(
    3, "cpu", "cpu", "1f1b", "sequence", 2, "per_step", "gpt2", True, 2, "fp32"
)  # on eight ranks
ONE_PROCESS = tuple(
    Row(stage, *places, "none", "none", 1, "per_micro_batch", "gpt2", True, 2, "fp32")
    for stage, *places in (
        (0, "none", "none"),
        (1, "none", "none"),
        (3, "none", "none"),
        (3, "cpu", "cpu"),
    )
)
# `make test-torch-2.11` trains these, too: one process, two tensor ranks, two stages of each
# schedule
BOTH_STACKS = {
    *ONE_PROCESS,
    *rows_in("""
1 none none interleaved sequence 1 per_step llama3 tied 1 fp32 all lora
2 cpu none 1f1b none 2 per_step gpt2 untied 1 fp32 all all
2 none none none sequence 2 per_micro_batch llama3 tied 1 fp32 all all
3 none nvme gpipe none 2 per_micro_batch neox untied 1 bf16 masked all
"""),
}
Cell = tuple[int, str, str, str]  # ZeRO stage, where optimizer and parameters lie, schedule


def rows_of(cell: Cell) -> list[Row]:
    """Those that are legal, in fp32, with the reduction that is the default; parameters on NVMe
    in bf16, as they need it. The kinds of model take turns.
    """
    *_, parameters, pipeline = cell
    reduction = "per_micro_batch" if pipeline == "none" else "per_step"
    precision = "bf16" if parameters == "nvme" else "fp32"
    meshes = itertools.product(AXES.tensor, AXES.data, AXES.tied, AXES.micro_batches)
    kinds = itertools.cycle(AXES.kind)
    rows = (
        Row(*cell, tensor, data, reduction, next(kinds), tied, micro_batches, precision)
        for tensor, data, tied, micro_batches in meshes
    )
    return [row for row in rows if is_legal(row)]


def is_ever_legal(cell: Cell) -> bool:
    """Whether its plainest row is."""
    return any(
        is_legal(Row(*cell, "none", 1, reduction, AXES.kind[0], False, 1, precision))
        for reduction, precision in itertools.product(AXES.reduction, AXES.precision)
    )


CELLS = [cell for cell in itertools.product(*AXES[:4]) if is_ever_legal(cell)]


def test_in_the_selection_every_two_levels_meet_that_legally_can() -> None:
    """With replicas and without, in runs of few ranks."""
    legal = legal_rows(MOST_RANKS)
    assert set(SELECTED) | BOTH_STACKS <= set(legal)
    assert set(SELECTED) | set(ONE_PROCESS) >= BOTH_STACKS, "the others would not be trained"
    assert {row[:4] for row in legal} == set(CELLS)
    assert sum(len(rows_of(cell)) for cell in CELLS) == 1746, "docs/parallelism.md has this number"
    met = set().union(*map(pairs, representatives(legal)))
    assert met == set().union(*map(pairs, SELECTED))


def marked(row: Row) -> Any:
    """Rows of one process are left to `make test-torch-2.11`: the selection has all their pairs."""
    marks = [pytest.mark.both_stacks] if row in BOTH_STACKS else []
    return pytest.param(row, marks=[*marks, *([pytest.mark.slow] if row in ONE_PROCESS else [])])


@pytest.mark.parametrize("row", [*map(marked, [*ONE_PROCESS, *SELECTED]), ALL_AXES], ids=str)
def test_a_row_equals_one_plain_process(
    request: pytest.FixtureRequest, tmp_path: Path, row: Row
) -> None:
    train_and_check([row], request, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_row_equals_one_plain_process(
    request: pytest.FixtureRequest, tmp_path: Path, cell: Cell
) -> None:
    train_and_check(rows_of(cell), request, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", AXES.pipeline)
def test_runs_in_which_every_three_levels_meet_equal_one_plain_process(
    request: pytest.FixtureRequest, tmp_path: Path, pipeline: str
) -> None:
    """Both precisions and both reductions among them."""
    train_and_check([row for row in every_triple() if row.pipeline == pipeline], request, tmp_path)


@cache
def every_triple() -> list[Row]:
    return selection(legal_rows(most_ranks=8), triples)


def train_and_check(rows: list[Row], request: pytest.FixtureRequest, swap: Path) -> None:
    """Train the rows one after the other; all that fail are named."""
    if any("nvme" in row for row in rows):
        request.getfixturevalue("nvme")
    wrong = {}
    for index, row in enumerate(rows):
        try:
            check(request.getfixturevalue("pools").get(row.ranks), row, swap / str(index))
        except AssertionError as error:
            wrong[row] = error
        shutil.rmtree(swap / str(index), ignore_errors=True)
    assert not wrong, "\n\n".join(f"{row}\n{error}" for row, error in wrong.items())


def check(pool: RankPool, row: Row, swap: Path) -> None:
    """Train a row and assert everything that can be seen of it."""
    config = document(row, swap)
    ranks = pool.run(
        "tests.support.jobs.training:train_swapping_small_tensors", config=config, steps=STEPS
    )
    reference = plain_run(identity(config), torch.float32)
    layout = Layout.of(resolved(config, row.ranks))
    if row.precision == "fp32":
        model = layout.model
        head_size = model.head_size if model.qkv_bias and model.qk_norm == "none" else None
        assert_equal_training(ranks, reference, head_size, 2e-5, rotated=model.rotated_size)
    else:
        rounded = plain_run(identity(config), torch.bfloat16)
        assert_strays_no_further_than_bf16(
            ranks, reference, rounded, LENGTH * config["train_batch_size"]
        )
    assert_padding_is_zero(ranks, config)
    for index, rank in enumerate(ranks):
        masked = row.micro_batches if row.targets == "masked" else 0
        assert rank["document_bounds"] == masked, "bounds are computed once a micro-batch"
        pipeline_rank = index * row.stages // row.ranks
        assert_rank_holds_its_part(rank["evidence"], row)
        assert_rank_ran_its_passes(rank, layout, pipeline_rank)
        assert_rank_sent_its_part(rank, row, layout, pipeline_rank)


def identity(config: Config) -> str:
    """What one plain process makes the same of: a key for its result."""
    left_out = ("zero_optimization", "aio", "bf16")
    megagpt = {key: section for key, section in config["megagpt"].items() if key != "parallel"}
    return json.dumps(
        {key: value for key, value in config.items() if key not in left_out} | {"megagpt": megagpt}
    )


@cache
def plain_run(document: str, dtype: torch.dtype) -> PlainRun:
    """Matrix products, norms and activations in ``dtype``."""
    return plain.train(json.loads(document) | {"bf16": {"enabled": False}}, STEPS, dtype)


def assert_padding_is_zero(ranks: Ranks, config: Config) -> None:
    """Rows of the vocabulary that stand for no token."""
    state, width = (
        whole_tensors(rank["state"] for rank in ranks),
        config["megagpt"]["model"]["hidden_size"],
    )
    for kind, name in itertools.product(KINDS, ("embedding.tokens.weight", "head.weight")):
        if (kind, name) in state:
            rows = state[kind, name].view(-1, width)
            assert len(rows) > TOKENS
            assert not rows[TOKENS:].any(), f"{kind} of {name}"
            assert rows[:TOKENS].any(), f"{kind} of {name}"


def assert_rank_holds_its_part(seen: dict[str, Any], row: Row) -> None:
    """Of its stage and layers the share of one replica, in the precision and at the place that
    was asked for.
    """
    assert seen["wrapper"] == WRAPPERS[row.stage]
    assert seen["adam"] == ("AdamW" if row.optimizer == "none" else "DeepSpeedCPUAdam")
    assert (
        seen["parameter_type"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[row.precision]
    )
    assert seen["optimizer_offloaded"] == (row.optimizer != "none")
    assert seen["parameters_offloaded"] == (row.parameters != "none")
    parts = row.stages * row.shards
    assert seen["stage_elements"] <= (1 if parts == 1 else 1.5 / parts) * seen["whole_elements"]
    replicas = row.data if row.stage else 1
    share = seen["trained_elements"] / replicas
    held = seen["stage_elements"] / replicas
    assert seen["master_elements"] == pytest.approx(share, rel=0.02)
    assert (seen["trained_elements"] < seen["stage_elements"] / 2) == (row.trained == "lora")
    assert seen["frozen_with_gradient"] == 0
    on_disk = {"optimizer": 0, "param": 0}
    for name, size in seen["swap_files"]:
        on_disk["param" if "param" in name else "optimizer"] += size
    assert (
        (on_disk["optimizer"] >= 0.95 * 12 * share)
        if row.optimizer == "nvme"
        else on_disk["optimizer"] == 0
    )
    if row.stage == 3:
        assert seen["parameter_elements"] == 0
        assert seen["shard_elements"] == pytest.approx(held, rel=0.02)
    if row.parameters == "nvme":
        assert seen["elements_on_nvme"] > 0.8 * held
        assert seen["shard_elements_in_memory"] < 0.2 * held
        assert on_disk["param"] >= 2 * seen["elements_on_nvme"]
    else:
        assert seen["elements_on_nvme"] == on_disk["param"] == 0


def assert_rank_sent_its_part(
    rank: dict[str, Any], row: Row, layout: Layout, pipeline_rank: int
) -> None:
    """In the last step: elements over each axis. Losses, norms and overflows are a number each."""
    traffic, numbers = rank["traffic"], 16
    stages, last = layout.stages_of(pipeline_rank), layout.num_stages - 1
    hidden = row.micro_batches * layout.tokens * layout.model.hidden_size
    if row.pipeline != "none":
        neighbours = sum((stage > 0) + (stage < last) for stage in stages)
        shares = row.shards if row.tensor == "sequence" else 1
        calls = neighbours * row.micro_batches
        assert traffic["pipeline", "send"] == (calls, neighbours * hidden // shares)
    if row.data > 1:
        operation = "reduce_scatter" if row.stage == 3 else "all_reduce"
        times = (
            row.micro_batches if row.reduction == "per_micro_batch" and row.stage > 1 else 1
        )  # ZeRO 1 waits
        elements = times * rank["evidence"]["trained_elements"]
        assert traffic["data", operation][1] == pytest.approx(elements, rel=0.01, abs=numbers)
        if row.stage == 3:
            assert traffic["data", "all_gather"][1] >= 0.95 * rank["evidence"]["stage_elements"]
    if (
        row.tensor != "none"
    ):  # docs/parallelism.md: the two row layers forward, the two column layers backward
        operation = "reduce_scatter" if row.tensor == "sequence" else "all_reduce"
        held = [model_layers(layout.model, layout.stages[stage]) for stage in stages]
        sums = sum(
            4 * blocks + embedding + (head and row.tensor == "layers")
            for blocks, embedding, head in held
        )
        sent = sums * hidden
        once = row.stage == 0 or row.reduction == "per_step"  # at the end of the step
        if row.tensor == "sequence" and once:
            # The loss's gradient; all partial gradients together; the norm, which ZeRO 0 lacks.
            calls = row.micro_batches * (last in stages) + 1 + (row.stage == 0)
            assert traffic["tensor", "all_reduce"][0] == calls
        blocks = sum(blocks for blocks, *_ in held)
        if layout.lora is not None:  # the low-rank states of each adapter
            adapters = blocks * len(layout.lora.projections(layout.model))
            sent += row.micro_batches * adapters * layout.lora.rank * layout.tokens
        elif row.kind == "qwen3" and row.tensor == "layers":  # two weights that all heads share
            sent += (1 if once else row.micro_batches) * blocks * 2 * layout.model.head_size
        assert traffic["tensor", operation][1] == pytest.approx(sent, abs=numbers)
