"""Validation while training: each chosen window once, the mean over targets, loss by source."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megagpt.config import RunConfig
from megagpt.dataset import SampleStream
from megagpt.model import GPT, IGNORED, initialise_
from megagpt.parallel.validation import FILLER, rows_by_source, source_names
from tests.conftest import _Pools
from tests.support.configurations import Config, tiny, with_zero
from tests.support.jobs.checkpoint import run_config
from tests.support.jobs.evaluation import validation_stream
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    """Two datasets; of the second come three times as many windows."""
    places = [write_dataset(tmp_path_factory.mktemp(name)) for name in ("code", "web")]
    named = [place.rename(place.parent / name) for place, name in zip(places, "ab", strict=True)]
    return [(named[0], 1.0), (named[1], 3.0)]


def open_blend(blend: list[tuple[Path, float]]) -> SampleStream:
    return SampleStream.open(blend, split="val", sequence_length=4, seed=0, document_mask=False)


@pytest.mark.parametrize(("row", "batch_size", "windows"), [(2, 8, 16), (4, 8, 13), (1, 1, 7)])
def test_each_chosen_window_stands_once_in_a_row_of_its_source(
    blend: list[tuple[Path, float]], row: int, batch_size: int, windows: int
) -> None:
    stream = open_blend(blend)
    sources, chosen = rows_by_source(stream, windows, row, batch_size)
    assert sorted(chosen[chosen != FILLER]) == list(range(windows))
    assert len(chosen) % batch_size == 0
    assert len(chosen) - windows < row * 2 + batch_size  # what the order by source costs
    for number, own in enumerate(chosen.reshape(-1, row)):
        of = {stream.source_of(int(window)) for window in own if window != FILLER}
        assert of == ({sources[number]} if number < len(sources) else set())
    assert Counter(map(stream.source_of, range(16))) == {0: 4, 1: 12}


def test_sources_with_one_name_have_their_paths() -> None:
    def named(*paths: str) -> list[str]:
        datasets = [SimpleNamespace(directory=Path(path)) for path in paths]
        return source_names(SimpleNamespace(datasets=datasets))  # type: ignore[arg-type]

    assert named("data/code", "data/web") == ["code", "web"]
    assert named("a/code", "b/code", "web") == ["a/code", "b/code", "web"]
    assert named("data/code", "data/code") == ["code", "code"]


# A global batch of 4 windows: 2 ranks read 2 micro-batches of 1 each, or 4 of 1 window together.
MESHES: dict[str, tuple[int, Config, int]] = {
    "one": (1, {}, 0),
    "data": (2, {}, 1),
    "pipeline": (2, {"pipeline": 2}, 1),
    "tensor": (2, {"tensor": 2}, 3),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_the_mean_is_over_all_targets_on_every_mesh(
    pools: _Pools, blend: list[tuple[Path, float]], mesh: str
) -> None:
    """With masked targets, of which micro-batches have different numbers and some have none; the
    reference is one plain model in fp64. It differs from the mean of the batches' means.
    """
    ranks, parallel, zero = MESHES[mesh]
    config = with_zero(
        tiny(batch=4, micro=1, vocab_size=384, init_std=0.2, sequence_length=8), zero
    )
    config["megagpt"]["parallel"] = parallel
    config["megagpt"]["training"]["eval_batches"] = 3
    found = pools.get(ranks).run(
        "tests.support.jobs.evaluation:validation_losses", config=config, data=blend
    )
    assert all(result == found[0] for result in found)
    by_source, of_batches = plain_losses(config, blend, windows=12, batch=4)
    whole = np.concatenate([*by_source.values()])
    assert found[0].mean == pytest.approx(whole.mean(), abs=1e-5)
    assert found[0].by_source == {
        name: pytest.approx(losses.mean(), abs=1e-5) for name, losses in by_source.items()
    }
    assert abs(np.mean(of_batches) - whole.mean()) > 1e-3


def plain_losses(
    config: Config, blend: list[tuple[Path, float]], windows: int, batch: int
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The loss of each target by source, and the mean of each batch of windows."""
    alone = json.dumps(config | {"megagpt": config["megagpt"] | {"parallel": {}}})
    model = RunConfig.from_json(alone).resolved(world_size=1, vocabulary=None, bf16_native=False)
    plain = initialise_(GPT(model.megagpt.model), seed=0).double()
    stream = validation_stream(blend, config)
    read = stream.batch(range(windows))
    with torch.no_grad():
        logits = plain(torch.from_numpy(read.tokens))[..., : model.megagpt.model.vocabulary]
    targets = torch.from_numpy(read.targets)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").numpy()
    counts = read.targets != IGNORED
    by_source = {}
    for number, name in enumerate(["a", "b"]):
        own = np.array([stream.source_of(window) == number for window in range(windows)])
        by_source[name] = losses[own][counts[own]]
    batches = [slice(start, start + batch) for start in range(0, windows, batch)]
    return by_source, [losses[part][counts[part]].mean() for part in batches]


def test_a_run_records_the_losses_of_its_sets_and_sources(
    one_rank: RankPool, blend: list[tuple[Path, float]], tmp_path: Path
) -> None:
    (first, _), (second, _) = blend
    config = run_config(first, 2, sequence_length=8)
    config["megagpt"]["data"] = {
        "path": [{"path": str(first), "weight": 1}, {"path": str(second), "weight": 3}],
        "validation": {"held-out": str(second)},
    }
    config["megagpt"]["training"] |= {"eval_interval_steps": 2, "eval_batches": 2}
    one_rank.run("tests.support.jobs.checkpoint:train", config=config, directory=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (event,) = (line for line in lines if line.get("event") == "eval")
    keys = {"event", "step", "val_loss", "split_share"}
    assert event.keys() == keys | {"source/a", "source/b", "validation/held-out"}
    losses: dict[str, Any] = {key: event[key] for key in event.keys() - keys} | {
        "val_loss": event["val_loss"]
    }
    assert all(3 < loss < 7 for loss in losses.values()), losses
    between = sorted([event["source/a"], event["source/b"]])
    assert between[0] < event["val_loss"] < between[1]
