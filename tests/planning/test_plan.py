"""The planner: no torch, the right verdict, alternatives that can be pasted, numbers that agree
with published ones.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megagpt.cluster.hosts import Host
from megagpt.config import ConfigError, load_config
from megagpt.planning.cost.accelerators import ACCELERATORS, find
from megagpt.planning.cost.memory import rank_memory
from megagpt.planning.cost.model_states import Bytes, model_states, tile_counts
from megagpt.planning.cost.performance import estimate
from megagpt.planning.layout import Layout
from megagpt.planning.legality import World, problems
from megagpt.planning.parameters import parameters_of_rank
from megagpt.planning.placement import hosts_of
from megagpt.planning.plan import Limits, Plan, as_json, assume, make_plan
from megagpt.planning.price import Budget
from megagpt.planning.report import text
from megagpt.planning.rules import refusals
from megagpt.schema.model import PRESETS
from megagpt.utils import GIB, human_count
from tests import REPOSITORY

CONFIGS = REPOSITORY / "ds_configs"
H100, A100 = ACCELERATORS["H100"], ACCELERATORS["A100"]
ROOMY = Limits(80)
WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["launch/plan.py", *sys.argv[1:]]
try:
    runpy.run_path("launch/plan.py", run_name="__main__")
finally:
    assert not {"torch", "deepspeed", "numpy"} & set(sys.modules)
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def planned(name: str, ranks: int, *overrides: str, limits: Limits = ROOMY, slots: int = 8) -> Plan:
    path = str(CONFIGS / f"{name}.json")
    return make_plan(
        path, overrides, hosts_of(ranks, slots), limits, assume(H100, min(ranks, slots))
    )


def test_a_configuration_that_fits() -> None:
    done = command("--deepspeed_config", "ds_configs/gpt2_124m.json", "--ranks", "8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "legal; it fits" in done.stdout
    assert "an estimate, not a measurement" in done.stdout
    assert f"efficiency {H100.efficiency}" in done.stdout


def test_a_reader_may_leave_early() -> None:
    command_line = (
        f"{sys.executable} launch/plan.py --deepspeed_config "
        f"ds_configs/gpt3_175b_3d.json --json | head -1; "
    )
    shell = ["bash", "-c", command_line + "exit ${PIPESTATUS[0]}"]
    done = subprocess.run(
        shell, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_json_for_machines() -> None:
    done = command(
        "--deepspeed_config", "ds_configs/gpt2_1.5b_zero3.json", "--ranks", "16", "--json"
    )
    plan = json.loads(done.stdout)
    assert (plan["legal"], plan["fits"], done.returncode) == (True, True, 0)
    assert plan["places"][9] == {
        "rank": 9,
        "host": "host-2",
        "slot": 1,
        "pipeline": 0,
        "data": 9,
        "tensor": 0,
    }
    assert sum(plan["memory"][0]["bytes"]["parameters"].values()) == pytest.approx(
        2 * 1.5576e9 / 16, rel=1e-3
    )


def test_what_does_not_fit_is_answered_with_what_does(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-1 slots=4\nworker-2 slots=4\n")
    given = [
        "--deepspeed_config",
        "ds_configs/gpt3_6.7b_zero3_offload_cpu.json",
        "--hostfile",
        str(hosts),
    ]
    tight = [*given, "--device", "l4", "--set", "train_micro_batch_size_per_gpu=16"]
    done = command(*tight)
    assert done.returncode == 2
    assert "IT DOES NOT FIT" in done.stdout
    offers = [
        line.strip() for line in done.stdout.splitlines() if line.strip().startswith("--set ")
    ]
    assert 1 <= len(offers) <= 3
    for offer in offers:
        again = command(*tight, *shlex.split(offer)[1:])
        assert (again.returncode, "legal; it fits" in again.stdout) == (0, True), (
            again.stdout + again.stderr
        )


def test_host_memory_counts_too() -> None:
    plan = planned("gpt3_6.7b_zero3_offload_cpu", 8, limits=Limits(24, host_gib=64))
    assert (plan.fits_device, plan.fits_host) == (True, False)
    pageable = planned(
        "gpt3_6.7b_zero3_offload_cpu", 8, "zero_optimization.offload_optimizer.pin_memory=false"
    )
    assert pageable.host_gib == pytest.approx(18 * 6.66e9 / GIB, rel=0.01)  # docs/configuration.md
    assert plan.host_gib == pytest.approx(123, rel=0.01)  # page-locked in powers of two
    on_cpu = replace(Limits(24), shared=True)
    assert planned("gpt3_6.7b_zero3_offload_cpu", 8, limits=on_cpu).memory[0].locking == Bytes()
    assert all(
        sum(m.peak.host for m in memory_of(plan, other)) <= 64 * GIB / 8
        for other in plan.alternatives
    )


def test_on_a_cpu_all_memory_is_the_host_s() -> None:
    name = "gpt2_1.5b_zero3"
    shared = Limits(64, 1024, shared=True)
    plan = planned(name, 8, limits=shared)
    total = sum(8 * (rank.peak.device + rank.peak.host) for rank in plan.memory) / GIB
    assert plan.host_gib == pytest.approx(total)
    assert text(plan).partition("\n")[0].endswith(f"it fits: {total:.1f} of 1024 GiB a host")
    assert not planned(name, 8, limits=replace(shared, host_gib=total - 1)).good


def test_a_price_without_tokens_is_that_of_the_file_s_own_length() -> None:
    done = command("--deepspeed_config", "ds_configs/gpt2_124m.json", "--ranks", "8", "--cost", "2")
    config = load_config(CONFIGS / "gpt2_124m.json")
    steps, batch = config.megagpt.training.total_steps, config.train_batch_size
    assert steps
    assert batch
    tokens = human_count(steps * batch * config.megagpt.model.sequence_length)
    assert f"{tokens} tokens take " in done.stdout
    assert "at 2 per device and hour on 8 devices" in done.stdout
    assert "give --tokens" in Budget(None, 2).line(None, 8)


def memory_of(plan: Plan, other: Any) -> list[Any]:
    changed = planned("gpt3_6.7b_zero3_offload_cpu", 8, *other.items, limits=plan.limits)
    return changed.memory


def test_refusals_come_with_the_plan() -> None:
    plan = planned(
        "gpt2_124m", 8, "zero_optimization.stage=2", "zero_optimization.offload_param.device=cpu"
    )
    assert not plan.good
    assert [line.split(":")[0] for line in plan.refusals] == [
        "zero_optimization.offload_param.device"
    ]
    assert plan.refusals[0] in text(plan)
    assert "nearest legal: --set zero_optimization.offload_param=null" in text(plan)
    assert plan.alternatives


def test_a_plan_needs_no_optimizer_and_no_batch(tmp_path: Path) -> None:
    """It says what it assumes, and what to type before training."""
    document = {
        "zero_optimization": {"stage": 2, "round_robin_gradients": True},
        "bf16": {"enabled": "auto"},
        "megagpt": {"model": {"preset": "gpt2"}, "training": {"total_steps": 10}},
    }
    path = tmp_path / "bare.json"
    path.write_text(json.dumps(document))
    plan = make_plan(str(path), [], hosts_of(8, 8), ROOMY, assume(H100, 8))
    assert (plan.good, plan.layout.micro_batch, plan.layout.micro_batches) == (True, 1, 1)
    keys = [line.split(":")[0] for line in plan.notes]
    assert keys == [
        "zero_optimization.round_robin_gradients",
        "optimizer",
        "train_batch_size",
        "gradient_clipping",
        "bf16.enabled",
    ]
    assert all(line in text(plan) for line in plan.notes)
    assert as_json(plan)["notes"] == plan.notes
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    asked = [item for line in caught.value.errors for item in line.split(" --set ")[1].split()]
    assert load_config(path, asked).train_micro_batch_size_per_gpu == 8
    document["megagpt"]["model"] = {"num_layers": 1, "hidden_size": 64, "num_heads": 1}
    document["megagpt"]["data"] = {"path": str(tmp_path / "none")}
    path.write_text(json.dumps(document))
    bare = make_plan(str(path), [], hosts_of(8, 8), ROOMY, assume(H100, 8))
    assert bare.good
    assert bare.config.megagpt.model.vocabulary == 50257
    assert any("the data are not prepared; planned with" in line for line in bare.notes)
    old = make_plan(str(path), [], hosts_of(8, 8), ROOMY, assume(H100, 8), bf16_native=False)
    assert (plan.config.bf16.enabled, old.config.bf16.enabled) == (True, False)


@pytest.mark.parametrize(
    "rate",
    [{}, {"params": {"lr": "auto"}}, {"params": {"lr": "auto"}, "type": "AdamW"}, {"type": "Adam"}],
)
def test_a_plan_needs_no_learning_rate(tmp_path: Path, rate: dict[str, Any]) -> None:
    document = {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW", **rate},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01}},
        "megagpt": {"model": {"preset": "gpt2"}, "training": {"total_steps": 10}},
    }
    (tmp_path / "x.json").write_text(json.dumps(document))
    config = load_config(tmp_path / "x.json", for_plan=True)
    assert config.optimizer.params.lr == 0.01
    assert any(line.startswith("optimizer.params.lr: not given") for line in config.notes)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *(
            ("rtx4090", "RTX 4090"),
            ("NVIDIA GeForce RTX 4090", "RTX 4090"),
            ("RTX-3090", "RTX 3090"),
        ),
        *(("V100", "V100"), ("Tesla V100-SXM2-16GB", "V100 16GB"), ("Tesla T4", "T4")),
        *(("A6000", "A6000"), ("NVIDIA RTX A6000", "A6000"), ("l40s", "L40S"), ("l40", "L40")),
        *(("NVIDIA H200", "H200"), ("nvidia_h200", "H200"), ("AMD Instinct MI300X", "MI300X")),
        *(("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100 80GB PCIe", "A100 PCIe")),
        *(("NVIDIA B200", "B200"), ("NVIDIA B300 SXM6 AC", "B300"), ("NVIDIA GB200", "GB200")),
        *(("NVIDIA GB300", "GB300"), ("NVIDIA GeForce RTX 5090", "RTX 5090"), ("4090", "RTX 4090")),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Server"),
        *(("6000 Pro", "RTX PRO 6000"), ("NVIDIA L40S", "L40S"), ("cpu", "CPU")),
    ],
)
def test_a_device_may_be_named_as_people_do(name: str, known: str) -> None:
    assert find(name) is ACCELERATORS[known]


def test_an_unknown_device_says_which_are_known_and_how_to_give_figures() -> None:
    done = command("--ranks", "8", "--device", "gtx1080")
    assert done.returncode == 2
    assert "'gtx1080' is not known (GB300, GB200" in done.stderr
    assert "--peak_tflops X --device_memory_gib X" in done.stderr


def test_a_world_that_no_mesh_divides() -> None:
    given = ["--deepspeed_config", "ds_configs/gpt2_124m.json", "--ranks", "7"]
    done = command(*given, "--set", "megagpt.parallel.pipeline=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "use 6 or 8 ranks" in done.stderr


def test_it_asks_for_the_ranks() -> None:
    done = command("--deepspeed_config", "ds_configs/gpt2_124m.json")
    assert done.returncode == 2
    assert "--ranks 8" in done.stderr


def test_a_tensor_group_across_hosts_is_warned_of() -> None:
    smaller = ["megagpt.parallel.world_size=12", "megagpt.parallel.pipeline=1"]
    smaller += ["train_batch_size=1020", "train_micro_batch_size_per_gpu=1"]
    path, hosts = str(CONFIGS / "gpt3_13b_3d_zero3.json"), [Host("a", 6), Host("b", 6)]
    apart = make_plan(path, smaller, hosts, ROOMY, assume(H100, 6))
    (group,) = apart.placement.split_tensor_groups()
    assert [(place.rank, place.host) for place in group] == [(4, "a"), (5, "a"), (6, "b"), (7, "b")]
    assert "ranks 4-7 on a and b" in text(apart)
    assert "cross hosts" not in text(planned("gpt3_13b_3d_zero3", 16))


@pytest.mark.parametrize(
    ("name", "ranks", "mesh"),
    [("gpt3_13b_3d_zero3", 16, (2, 2, 4)), ("gpt3_175b_3d", 1024, (16, 8, 8))],
)
def test_the_shipped_meshes_are_legal_and_fit_at_their_size(
    name: str, ranks: int, mesh: tuple[int, int, int]
) -> None:
    plan = planned(name, ranks)
    assert (plan.layout.pipeline, plan.layout.data, plan.layout.tensor) == mesh
    assert plan.good
    assert not plan.placement.split_tensor_groups()
    assert 0 < plan.estimate.mfu < 0.5
    assert f"{ranks - 1}" in text(plan)


def layout_of(name: str, ranks: int, *overrides: str) -> Layout:
    config = load_config(CONFIGS / f"{name}.json", overrides)
    resolved = config.resolved(world_size=ranks, vocabulary=None, bf16_native=True)
    assert refusals(resolved) == []
    return Layout.of(resolved)


def test_model_states_take_the_published_16_bytes() -> None:
    """Rajbhandari et al. 2020, section 3.1 and figure 1: 2 + 2 + 12 bytes a parameter; over D
    ranks 4 + 12 / D at stage 1, 2 + 14 / D at stage 2, 16 / D at stage 3.
    """
    one = layout_of("gpt2_1.5b_zero3", 8, "data_types.grad_accum_dtype=null")
    count = one.model.num_parameters
    published = {1: 4 + 12 / 8, 2: 2 + 14 / 8, 3: 16 / 8}
    for stage, bytes_each in published.items():
        states = model_states(one.with_zero(stage=stage, stage3_param_persistence_threshold=0), 0)
        lines = (
            states.parameters,
            states.accumulating_gradients,
            states.master_weights,
            states.moments,
        )
        # ZeRO 2 keeps whole what lies on the border of two partitions, here a part of the
        # embedding.
        assert sum(line.device for line in lines) / count == pytest.approx(bytes_each, rel=0.03)


@pytest.mark.parametrize(("name", "ranks"), [("gpt3_13b_3d_zero3", 16), ("gpt3_175b_3d", 1024)])
def test_shards_add_up_to_gpt_3(name: str, ranks: int) -> None:
    layout = layout_of(name, ranks)
    model = layout.model
    whole = (
        sum(p.numel for rank in range(layout.pipeline) for p in parameters_of_rank(layout, rank))
        * layout.tensor
    )
    copies = model.vocab_size * model.hidden_size  # of the tied embedding, on the last stage
    assert whole - copies == pytest.approx(
        model.num_parameters, rel=3e-3
    )  # positions and norms are whole


def test_a_step_of_gpt_3_takes_about_as_long_as_megatron_s() -> None:
    """README of NVIDIA/Megatron-LM: batch 1536 on 1024 A100, tensor 8 x pipeline 16, full
    recomputation, about 32 seconds a step. The rates are the planner's defaults.
    """
    interleaved = layout_of("gpt3_175b_3d", 1024, "megagpt.training.recompute=full")
    layout = interleaved.with_parallel(schedule="1f1b", virtual_stages=1)
    assert estimate(layout, assume(A100, 8)).step_s == pytest.approx(32, rel=0.15)


def test_more_of_a_resource_never_costs_more() -> None:
    """Monotone where it must be: memory falls with ranks, recomputation and ZeRO's stage, time
    with the rates.
    """
    layout = layout_of("gpt3_13b_3d_zero3", 16)

    def peak(of: Layout) -> float:
        return rank_memory(of, 0).peak.device

    recomputed = [peak(replace(layout, recompute=kind)) for kind in ("none", "selective", "full")]
    assert recomputed == sorted(recomputed, reverse=True)
    stages = [peak(layout.with_zero(stage=stage)) for stage in (1, 2, 3)]
    assert stages[0] >= stages[1] >= stages[2] - 3 * GIB, "ZeRO 3 gathers what it does not hold"
    slow, fast = (
        estimate(layout, assume(H100, 8, network_gb_per_s=rate)).step_s for rate in (1.0, 40.0)
    )
    assert fast < slow
    coarse = estimate(layout, assume(H100, 8), simulated=False)
    assert coarse.step_s == pytest.approx(estimate(layout, assume(H100, 8)).step_s, rel=0.05)


def test_stages_cut_into_different_tiles_are_refused_with_a_size_that_is_legal() -> None:
    """ZeRO 3's optimizer would wait for ever; what is printed as the remedy is planned without a
    refusal.
    """
    changes = [
        "megagpt.model.vocab_size=4096",
        "megagpt.parallel.pipeline=2",
        "train_micro_batch_size_per_gpu=4",
    ]

    world = World(2, vocabulary=None, bf16_native=False)

    def refused(*more: str) -> list[str]:
        return problems(load_config(CONFIGS / "default.json", [*changes, *more]), world)

    (line,) = refused("zero_optimization.sub_group_size=100000")
    cut = load_config(
        CONFIGS / "default.json", [*changes, "zero_optimization.sub_group_size=100000"]
    )
    assert tile_counts(Layout.of(world.resolve(cut))) == [
        7,
        3,
    ]  # as many as DeepSpeed was seen to make
    assert refused(line.rpartition("--set ")[2]) == []
    assert refused() == []


@pytest.mark.parametrize(
    "rate", ["link_gb_per_s", "network_gb_per_s", "peak_tflops", "device_memory_gib"]
)
def test_a_rate_of_nothing_is_refused(rate: str) -> None:
    done = command("--ranks", "2", f"--{rate}", "0")
    assert done.returncode == 2
    assert "0 is not above 0" in done.stderr


def test_a_pipeline_longer_than_the_model_is_refused_in_a_line() -> None:
    changes = ["megagpt.model.vocab_size=4096", "megagpt.parallel.pipeline=8"]
    done = command("--ranks", "8", "--set", *changes)
    assert done.returncode == 2
    assert "8 is refused: a stage would have no block" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_planned_on_64_gpus(preset: str, tmp_path: Path) -> None:
    """ZeRO 3 on two stages: the ranks hold each parameter's fp32 weight and moments once."""
    path = tmp_path / "run.json"
    document = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "megagpt": {
            "model": {"preset": preset},
            "parallel": {"pipeline": 2, "world_size": 64},
            "training": {"total_steps": 10, "recompute": "full"},
        },
    }
    path.write_text(json.dumps(document))
    plan = make_plan(str(path), [], hosts_of(64, 8), ROOMY, assume(H100, 8))
    assert plan.refusals == []
    held = sum(
        32 * (rank.states.master_weights.device + rank.states.moments.device)
        for rank in plan.memory
    )
    # Tied embeddings have a copy on each stage.
    model = plan.config.megagpt.model
    copies = model.vocab_size * model.hidden_size if model.tie_embeddings else 0
    assert held == pytest.approx(12 * (model.num_parameters + copies), rel=0.001)
    assert plan.estimate.step_s > 0
