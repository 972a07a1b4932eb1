"""The equality matrix: its axes, which of its combinations are legal, and a pairwise selection of them.

``python -m tests.matrix`` prints the selection that ``tests/test_matrix.py`` trains in ``make test``.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.config import ConfigError, RunConfig
from megagpt.planner import refusals
from tests.configurations import Config, tiny, with_zero

STEPS = 3
SAMPLES, LENGTH, WIDTH = 2, 16, 32  # of a micro-batch, of a sample, of the residual stream
TOKENS, ROWS = 120, 128  # of the vocabulary, of the embedding: eight are padding
SWAPPED_BYTES = 4096  # of the smallest tensor that goes to the disk; DeepSpeed's own limit is 1 MiB


class Row(NamedTuple):
    """One combination. ``tied``: a model like GPT-2 with dropout, else one like Llama with grouped heads."""

    stage: int
    optimizer: str
    parameters: str
    pipeline: str
    tensor: str
    data: int
    reduction: str
    tied: bool
    micro_batches: int
    precision: str

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
            f"ZeRO {self.stage} {self.optimizer}/{self.parameters}, {self.pipeline} x {self.tensor} x {self.data}, "
            f"{self.reduction}, {'tied' if self.tied else 'untied'}, {self.micro_batches}, {self.precision}"
        )


AXES = Row(
    stage=(0, 1, 2, 3),
    optimizer=("none", "cpu", "nvme"),
    parameters=("none", "cpu", "nvme"),
    pipeline=("none", "1f1b", "gpipe", "interleaved"),  # of two ranks, interleaved: of two stages on each
    tensor=("none", "layers", "sequence"),  # of two ranks, sequence: the norms are shared, too
    data=(1, 2),
    reduction=("per_step", "per_micro_batch"),
    tied=(True, False),
    micro_batches=(1, 2, 6),  # of a rank and step: fewer than stages, as many, more
    precision=("fp32", "bf16"),
)

LIKE_GPT2 = {"dropout": 0.1}
LIKE_LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "position": "rotary", "num_kv_heads": 2}


def document(row: Row, swap_directory: Path = Path("swap")) -> Config:
    """The run of a row, as a file would describe it. Blocks do not divide evenly among stages."""
    shape = {"vocabulary": TOKENS, "num_layers": 5 if row.pipeline == "interleaved" else 3, "tie_embeddings": row.tied}
    batch = SAMPLES * row.micro_batches * row.data
    if row.parameters == "nvme":
        shape["hidden_size"] = 2 * WIDTH  # so that a quarter of a matrix in bf16 is swapped
    config = tiny(batch=batch, micro=SAMPLES, steps=STEPS, **shape, **(LIKE_GPT2 if row.tied else LIKE_LLAMA))
    config = with_zero(config, row.stage, row.optimizer, row.parameters)
    config["bf16"] = {"enabled": row.precision == "bf16"}
    parallel: dict[str, Any] = {"pipeline": row.stages, "tensor": row.shards, "gradient_reduction": row.reduction}
    if row.pipeline != "none":
        parallel |= {"schedule": row.pipeline, "virtual_stages": 2 if row.pipeline == "interleaved" else 1}
    config["megagpt"]["parallel"] = parallel | {"sequence": row.tensor == "sequence"}
    zero = config["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            zero[section]["nvme_path"] = str(swap_directory)
            config["aio"] = {"block_size": SWAPPED_BYTES}
            if section == "offload_param":
                zero[section] |= {"max_in_cpu": 0, "buffer_size": 200_000}
    return config


@cache
def is_legal(row: Row) -> bool:
    """Whether the planner lets it start."""
    written = RunConfig.from_json(json.dumps(document(row)))
    try:
        config = written.resolved(world_size=row.ranks, vocabulary=None, bf16_native=True)
    except ConfigError:
        return False
    return not refusals(config)


def all_rows() -> Iterator[Row]:
    """Every combination, legal or not."""
    return (Row(*levels) for levels in itertools.product(*AXES))


MOST_RANKS = 4  # of a row of the selection; with both axes of the model that leaves no replicas

Pair = tuple[int, Any, int, Any, bool]  # an axis and its level, another and its level, both with replicas or not


def pairs(row: Row) -> set[Pair]:
    """Every two levels that meet in a row, and meet with replicas: without them, ZeRO has nothing to cut."""
    axes = itertools.combinations(range(len(row)), 2)
    return {(a, row[a], b, row[b], replicas) for a, b in axes for replicas in {False, row.data > 1}}


def selection(rows: Iterable[Row]) -> list[Row]:
    """Few rows in which every pair meets that does in any of so few ranks: the greedy choice of pairwise testing.

    The next is the one with most pairs that none has yet, and of these the one of fewest ranks.
    """
    few = sorted((row for row in rows if row.ranks <= MOST_RANKS), key=lambda row: row.ranks)
    missing = {row: pairs(row) for row in few}
    chosen = []
    while missing:
        best = max(missing, key=lambda row: len(missing[row]))
        chosen.append(best)
        covered = missing.pop(best)
        missing = {row: left for row, of_row in missing.items() if (left := of_row - covered)}
    return chosen


if __name__ == "__main__":
    for row in sorted(selection(filter(is_legal, all_rows()))):
        print(f"    Row{tuple(row)},")
