"""``launch/parity.py``: what it tries, the file's own first, what it says where everything is
equal, and that it sees what is not.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import ModelConfig, load_config
from megagpt.parity.cases import (
    ParityPlan,
    ParityRequest,
    plan,
    remarks_on_own,
    require_devices,
    require_launched,
)
from megagpt.parity.small_run import LEAST_TILE, OF_THE_KIND, resolved, small_document
from megagpt.parity.strategies import Strategy, meshes, own_strategy, strategies
from megagpt.planning.cost.model_states import parameters, shard_of
from megagpt.planning.layout import Layout
from megagpt.planning.rules import refusals
from megagpt.utils import UserError
from tests import REPOSITORY
from tests.support.configurations import KINDS
from tests.support.monitoring import ENVIRONMENT
from tests.support.ranks import RankPool, free_port

CONFIG = str(REPOSITORY / "ds_configs" / "default.json")
MESH_OF_EIGHT = str(REPOSITORY / "ds_configs" / "gpt3_13b_3d_zero3.json")
MODEL = load_config(CONFIG).megagpt.model


def planned(config: str, ranks: int, *overrides: str, **request: Any) -> ParityPlan:
    return plan(ParityRequest(load_config(config, overrides), config, **request), ranks)


def test_every_mesh_of_four_ranks_is_tried_with_every_stage() -> None:
    tried = list(strategies(4, True, MODEL))
    meshes = {(s.parallel["pipeline"], s.parallel["tensor"]) for s in tried}
    assert meshes == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    for pipeline, tensor in meshes:
        of_mesh = [
            s for s in tried if (s.parallel["pipeline"], s.parallel["tensor"]) == (pipeline, tensor)
        ]
        assert {s.stage for s in of_mesh} == {0, 1, 2, 3}
        assert {s.optimizer for s in of_mesh} == {"none", "cpu", "nvme"}
    assert any(s.parallel.get("sequence") for s in tried)
    for stage in (1, 2, 3):
        schedules = {s.parallel.get("schedule", "1f1b") for s in tried if s.stage == stage}
        assert schedules == {"1f1b", "gpipe", "interleaved"}
    assert {s.stage for s in tried if s.parallel.get("sequence")} == {0, 1, 2, 3}
    for pipeline, tensor in meshes:
        (reduction,) = {"per_step", "per_micro_batch"} - {
            "per_step" if pipeline > 1 else "per_micro_batch"
        }
        own = {"pipeline": pipeline, "tensor": tensor, "gradient_reduction": reduction}
        assert [s.stage for s in tried if s.parallel == own] == [0, 1, 2, 3]
    legal = planned(CONFIG, 4).legal
    per_step = [
        s.stage
        for s, _ in legal
        if s.pipeline == 1 and s.parallel.get("gradient_reduction") == "per_step"
    ]
    assert per_step == [1, 2, 3] * 3
    assert len({str(s) for s in tried}) == len(tried)


def test_the_small_model_is_of_the_kind_of_the_large_one() -> None:
    """Grouped key-value heads stay grouped, for as many tensor ranks; document masks act."""
    grouped = [
        "megagpt.model.num_heads=8",
        "megagpt.model.num_kv_heads=2",
        "megagpt.data.document_mask=true",
    ]
    strategy = Strategy({"tensor": 4, "pipeline": 1}, 3)
    for overrides, heads in (([], 8), (grouped, 16)):
        document = small_document(load_config(CONFIG, overrides), [strategy], 4, 1, "fp32")
        config = resolved(document, strategy, 4, None)
        assert (config.megagpt.model.num_heads, config.megagpt.model.num_kv_heads) == (heads, 8)
        assert config.megagpt.data.document_mask is bool(overrides)
        assert refusals(config) == []


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("ranks", [1, 3, 12, 16, 24, 128])
def test_the_small_model_hosts_every_mesh_of_its_world(ranks: int, activation: str) -> None:
    """Nothing is refused for lack of heads, rows, positions, blocks, or of micro-batches; and it
    stays small.
    """
    file = load_config(
        CONFIG, [f"megagpt.model.activation={activation}", "megagpt.model.bias=false"]
    )
    tried = list(strategies(ranks, False, file.megagpt.model))
    document = small_document(file, tried, ranks, 1, "fp32")
    reasons = {
        rule.key: rule.reason
        for s in tried
        for rule in refusals(resolved(document, s, ranks, None))
    }
    assert reasons.keys() <= {
        "megagpt.parallel.pipeline",
        "megagpt.parallel.gradient_reduction",
        "zero_optimization.offload_optimizer.device",
    }
    assert "DeepSpeed cannot delay the reduction" in reasons.get(
        "megagpt.parallel.pipeline", "DeepSpeed cannot delay the reduction"
    )
    assert resolved(document, tried[0], ranks, None).megagpt.model.num_parameters < 5e6


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_small_model_is_of_the_files_kind(kind: dict[str, Any]) -> None:
    given = [f"megagpt.model.{key}={json.dumps(value)}" for key, value in kind.items()]
    file = load_config(CONFIG, given)
    tried = list(strategies(4, False, file.megagpt.model))
    small = resolved(small_document(file, tried, 4, 1, "fp32"), tried[0], 4, None).megagpt.model
    for key in OF_THE_KIND:
        assert getattr(small, key) == getattr(file.megagpt.model, key), key
    windows = [small.window(layer) for layer in range(small.num_layers)]
    assert any(windows) == (file.megagpt.model.sliding_window is not None)
    assert small.num_parameters < 5e6


def test_a_large_world_is_cut_as_the_files_own_model_can_be() -> None:
    """All of sixteen ranks; of more, what is usual and what the heads and blocks of a GPT-3 of
    175B divide.
    """
    config = str(REPOSITORY / "ds_configs" / "gpt3_175b_3d.json")
    large = load_config(config)
    assert {(16, 1), (1, 16), (2, 8)} <= set(meshes(16, MODEL))
    assert {max(axis) for axis in zip(*meshes(1024, MODEL), strict=True)} == {8}
    pipelines, tensors = map(set, zip(*meshes(1024, large.megagpt.model), strict=True))
    assert (pipelines, tensors) == ({1, 2, 4, 8, 16, 32, 64}, {1, 2, 4, 8, 16, 32})
    tried = list(strategies(1024, False, large.megagpt.model))
    assert len(tried) < 1000
    assert (
        ModelConfig(
            **small_document(large, tried, 1024, 1, "fp32")["megagpt"]["model"]
        ).num_parameters
        < 3e7
    )
    ((own, run),) = planned(config, 256, own_only=True).legal
    assert own.words() == [
        "16",
        "8",
        "1",
        "device",
        "device",
        "schedule=interleaved virtual_stages=2",
    ]
    assert (run.megagpt.model.num_layers, run.megagpt.model.num_heads) == (32, 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_offload_to_nvme_has_enough_to_swap(ranks: int, precision: str) -> None:
    """DeepSpeed keeps tiles and pieces below 1 MiB in host memory, silently.

    In bf16, the ranks that swap are at least those with the table of tokens, which is then most of
    the model.
    """
    config = str(REPOSITORY / "ds_configs" / "gpt3_13b_zero3_offload_nvme.json")
    found = planned(config, ranks, precision=precision, nvme_path="disk")
    assert (found.legal[0][0].parameters == "nvme") is (precision == "bf16")
    for strategy, run in found.legal:
        layout = Layout.of(run)
        shards = [shard_of(layout, rank) for rank in range(strategy.pipeline)]
        if strategy.optimizer == "nvme":
            assert all(
                max(shard.tiles) >= LEAST_TILE
                for shard in (shards if precision == "fp32" else shards[:1])
            )
        if strategy.parameters == "nvme":
            assert parameters(shards[0]).nvme > 0


def test_sizes_of_the_file_become_smaller_with_the_model_and_act_as_they_did() -> None:
    """Buckets of a hundredth of the model stay that; tiles stay as many; norms stay whole, and
    matrices do not.
    """
    overrides = [
        "zero_optimization.reduce_bucket_size=7864",  # of 786,432 in blocks
        "zero_optimization.sub_group_size=131072",  # three of them on each of two ranks
        "zero_optimization.stage3_param_persistence_threshold=1000",
        "zero_optimization.overlap_comm=true",
        "megagpt.training.recompute=full",
    ]
    own, config = planned(CONFIG, 2, *overrides).legal[0]
    zero, model = config.zero_optimization, config.megagpt.model
    blocks = model.num_layers * model.block_matmul_parameters
    assert zero.reduce_bucket_size == pytest.approx(blocks / 100, rel=0.01)
    assert sum(tile >= zero.sub_group_size for tile in shard_of(Layout.of(config), 0).tiles) == 3
    assert model.hidden_size < zero.stage3_param_persistence_threshold < model.hidden_size**2 / 2
    assert zero.overlap_comm is True
    assert config.megagpt.training.recompute == "full"
    assert (
        (own.optimizer, own.parameters)
        == (zero.optimizer_device, zero.parameter_device)
        == ("cpu", "cpu")
    )


def test_tiles_that_the_small_stages_would_not_share_are_left_out_aloud() -> None:
    tiles = ["zero_optimization.sub_group_size=50000000"]
    for config, ranks, cut in ((MESH_OF_EIGHT, 16, True), (CONFIG, 2, False)):
        request = ParityRequest(load_config(config, tiles), config, own_only=True)
        found = plan(request, ranks)
        assert (found.legal[0][1].zero_optimization.sub_group_size is None) == cut
        said = "; ".join(remarks_on_own(request, found))
        assert "sub_group_size" in said
        assert ("without its sub_group_size, which would give" in said) == cut


def test_a_wrong_number_of_ranks_for_the_files_own_mesh_is_said_and_the_rest_goes_on() -> None:
    found = planned(MESH_OF_EIGHT, 4, gpus=0)
    assert (
        "tensor 4 x pipeline 2 does not fit (found 4 ranks, need a multiple of 8 (it states 16))"
        in found.left_out
    )
    assert (
        "to try it: --ranks 16, or with that many slots in the hostfile deepspeed --hostfile hosts"
        in found.left_out
    )
    assert all(strategy.file is None for strategy, _ in found.legal)
    assert len(found.legal) > 80
    own, _ = planned(MESH_OF_EIGHT, 8).legal[0]
    assert own == own_strategy(load_config(MESH_OF_EIGHT))
    with pytest.raises(UserError, match="--ranks 16"):
        planned(MESH_OF_EIGHT, 4, own_only=True)


@pytest.mark.parametrize("stated", [8, 12, 16, 24, 1024, None])
@pytest.mark.parametrize("gpus", [0, 4, 8, 12, 16, None])
def test_what_is_advised_for_the_files_own_mesh_helps(stated: int | None, gpus: int | None) -> None:
    """With the words to type, here where they fit on the GPUs, else by a launcher."""
    file = load_config(MESH_OF_EIGHT, [f"megagpt.parallel.world_size={stated or 'null'}"])
    request = ParityRequest(file, MESH_OF_EIGHT, own_only=True, gpus=gpus)
    with pytest.raises(UserError, match="to try it: ") as error:
        plan(request, 4)
    advice = str(error.value).partition("to try it: ")[2]
    (ranks,) = {int(number) for number in re.findall(r"--ranks (\d+)", advice)}
    assert advice.startswith("--ranks") == (gpus == 0 or ranks <= (gpus or 0))
    assert (
        f"deepspeed --hostfile hosts launch/parity.py --deepspeed_config {MESH_OF_EIGHT} --ranks"
        in advice
    )
    assert plan(request, ranks).legal
    require_launched(request, ranks, [], ranks)


def test_more_ranks_than_gpus_are_refused_with_the_launchers_command() -> None:
    request = ParityRequest(load_config(CONFIG), CONFIG, gpus=2)
    require_devices(request, 2)
    require_devices(replace(request, gpus=0), 4)
    with pytest.raises(UserError) as error:
        require_devices(request, 4)
    said = str(error.value)
    assert said.startswith(
        "--ranks 4: too many (found 2 GPUs, need one per rank); type --ranks 2, or with that many "
        "slots in the"
    )
    assert (
        f"deepspeed --hostfile hosts launch/parity.py --deepspeed_config {CONFIG} --ranks 4" in said
    )


def test_a_launcher_has_to_start_as_many_as_the_file_or_the_user_says() -> None:
    request = ParityRequest(load_config(MESH_OF_EIGHT), "own.json")
    require_launched(request, None, ["RANK"], 16)
    require_launched(request, 8, ["RANK"], 8)
    require_launched(ParityRequest(load_config(CONFIG), CONFIG), None, ["RANK"], 8)
    with pytest.raises(
        UserError, match="world_size: the run expects 16 ranks and 8 started: bring"
    ):
        require_launched(request, None, ["RANK"], 8)
    with pytest.raises(
        UserError,
        match=r"--ranks 4: a launcher has started 1 .*; to .*: unset SLURM_STEP_NUM_TASKS",
    ):
        require_launched(request, 4, ["SLURM_STEP_NUM_TASKS"], 1)


def test_what_is_refused_in_one_precision_only_is_said_with_the_other() -> None:
    on_disk = str(REPOSITORY / "ds_configs" / "gpt3_13b_zero3_offload_nvme.json")
    found = planned(on_disk, 2)
    assert "DeepSpeed swaps parameters to NVMe in bf16 or fp16 only" in found.left_out
    assert found.left_out.endswith("--precision bf16")
    replicated = ["zero_optimization=null"]
    assert planned(CONFIG, 2, *replicated, precision="bf16").left_out.endswith("--precision fp32")


def written(path: Path, of: str = CONFIG, **sections: dict[str, Any]) -> str:
    """A configuration of ``ds_configs`` with other keys in sections of ``megagpt``, or in its
    own for ``zero``.
    """
    document = json.loads(Path(of).read_text())
    del document["$schema"]
    document["zero_optimization"] = sections.pop("zero", document["zero_optimization"])
    for name, keys in sections.items():
        document["megagpt"][name] = document["megagpt"].get(name, {}) | keys
    path.write_text(json.dumps(document))
    return str(path)


def rows(text: str) -> list[str]:
    """The lines of the table that are strategies."""
    return [line for line in text.splitlines() if line[:2] in ("1 ", "2 ") and "%" in line]


def test_the_files_own_strategy_alone_is_really_what_is_trained(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    mesh = {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2}
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = written(
        tmp_path / "own.json", zero=zero, parallel=mesh, training={"recompute": "full"}
    )
    ranks = two_ranks.run(
        "tests.support.jobs.training:run_parity", config=config, steps=1, own_only=True
    )
    for equal, text, (evidence,) in ranks:
        assert equal, text
        assert (evidence["wrapper"], evidence["adam"]) == (
            "DeepSpeedZeroOptimizer",
            "DeepSpeedCPUAdam",
        )
        assert evidence["stage_elements"] < 0.62 * evidence["whole_elements"]
    text = ranks[0][1]
    assert f"as in {config}; with recompute full\n2 " in text
    assert rows(text)[0].split()[:7] == [
        "2",
        "1",
        "2",
        "cpu",
        "device",
        "schedule=interleaved",
        "virtual_stages=2",
    ]
    assert "1 of 1 strategies equal one plain process" in text


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_files_own_offload_to_nvme_swaps(
    nvme: None, two_ranks: RankPool, tmp_path: Path, precision: str
) -> None:
    """Parameters too, where DeepSpeed can: in bf16."""
    zero: dict[str, Any] = {"stage": 3, "sub_group_size": 100_000_000, "overlap_comm": True}
    zero |= {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 5}}
    if precision == "bf16":
        zero["offload_param"] = {
            "device": "nvme",
            "nvme_path": str(tmp_path),
            "buffer_size": 40_000_000,
        }
    config = written(
        tmp_path / "own.json",
        MESH_OF_EIGHT,
        zero=zero,
        parallel={"tensor": 1, "pipeline": 1, "world_size": 2},
    )
    request = {"steps": 2, "own_only": True, "precision": precision}
    for equal, text, (evidence,) in two_ranks.run(
        "tests.support.jobs.training:run_parity", config=config, **request
    ):
        assert equal, text
        files = evidence["swap_files"]
        assert sum(size for _, size in files) >= 3 * 4 * LEAST_TILE, (
            "master weights and two moments of this rank's tile, in fp32"
        )
        assert (
            (evidence["elements_on_nvme"] > 0)
            == any("param" in name for name, _ in files)
            == (precision == "bf16")
        )


@pytest.mark.slow
def test_grouped_heads_and_documents_equal_one_process(two_ranks: RankPool, tmp_path: Path) -> None:
    config = written(
        tmp_path / "grouped.json",
        model={"num_kv_heads": 2, "bias": True},
        data={"document_mask": True},
    )
    few = [
        Strategy({"pipeline": 2, "schedule": "gpipe"}, 2),
        Strategy({"tensor": 2, "sequence": True}, 0),
    ]
    equal, text, _ = two_ranks.run(
        "tests.support.jobs.training:run_parity", config=config, steps=3, few=few
    )[0]
    assert equal, text
    assert "3 of 3 strategies equal" in text


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named() -> None:
    environment = ENVIRONMENT | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MEGAGPT_JOIN_TIMEOUT_S": "2",
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "launch/parity.py"]
    done: Any = subprocess.run(
        words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "rank 1 did not join within 2 s" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_equal_one_process_under_every_strategy(
    two_ranks: RankPool, precision: str
) -> None:
    """In bf16, ZeRO 0 is no strategy."""
    request = {"config": CONFIG, "steps": 2, "precision": precision}
    equal, text, seen = two_ranks.run(
        "tests.support.jobs.training:run_parity", deadline_s=400, **request
    )[0]
    assert equal, text
    found = rows(text)
    strategies = [row.split()[:6] for row in found]
    assert strategies[0][:5] == ["1", "1", "3", "cpu", "cpu"]
    for words in (
        ["1", "1", "3"],
        ["2", "1", "3"],
        ["1", "2", "3"],
        ["2", "1", "1"],
        ["1", "2", "2"],
    ):
        assert any(strategy[:3] == words for strategy in strategies[1:]), words
    assert any("sequence=True" in row for row in found)
    assert all(int(row.split()[-1].rstrip("%")) <= 56 for row in found if row.split()[2] != "0")
    replicated = [row.split()[-1] for row in found if row.split()[:3] == ["1", "1", "0"]]
    assert replicated == (["100%"] if precision == "fp32" else [])
    assert f"{len(found)} of {len(found)} strategies equal one plain process" in text
    assert len(seen) == len(found)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_wrong_sum_is_seen(two_ranks: RankPool, precision: str) -> None:
    """The tensor ranks keep their partial sums to themselves: only the strategy that makes such
    sums differs.
    """
    few = [
        Strategy({"pipeline": 2}, 3),
        *(Strategy({"tensor": 2, "sequence": cut}, 3) for cut in (False, True)),
    ]
    request = {"config": CONFIG, "steps": 1, "few": few, "precision": precision}
    equal, text, seen = two_ranks.run(
        "tests.support.jobs.training:run_parity", sabotage=True, **request
    )[0]
    assert not equal
    assert [row.endswith("DIFFERS") for row in rows(text)] == [False, False, True, False]
    assert "3 of 4 strategies equal one plain process" in text
    assert {evidence["parameter_type"] for evidence in seen} == {
        f"torch.{'float32' if precision == 'fp32' else 'bfloat16'}"
    }
    assert [evidence["parameters_offloaded"] for evidence in seen] == [
        True,
        False,
        False,
        False,
    ]  # the file's own


@pytest.mark.slow
@pytest.mark.parametrize(("tolerance", "code"), [("1e-4", 0), ("0", 1)])
def test_the_command(compiled_ops: None, tolerance: str, code: int) -> None:
    """Sums in another order differ in their last bits: without tolerance, that is a difference."""
    words = [
        sys.executable,
        "launch/parity.py",
        "--ranks",
        "2",
        "--steps",
        "1",
        "--tolerance",
        tolerance,
    ]
    done: Any = subprocess.run(
        words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == code, done.stderr
    assert "strategies equal one plain process" in done.stdout
    assert ("DIFFERS" in done.stdout) == (code == 1)
    assert done.stderr == ""


@pytest.mark.slow
def test_the_command_compares_on_the_ranks_of_torchrun(compiled_ops: None) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
    ]
    words = [*torchrun, str(free_port()), "launch/parity.py", "--own_only", "--steps", "1"]
    done: Any = subprocess.run(
        words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "1 strategy on 2 ranks (cpu)" in done.stdout
    (row,) = rows(done.stdout)
    assert row.split()[:5] == ["1", "1", "3", "cpu", "cpu"]
    assert "1 of 1 strategies equal one plain process" in done.stdout


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["--own_only", "--deepspeed_config", MESH_OF_EIGHT], {}, "need a multiple of 8"),
        (
            [],
            {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "6000",
            },
            "unset RANK WORLD_SIZE LOCAL_RANK",
        ),
        (
            [],
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
            "start all with srun python launch/parity.py, or only this one",
        ),
    ],
    ids=["too few", "a launcher's", "salloc"],
)
def test_the_command_refuses_at_once_what_these_ranks_cannot_host(
    words: list[str], variables: dict[str, str], said: str
) -> None:
    command = [sys.executable, "launch/parity.py", "--ranks", "4", *words]
    done: Any = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
