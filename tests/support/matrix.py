"""The equality matrix: its axes, which of its combinations are legal, and a pairwise selection of
them.

``python -m tests.support.matrix`` prints the selection that ``tests/equality/test_matrix.py``
trains in ``make test``.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.config import ConfigError, ResolvedConfig, RunConfig
from megagpt.planning.rules import refusals
from tests.support.configurations import KINDS, Config, tiny, with_zero

STEPS = 3
SAMPLES, LENGTH, WIDTH = 2, 16, 32  # of a micro-batch, of a sample, of the residual stream
TOKENS = 120  # of the vocabulary; the embedding has 128 rows, of which eight are padding
MOST_RANKS = 4  # of a row in `make test`
SWAPPED_BYTES = 4096  # of the smallest tensor that goes to the disk; DeepSpeed's own limit is 1 MiB


class Row(NamedTuple):
    """One combination."""

    stage: int
    optimizer: str
    parameters: str
    pipeline: str
    tensor: str
    data: int
    reduction: str
    kind: str
    tied: bool
    micro_batches: int
    precision: str
    targets: str = "all"
    trained: str = "all"  # or adapters alone: "lora"

    @property
    def ranks(self) -> int:
        return self.stages * self.shards * self.data

    @property
    def stages(self) -> int:
        """Ranks of the pipeline axis."""
        return 1 if self.pipeline == "none" else 2

    @property
    def shards(self) -> int:
        """Ranks of the tensor axis."""
        return 1 if self.tensor == "none" else 2

    def __str__(self) -> str:
        return (
            f"ZeRO {self.stage} {self.optimizer}/{self.parameters}, {self.pipeline} x "
            f"{self.tensor} x {self.data}, {self.reduction}, {self.kind} "
            f"{'tied' if self.tied else 'untied'}, {self.micro_batches}, {self.precision}"
            f"{', masked' if self.targets == 'masked' else ''}"
            + (", lora" if self.trained == "lora" else "")
        )


AXES = Row(
    stage=(0, 1, 2, 3),
    optimizer=("none", "cpu", "nvme"),
    parameters=("none", "cpu", "nvme"),
    pipeline=(
        "none",
        "1f1b",
        "gpipe",
        "interleaved",
    ),  # of two ranks, interleaved: of two stages on each
    tensor=("none", "layers", "sequence"),  # of two ranks, sequence: the norms are shared, too
    data=(1, 2),
    reduction=("per_step", "per_micro_batch"),
    kind=("gpt2", "llama3", "qwen3", "gemma2", "neox"),
    tied=(True, False),
    micro_batches=(1, 2, 6),  # of a rank and step: fewer than stages, as many, more
    precision=("fp32", "bf16"),
    targets=("all", "masked"),  # masked: of packed conversations
    trained=("all", "lora"),
)
# Fused projections, some of the parts of one, all by themselves.
TARGETS = {"gpt2": ["qkv", "output", "up", "down"], "qwen3": ["query", "value", "gate", "down"]}


def in_words(row: Row) -> str:
    """A row on a line, which ``rows_in`` reads."""
    return " ".join(map(_word, row))


def rows_in(text: str) -> tuple[Row, ...]:
    """The rows of a text, one a line: a level of each axis."""
    levels = [{_word(level): level for level in axis} for axis in AXES]
    lines = (line.split() for line in text.strip().splitlines())
    return tuple(
        Row(*(known[word] for known, word in zip(levels, line, strict=True))) for line in lines
    )


def _word(level: Any) -> str:
    return {True: "tied", False: "untied"}[level] if isinstance(level, bool) else str(level)


def document(row: Row, swap_directory: Path = Path("swap")) -> Config:
    """The run of a row, as a file would describe it. Blocks do not divide evenly among stages."""
    shape = {
        "vocabulary": TOKENS,
        "num_layers": 5 if row.pipeline == "interleaved" else 3,
        "tie_embeddings": row.tied,
    }
    batch = SAMPLES * row.micro_batches * row.data
    if row.parameters == "nvme":
        shape["hidden_size"] = 2 * WIDTH  # so that a quarter of a matrix in bf16 is swapped
    # The plain process reads conversations alone, where dropout has other masks.
    shape |= {"dropout": 0.1} if row.kind == "gpt2" and row.targets == "all" else {}
    config = tiny(batch=batch, micro=SAMPLES, steps=STEPS, **KINDS[row.kind], **shape)
    # Above the rounding of a gradient, which Adam's usual 1e-8 is not: of thousands of elements one
    # would be so small that its update follows the rounding.
    config["optimizer"]["params"]["eps"] = 1e-6
    config = with_zero(config, row.stage, row.optimizer, row.parameters)
    config["bf16"] = {"enabled": row.precision == "bf16"}
    if row.targets == "masked":
        config["megagpt"]["data"] = {"packing": "conversations"}
    if row.trained == "lora":
        config["megagpt"]["training"]["lora"] = {
            "rank": 6,
            "dropout": shape.get("dropout", 0.0),
            "targets": TARGETS.get(row.kind, ["all"]),
        }
    parallel: dict[str, Any] = {
        "pipeline": row.stages,
        "tensor": row.shards,
        "gradient_reduction": row.reduction,
    }
    if row.pipeline != "none":
        parallel |= {
            "schedule": row.pipeline,
            "virtual_stages": 2 if row.pipeline == "interleaved" else 1,
        }
    config["megagpt"]["parallel"] = parallel | {"sequence": row.tensor == "sequence"}
    zero = config["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            zero[section]["nvme_path"] = str(swap_directory)
            config["aio"] = {"block_size": SWAPPED_BYTES}
            if section == "offload_param":
                zero[section] |= {"max_in_cpu": 0, "buffer_size": 200_000}
    return config


def resolved(config: Config, ranks: int) -> ResolvedConfig:
    """The run on so many ranks; ConfigError where it cannot be."""
    written = RunConfig.from_json(json.dumps(config))
    return written.resolved(world_size=ranks, vocabulary=None, bf16_native=True)


@cache
def is_legal(row: Row) -> bool:
    """Whether the planner lets it start."""
    if row.trained == "lora":  # frozen, the tied weight's copies have no gradients to be summed
        return is_legal(row._replace(trained="all", tied=False))
    if (row.kind, row.targets) != (AXES.kind[0], AXES.targets[0]):
        # two ranks divide the heads and widths of all kinds
        return is_legal(row._replace(kind=AXES.kind[0], targets=AXES.targets[0]))
    try:
        return not refusals(resolved(document(row), row.ranks))
    except ConfigError:
        return False


def all_rows() -> Iterator[Row]:
    """Every combination, legal or not."""
    return (Row(*levels) for levels in itertools.product(*AXES))


Meeting = tuple[tuple[str, Any], ...]  # levels of some axes, each with the axis' name


def meetings(row: Row, axes: int) -> set[Meeting]:
    """Every so many levels that meet in a row."""
    return set(itertools.combinations(row._asdict().items(), axes))


def triples(row: Row) -> set[Meeting]:
    """Every three levels that meet in a row."""
    return meetings(row, 3)


def pairs(row: Row) -> set[Meeting]:
    """Every two levels that meet in a row, and every two beside replicas: without them, ZeRO has
    nothing to cut. The kind of model beside replicas only with the ZeRO stage, which cuts it.
    """
    found = meetings(row, 2)
    if row.data == 2:
        others = [level for level in row._asdict().items() if level[0] != "data"]
        found |= {
            (("data", 2), *two)
            for two in itertools.combinations(others, 2)
            if {axis for axis, _ in two} & {"kind", "stage"} != {"kind"}
        }
    return found


def cost(row: Row) -> tuple[int, int, bool]:
    """What orders rows by the time that they take: bf16 is compared with two plain runs."""
    return row.ranks, row.micro_batches, row.precision == "bf16"


def selection(rows: Iterable[Row], met: Callable[[Row], set[Meeting]]) -> list[Row]:
    """Few of the rows, in which everything is met that is met in any of them: the greedy choice of
    pairwise testing.

    The next is the one that meets most of what none has met yet; of equals, the cheapest one.
    """
    missing = {row: met(row) for row in sorted(rows, key=cost)}
    chosen = []
    while missing:
        best = max(missing, key=lambda row: len(missing[row]))
        chosen.append(best)
        covered = missing.pop(best)
        missing = {row: left for row, of_row in missing.items() if (left := of_row - covered)}
    return chosen


def legal_rows(most_ranks: int) -> list[Row]:
    """Those that the planner lets start, on so many ranks or fewer."""
    return [row for row in all_rows() if row.ranks <= most_ranks and is_legal(row)]


def representatives(rows: Iterable[Row]) -> list[Row]:
    """Rows in which all pairs of these are met: of each kind with each targets, one of the two that
    train all weights or adapters, where both are legal. Legality depends on neither.
    """
    return [
        row
        for row in rows
        if not is_legal(row._replace(trained="all"))
        or (AXES.kind.index(row.kind) + AXES.targets.index(row.targets)) % 2
        == AXES.trained.index(row.trained)
    ]


def smallest_selection(rows: list[Row], met: Callable[[Row], set[Meeting]]) -> list[Row]:
    """The smallest of some greedy choices, which differ in the order of equals."""
    shuffled = [random.Random(seed).sample(rows, len(rows)) for seed in range(8)]
    return min((selection(order, met) for order in shuffled), key=len)


if __name__ == "__main__":
    legal = legal_rows(most_ranks=8)
    total, few = len(list(all_rows())), len(selection(legal, triples))
    print(f"    # {len(legal):,} of {total:,} are legal; in {few} of them meet every three levels")
    for row in sorted(smallest_selection(legal_rows(MOST_RANKS), pairs)):
        print(in_words(row))
