"""``launch/parity.py``: what it tries, what it says where everything is equal, and that it sees what is not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagpt import parity
from megagpt.config import load_config
from megagpt.parity import Strategy
from megagpt.planner import refusals
from tests.monitoring import ENVIRONMENT, REPOSITORY
from tests.ranks import RankPool, free_port

CONFIG = str(REPOSITORY / "ds_configs" / "default.json")


def test_every_mesh_of_four_ranks_is_tried_with_every_stage() -> None:
    tried = list(parity.strategies(4, nvme=True))
    meshes = {(s.parallel["pipeline"], s.parallel["tensor"]) for s in tried}
    assert meshes == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    for pipeline, tensor in meshes:
        of_mesh = [s for s in tried if (s.parallel["pipeline"], s.parallel["tensor"]) == (pipeline, tensor)]
        assert {s.stage for s in of_mesh} == {0, 1, 2, 3}
        assert {s.optimizer for s in of_mesh} == {"none", "cpu", "nvme"}
    assert any(s.parallel.get("sequence") for s in tried)
    for stage in (1, 2, 3):
        schedules = {s.parallel.get("schedule", "1f1b") for s in tried if s.stage == stage}
        assert schedules == {"1f1b", "gpipe", "interleaved"}
    assert {s.stage for s in tried if s.parallel.get("sequence")} == {0, 1, 2, 3}
    assert len({str(s) for s in tried}) == len(tried)


def test_the_small_model_is_of_the_kind_of_the_large_one() -> None:
    """Grouped key-value heads stay grouped, for as many tensor ranks; document masks act."""
    grouped = ["megagpt.model.num_heads=8", "megagpt.model.num_kv_heads=2", "megagpt.data.document_mask=true"]
    for overrides, heads in (([], 8), (grouped, 16)):
        document = parity.small(load_config(CONFIG, overrides), world_size=4, steps=1)
        strategy = Strategy({"tensor": 4, "pipeline": 1}, 3)
        resolved = parity.resolved(document, strategy, 4, None)
        assert (resolved.megagpt.model.num_heads, resolved.megagpt.model.num_kv_heads) == (heads, 8)
        assert resolved.megagpt.data.document_mask is bool(overrides)
        assert refusals(resolved) == []


@pytest.mark.slow
def test_grouped_heads_and_documents_equal_one_process(two_ranks: RankPool, tmp_path: Path) -> None:
    document = json.loads(Path(CONFIG).read_text())
    document["megagpt"]["model"] |= {"num_kv_heads": 2, "bias": True}
    document["megagpt"]["data"] = {"document_mask": True}
    del document["$schema"]
    (tmp_path / "grouped.json").write_text(json.dumps(document))
    few = [Strategy({"pipeline": 2, "schedule": "gpipe"}, 2), Strategy({"tensor": 2, "sequence": True}, 0)]
    (equal, text), *_ = two_ranks.run("tests.jobs:run_parity", config=str(tmp_path / "grouped.json"), steps=3, few=few)
    assert equal, text
    assert "2 of 2 strategies equal" in text


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named() -> None:
    environment = ENVIRONMENT | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MEGAGPT_JOIN_TIMEOUT_S": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "launch/parity.py"]
    done: Any = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "rank 1 did not join within 2 s" in done.stderr


@pytest.mark.slow
def test_two_ranks_equal_one_process_under_every_strategy(two_ranks: RankPool) -> None:
    equal, text = two_ranks.run("tests.jobs:run_parity", config=CONFIG, steps=2)[0]
    assert equal, text
    rows = [line for line in text.splitlines() if line[:2] in ("1 ", "2 ") and "%" in line]
    strategies = [row.split()[:6] for row in rows]
    for words in (["1", "1", "3"], ["2", "1", "3"], ["1", "2", "3"], ["2", "1", "1"], ["1", "2", "0"]):
        assert any(strategy[:3] == words for strategy in strategies), words
    assert any("sequence=True" in row for row in rows)
    assert all(int(row.split()[-1].rstrip("%")) <= 56 for row in rows if row.split()[2] != "0")
    assert [row.split()[-1] for row in rows if row.split()[:3] == ["1", "1", "0"]] == ["100%"]
    assert f"{len(rows)} of {len(rows)} strategies equal one plain process" in text


def test_a_wrong_sum_is_seen(two_ranks: RankPool) -> None:
    """The tensor ranks keep their partial sums to themselves: only the strategy that makes such sums differs."""
    few = [Strategy({"pipeline": 2}, 3), *(Strategy({"tensor": 2, "sequence": cut}, 3) for cut in (False, True))]
    equal, text = two_ranks.run("tests.jobs:run_parity", config=CONFIG, steps=1, few=few, sabotage=True)[0]
    assert not equal
    rows = [line.split() for line in text.splitlines() if line[:2] in ("1 ", "2 ") and "%" in line]
    assert [row[-1] == "DIFFERS" for row in rows] == [False, True, False]
    assert "2 of 3 strategies equal one plain process" in text


@pytest.mark.slow
@pytest.mark.parametrize(("tolerance", "code"), [("1e-4", 0), ("0", 1)])
def test_the_command(compiled_ops: None, tolerance: str, code: int) -> None:
    """Sums in another order differ in their last bits: without tolerance, that is a difference."""
    words = [sys.executable, "launch/parity.py", "--ranks", "2", "--steps", "1", "--tolerance", tolerance]
    done: Any = subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr
    assert "strategies equal one plain process" in done.stdout
    assert ("DIFFERS" in done.stdout) == (code == 1)
    assert done.stderr == ""
