"""What saving and loading cost a rank: bytes that it reads, memory that it takes; never the
whole model.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import _Pools
from tests.support.jobs.checkpoint import run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "tie_embeddings": False,
}
WRITER = ((3, "none", "none"), 4, {"pipeline": 2, "tensor": 2})
Execution = tuple[tuple[int, str, str], int, dict[str, Any]]
# Which state each mesh holds twice: nothing, what tensor parallelism replicates (norms, some
# biases), or everything.
READERS: dict[str, tuple[Execution, str]] = {
    "one process": (((0, "none", "none"), 1, {}), "nothing"),
    "data 2, ZeRO 1": (((1, "none", "none"), 2, {}), "nothing"),
    "data 2, ZeRO 3": (((3, "none", "none"), 2, {}), "nothing"),
    "pipeline 2, ZeRO 3": (((3, "none", "none"), 2, {"pipeline": 2}), "nothing"),
    "tensor 2, ZeRO 3": (((3, "none", "none"), 2, {"tensor": 2}), "norms"),
    "tensor 2 x data 2, ZeRO 1": (((1, "none", "none"), 4, {"tensor": 2}), "norms"),
    "pipeline 2 x tensor 2, ZeRO 3": (WRITER, "norms"),
    "data 2, ZeRO 0": (((0, "none", "none"), 2, {}), "everything"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def config_of(data: Path, execution: Execution) -> dict[str, Any]:
    zero, _, parallel = execution
    config = run_config(data, 1, zero, **SHAPE)
    config["megagpt"]["parallel"] = parallel
    return config


@pytest.fixture(scope="module")
def written(pools: _Pools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by pipeline 2 x tensor 2 under ZeRO 3."""
    directory = tmp_path_factory.mktemp("runs") / "written"
    pools.get(4).run(
        "tests.support.jobs.checkpoint:train", config=config_of(data, WRITER), directory=directory
    )
    return directory


@pytest.mark.rotate(3)
@pytest.mark.parametrize("reader", READERS)
def test_each_rank_reads_what_it_holds_and_no_more(
    pools: _Pools, data: Path, written: Path, reader: str
) -> None:
    execution, replicated = READERS[reader]
    job = {"config": config_of(data, execution), "directory": written}
    ranks = pools.get(execution[1]).run("tests.support.jobs.saving:resume_again", **job)
    (whole,) = {rank["whole"] for rank in ranks}
    for rank in ranks:
        assert rank["read"] == pytest.approx(rank["held"], rel=0.02)
    everything = sum(rank["read"] for rank in ranks)
    if replicated == "everything":
        assert everything == len(ranks) * whole
    else:
        assert whole <= everything <= whole * (1.02 if replicated == "nothing" else 1.05)


def test_ranks_share_the_hashing_of_what_one_wrote(
    pools: _Pools, data: Path, tmp_path: Path
) -> None:
    alone, two = (
        config_of(data, READERS[reader][0]) for reader in ("one process", "data 2, ZeRO 1")
    )
    small_files = "tests.support.jobs.saving:train_into_small_files"
    pools.get(1).run(small_files, config=alone, directory=tmp_path, file_bytes=2**17)
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*.safetensors")]
    hashed = pools.get(2).run(
        "tests.support.jobs.saving:hashed_by_resume", config=two, directory=tmp_path
    )
    assert sum(hashed) == sum(sizes)
    assert max(hashed) - min(hashed) <= 2 * max(sizes)
    assert max(sizes) < sum(sizes) / 8


@pytest.mark.rotate(2)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_rank_ever_holds_the_whole_model(
    two_ranks: RankPool, data: Path, tmp_path: Path, asynchronous: bool
) -> None:
    """A state of 160 MB on two ranks.

    Saved at once or loaded, it is copied nowhere; in the background, once.
    """
    config = run_config(
        data, 1, (3, "none", "none"), save_every=0, hidden_size=512, num_layers=4, num_heads=8
    )
    config["megagpt"]["checkpoint"]["asynchronous"] = asynchronous
    for rank in two_ranks.run(
        "tests.support.jobs.saving:memory_of_saving", config=config, directory=tmp_path
    ):
        assert rank["whole"] > 150e6
        assert rank["share"] == pytest.approx(rank["whole"] / 2, rel=0.05)
        assert rank["copied"] == pytest.approx(rank["share"] if asynchronous else 0, rel=0.02)
        assert rank["saving"] < rank["copied"] + 0.2 * rank["share"]
        assert rank["loading"] < 0.2 * rank["share"]
