"""The table of what composes: one refused configuration for each row, and proof that its remedy
is legal.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import ConfigError, RunConfig, load_config
from megagpt.planning import legality
from megagpt.planning import rules as planner
from megagpt.planning.legality import World
from tests import REPOSITORY
from tests.support.config_documents import MINIMAL, put

NVME = {"device": "nvme", "nvme_path": "swap"}
SIX_HEADS = {"num_layers": 2, "hidden_size": 96, "num_heads": 6, "sequence_length": 32}
CASES: list[
    tuple[dict[str, Any], str]
] = [  # changes to the minimal (ZeRO 3) configuration; words of the reason
    ({"megagpt.parallel.tensor": 3, "train_batch_size": 12}, "divide num_kv_heads"),
    (
        {"megagpt.parallel.tensor": 3, "megagpt.model": SIX_HEADS, "train_batch_size": 12},
        "divide the rows of the embedding",
    ),
    (
        {"megagpt.parallel": {"tensor": 2, "sequence": True}, "megagpt.model.sequence_length": 127},
        "must divide megagpt.model.sequence_length",
    ),
    (
        {"megagpt.parallel.pipeline": 2, "zero_optimization": {"stage": 0}},
        "without a ZeRO optimizer",
    ),
    ({"megagpt.parallel.pipeline": 4}, "a stage would have no block"),
    (
        {"megagpt.training.compile": "blocks", "zero_optimization": {"stage": 3}},
        "in hooks of its layers",
    ),
    (
        {
            "megagpt.training.compile": "blocks",
            "megagpt.parallel.tensor": 2,
            "zero_optimization": {"stage": 2},
        },
        "which torch.compile cannot trace",
    ),
    (
        {"megagpt.model.num_layers": 8, "megagpt.parallel": {"pipeline": 2, "virtual_stages": 2}},
        "only the interleaved schedule",
    ),
    (
        {
            "megagpt.model.num_layers": 8,
            "megagpt.parallel": {"pipeline": 2, "schedule": "interleaved"},
        },
        "needs several stages on each rank",
    ),
    (
        {
            "megagpt.parallel": {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
            "megagpt.model.num_layers": 8,
            "train_batch_size": 10,
            "train_micro_batch_size_per_gpu": 1,
        },
        "in equal rounds",
    ),
    (
        {
            "megagpt.parallel": {"pipeline": 2, "gradient_reduction": "per_micro_batch"},
            "zero_optimization": {"stage": 2},
        },
        "copies of the tied embedding",
    ),
    (
        {
            "megagpt.parallel": {
                "pipeline": 2,
                "schedule": "interleaved",
                "virtual_stages": 2,
                "gradient_reduction": "per_micro_batch",
            },
            "megagpt.model": {
                "num_layers": 8,
                "hidden_size": 64,
                "num_heads": 4,
                "tie_embeddings": False,
            },
            "zero_optimization": {"stage": 1, "overlap_comm": True},
        },
        "of a rank's stages",
    ),
    (
        {
            "megagpt.parallel.pipeline": 2,
            "zero_optimization.offload_param": NVME,
            "bf16.enabled": True,
        },
        "never tested with parameters",
    ),
    ({"megagpt.parallel.schedule": "gpipe"}, "orders the micro-batches"),
    ({"megagpt.parallel.virtual_stages": 2}, "splits the stages"),
    ({"megagpt.parallel.sequence": True}, "splits the sequence"),
    (
        {"zero_optimization": {"stage": 0}, "megagpt.parallel.gradient_reduction": "per_step"},
        "coalesced reduction needs a ZeRO optimizer",
    ),
    ({"zero_optimization.stage": 0}, "no partitioned optimizer state"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, "no swap file ever appears"),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "ignores parameter offload below",
    ),
    ({"zero_optimization.offload_param": NVME, "bf16.enabled": False}, "computes in fp32"),
    (
        {"zero_optimization.offload_param": {**NVME, "buffer_size": 100}, "bf16.enabled": True},
        "does not fit into one I/O buffer",
    ),
    ({"data_types.grad_accum_dtype": "bf16", "bf16.enabled": False}, "less precise than the model"),
    ({"bf16.enabled": True, "zero_optimization": {"stage": 0}}, "uses other optimizers"),
    (
        {
            "data_types.grad_accum_dtype": "fp32",
            "bf16.enabled": True,
            "megagpt.parallel.gradient_reduction": "per_step",
        },
        "before the conversion",
    ),
    (
        {
            "data_types.grad_accum_dtype": "fp32",
            "bf16.enabled": True,
            "zero_optimization": {"stage": 1},
        },
        "BF16_Optimizer",
    ),
    (
        {
            "megagpt.parallel.pipeline": 2,
            "zero_optimization": {"stage": 3, "sub_group_size": 30_000},
        },
        "different numbers of optimizer tiles",
    ),
]


def write(tmp_path: Path, changes: dict[str, Any]) -> Path:
    document = MINIMAL
    for key, value in changes.items():
        document = put(document, key, value)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    return path


def world_of(config: RunConfig) -> World:
    """Two replicas of what the configuration asks for."""
    return World(
        2 * config.megagpt.parallel.model_parallel_size, vocabulary=1000, bf16_native=False
    )


def printed_items(line: str) -> list[str]:
    """What an error says to type behind `--set`."""
    return line.rpartition("nearest legal: --set ")[2].split()


def is_legal(path: Path, items: list[str], world: World) -> bool:
    """Typed in, as a user would, and resolved in the same world."""
    return legality.problems(load_config(path, items), world) == []


def test_every_row_has_a_case() -> None:
    reasons = [reason for _, reason in CASES]
    rows_hit = [sum(words in rule.reason for words in reasons) for rule in planner.RULES]
    assert rows_hit == [1] * len(planner.RULES)


@pytest.mark.parametrize(("changes", "reason"), CASES, ids=[reason for _, reason in CASES])
def test_a_row_refuses_and_what_it_prints_passes_the_whole_check(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path, changes)
    written = load_config(path)
    world = world_of(written)
    (rule,) = planner.refusals(world.resolve(written))
    assert reason in rule.reason
    with pytest.raises(ConfigError) as caught:
        legality.require_legal(written, "x.json", world)
    (line,) = caught.value.errors
    assert line.startswith(f"x.json: {rule.line(world.resolve(written))}; nearest legal: --set ")
    assert is_legal(path, printed_items(line), world)


@pytest.mark.parametrize(("changes", "reason"), CASES, ids=[reason for _, reason in CASES])
def test_each_remedy_of_a_row_is_one(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    """Whatever else it breaks, that row no longer refuses; a change that no file may have is
    passed over.
    """
    written = load_config(write(tmp_path, changes))
    world, cured = world_of(written), 0
    (rule,) = planner.refusals(world.resolve(written))
    for remedy in rule.remedies_for(world.resolve(written)):
        try:
            after = world.resolve(written.changed(remedy.split()))
        except ConfigError:
            continue
        assert rule not in planner.refusals(after), remedy
        cured += 1
    assert cured


NEAREST = [  # what a remedy alone would break; the world; what is printed
    (
        {"megagpt.model.num_layers": 6, "megagpt.parallel.pipeline": 8},
        8,
        ["megagpt.parallel.pipeline=4"],
    ),
    (
        {
            "megagpt.model.num_layers": 4,
            "megagpt.parallel": {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3},
        },
        4,
        ["megagpt.parallel.virtual_stages=2"],
    ),
    (
        {
            "megagpt.model.num_layers": 4,
            "megagpt.parallel": {"pipeline": 4, "schedule": "interleaved", "virtual_stages": 2},
        },
        8,
        ["megagpt.parallel.virtual_stages=1", "megagpt.parallel.schedule=1f1b"],
    ),
    (
        {
            "megagpt.model.num_layers": 8,
            "megagpt.parallel": {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
            "train_batch_size": 10,
            "gradient_accumulation_steps": 5,
        },
        4,
        ["train_batch_size=8", "gradient_accumulation_steps=4"],
    ),
    ({"megagpt.parallel.tensor": 6}, 4, ["megagpt.parallel.tensor=4"]),
    (
        {"megagpt.model.num_layers": 6, "megagpt.parallel": {"pipeline": 4, "tensor": 2}},
        6,
        ["megagpt.parallel.pipeline=3"],
    ),
    ({"train_batch_size": 15}, 2, ["train_batch_size=14"]),
    (
        {"megagpt.parallel.pipeline": 50},
        100,
        ["megagpt.parallel.pipeline=2", "train_batch_size=50"],
    ),
    ({"megagpt.parallel.tensor": 3}, 6, ["megagpt.parallel.tensor=2", "train_batch_size=15"]),
    (
        {
            "megagpt.parallel.tensor": 3,
            "train_batch_size": 12,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 3,
        },
        6,
        ["megagpt.parallel.tensor=2", "gradient_accumulation_steps=null"],
    ),
    (
        {
            "train_batch_size": 17,
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 5,
        },
        4,
        ["train_batch_size=12", "gradient_accumulation_steps=null"],
    ),
    (
        {"megagpt.parallel": {"pipeline": 1, "schedule": "interleaved", "virtual_stages": 2}},
        2,
        ["megagpt.parallel.schedule=1f1b", "megagpt.parallel.virtual_stages=1"],
    ),
    (
        {
            "megagpt.parallel": {"pipeline": 2},
            "zero_optimization": {"stage": 2},
            "bf16.enabled": True,
            "data_types.grad_accum_dtype": "fp32",
        },
        4,
        ["zero_optimization.stage=3", "megagpt.parallel.gradient_reduction=per_micro_batch"],
    ),
    (
        {
            "zero_optimization": {
                "stage": 2,
                "allgather_bucket_size": 1000,
                "offload_optimizer": NVME,
            }
        },
        2,
        ["zero_optimization.stage=3", "zero_optimization.allgather_bucket_size=null"],
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        2,
        ["zero_optimization.offload_param=null"],
    ),
]


@pytest.mark.parametrize(
    ("changes", "ranks", "items"), NEAREST, ids=[str(items) for *_, items in NEAREST]
)
def test_the_nearest_legal_run_is_looked_for_until_all_is_legal(
    tmp_path: Path, changes: dict[str, Any], ranks: int, items: list[str]
) -> None:
    path, world = write(tmp_path, changes), World(ranks, vocabulary=1000, bf16_native=False)
    *_, line = legality.problems(load_config(path), world)
    assert printed_items(line) == items
    assert is_legal(path, items, world)


def test_all_refusals_come_at_once_and_one_remedy_for_all(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"megagpt.parallel.schedule": "gpipe", "megagpt.parallel.sequence": True}
    )
    with pytest.raises(ConfigError) as caught:
        legality.require_legal(load_config(path), "x.json")
    assert [line.split(":")[1] for line in caught.value.errors] == [
        " megagpt.parallel.schedule",
        " megagpt.parallel.sequence",
        " nearest legal",
    ]
    assert printed_items(caught.value.errors[-1]) == [
        "megagpt.parallel.schedule=1f1b",
        "megagpt.parallel.sequence=false",
    ]


@pytest.mark.parametrize("layers", [3, 6, 8])
@pytest.mark.parametrize("ranks", [2, 6, 8])
def test_whatever_is_printed_of_a_grid_of_meshes_is_legal(
    tmp_path: Path, ranks: int, layers: int
) -> None:
    """Every pipeline, tensor, schedule and reduction, most of them impossible together."""
    model = {"num_layers": layers, "hidden_size": 64, "num_heads": 4, "sequence_length": 32}
    world = World(ranks, vocabulary=1000, bf16_native=False)
    offers = 0
    for pipeline, tensor in itertools.product(divisors(ranks), repeat=2):
        if ranks % (pipeline * tensor):
            continue
        for schedule, virtual, stage in itertools.product(
            ("1f1b", "interleaved"), (1, 2, 3), (0, 1, 3)
        ):
            parallel = {
                "pipeline": pipeline,
                "tensor": tensor,
                "schedule": schedule,
                "virtual_stages": virtual,
            }
            parallel |= {
                "sequence": stage == 1,
                "gradient_reduction": "per_micro_batch" if stage else "per_step",
            }
            changes = {
                "megagpt.model": model,
                "megagpt.parallel": parallel,
                "zero_optimization": {"stage": stage},
            }
            path = write(
                tmp_path,
                changes | {"train_batch_size": 10 * ranks, "gradient_accumulation_steps": 10},
            )
            found = legality.problems(load_config(path), world)
            if found and "nearest legal" in found[-1]:
                assert is_legal(path, printed_items(found[-1]), world), found
                offers += 1
            else:
                assert not found or "use" in found[-1], "refused without a way out"
    assert offers > 20


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def test_a_buffer_holds_what_a_rank_has_of_the_largest_parameter(tmp_path: Path) -> None:
    """Shared by tensor ranks, too; positions are a parameter like others."""

    def needed(**changes: Any) -> int:
        offload = NVME | {"buffer_size": 1}
        path = write(
            tmp_path, {"zero_optimization.offload_param": offload, "bf16.enabled": True} | changes
        )
        written = load_config(path)
        (line,) = legality.problems(written, world_of(written))
        return int(line.rpartition("=")[2])

    rows, width = 1024, 64
    assert needed() == rows * width // 2
    assert needed(**{"megagpt.parallel.tensor": 4}) == rows * width // 4 // 2
    assert needed(**{"megagpt.model.sequence_length": 2048}) == 2048 * width // 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", [None, "cpu", "nvme"])
@pytest.mark.parametrize("parameters", [None, "cpu", "nvme"])
def test_exactly_the_offload_cells_that_act_are_legal(
    tmp_path: Path, stage: int, optimizer: str | None, parameters: str | None
) -> None:
    zero: dict[str, Any] = {"stage": stage}
    for section, device in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        if device:
            zero[section] = NVME if device == "nvme" else {"device": device}
    config = load_config(write(tmp_path, {"zero_optimization": zero, "bf16.enabled": stage > 0}))
    acts = (optimizer is None or stage == 3 or (optimizer == "cpu" and stage > 0)) and (
        parameters is None or stage == 3
    )
    assert (planner.refusals(config) == []) is acts


def test_auto_precision_is_judged_when_it_is_known(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {"zero_optimization.offload_param": NVME}))
    assert planner.refusals(config) == []
    on_gpu = config.resolved(world_size=2, vocabulary=1000, bf16_native=True)
    on_cpu = config.resolved(world_size=2, vocabulary=1000, bf16_native=False)
    assert planner.refusals(on_gpu) == []
    assert [rule.key for rule in planner.refusals(on_cpu)] == [
        "zero_optimization.offload_param.device"
    ]


def test_a_run_is_resolved_once_and_the_device_decides_no_more_than_auto(tmp_path: Path) -> None:
    world = World(2, vocabulary=1000)
    stated = legality.resolve(load_config(write(tmp_path, {"bf16.enabled": False})), world=world)
    assert (
        stated.on_device(bf16_native=True) is stated.on_device(bf16_native=False) is stated.config
    )
    free = legality.resolve(load_config(write(tmp_path, {})), world=world)
    on_gpu, on_cpu = (free.on_device(bf16_native=native) for native in (True, False))
    assert (on_gpu.bf16.enabled, on_cpu.bf16.enabled) == (True, False)
    assert on_gpu.model_copy(update={"bf16": on_cpu.bf16}) == on_cpu == free.config
    bound = legality.resolve(
        load_config(write(tmp_path, {"zero_optimization.offload_param": NVME})), world=world
    )
    assert bound.config == bound.on_device(bf16_native=True)
    with pytest.raises(ConfigError, match="in bf16 or fp16 only, but this run computes in fp32"):
        bound.on_device(bf16_native=False)


@pytest.mark.parametrize(
    ("changes", "native", "chosen"),
    [
        ({"bf16.enabled": "auto", "fp16.enabled": "auto"}, (True, True), "bf16"),
        ({"bf16.enabled": "auto", "fp16.enabled": "auto"}, (False, True), "fp16"),
        ({"bf16.enabled": "auto", "fp16.enabled": "auto"}, (False, False), None),
        ({"bf16": None, "fp16.enabled": "auto"}, (False, True), "fp16"),
        ({"bf16": None, "fp16.enabled": "auto"}, (True, True), None),
        ({"bf16.enabled": True, "fp16.enabled": "auto"}, (False, True), "bf16"),
        ({"bf16.enabled": "auto", "zero_optimization": {"stage": 0}}, (True, True), None),
        ({"fp16.enabled": "auto", "zero_optimization": {"stage": 0}}, (False, True), None),
    ],
)
def test_the_device_decides_which_format_auto_is(
    tmp_path: Path, changes: dict[str, Any], native: tuple[bool, bool], chosen: str | None
) -> None:
    written = load_config(write(tmp_path, changes))
    run = legality.resolve(written, world=World(2, vocabulary=1000))
    config = run.on_device(bf16_native=native[0], fp16_native=native[1])
    enabled = [name for name in ("bf16", "fp16") if getattr(config, name).enabled]
    assert enabled == ([chosen] if chosen else [])
    notes = legality.precision_notes(written, config)
    asked = [name for name in ("bf16", "fp16") if getattr(written, name).enabled == "auto"]
    assert [line.split(":")[0] for line in notes] == [f"{name}.enabled" for name in asked]
    assert all((f"{chosen}.enabled" in line) == ('"auto" is on' in line) for line in notes)


@pytest.mark.parametrize(
    ("changes", "supported", "items"),
    [
        ({"bf16": None, "fp16.enabled": True}, {"bf16"}, ["fp16.enabled=false"]),
        ({"bf16.enabled": True}, {"fp16"}, ["bf16.enabled=false"]),
        (
            {"bf16": None, "fp16.enabled": True, "zero_optimization.offload_param": NVME},
            {"bf16"},
            ["fp16.enabled=false", "bf16.enabled=true"],
        ),
        ({"bf16.enabled": True}, {"bf16"}, None),
        ({"bf16.enabled": False}, set(), None),
    ],
)
def test_a_format_that_the_device_lacks_is_refused_with_the_nearest_legal_one(
    tmp_path: Path, changes: dict[str, Any], supported: set[str], items: list[str] | None
) -> None:
    path, world = write(tmp_path, changes), World(2, vocabulary=1000)
    run = legality.resolve(load_config(path), world=world)
    if items is None:
        run.require_format(supported)
        return
    with pytest.raises(ConfigError, match=r"the device has no (bf16|fp16); nearest legal") as found:
        run.require_format(supported)
    assert printed_items(found.value.errors[0]) == items
    other = legality.resolve(load_config(path, items), world=world)
    other.require_format(supported)


@pytest.mark.parametrize(("tokens", "rows"), [(257, 384), (50257, 50304), (1000, 1024)])
def test_rows_are_judged_once_the_data_say_how_many_there_are(
    tmp_path: Path, tokens: int, rows: int
) -> None:
    """Six heads on three ranks: 384 = 3 x 128 and 50,304 = 3 x 16,768 rows can be shared, 1,024
    cannot.
    """
    changes = {"megagpt.parallel.tensor": 3, "megagpt.model": SIX_HEADS, "train_batch_size": 12}
    written = load_config(write(tmp_path, changes))
    before = legality.problems(written, World(6, legality.ANY_VOCABULARY))
    now = legality.problems(written, World(6, tokens))
    assert before == []
    assert (now == []) is (rows % 3 == 0)
    stated = load_config(
        write(tmp_path, changes | {"megagpt.model": SIX_HEADS | {"vocab_size": tokens}})
    )
    assert legality.problems(stated, World(6, legality.ANY_VOCABULARY)) == now


def test_tiles_are_judged_once_the_data_say_how_many_rows_there_are() -> None:
    """As many tiles on both stages with GPT's vocabulary, and not with one of 128 rows."""
    size = "zero_optimization.sub_group_size=780000000"
    written = load_config(REPOSITORY / "ds_configs" / "gpt3_13b_3d_zero3.json", [size])
    assert legality.problems(written, World(16, 50257)) == []
    assert "optimizer tiles" in legality.problems(written, World(16, 128))[0]
    assert legality.problems(written, World(16, legality.ANY_VOCABULARY)) == []


@pytest.mark.parametrize("ranks", [1000, 1008, 512])
def test_a_run_on_fewer_ranks_than_it_states_is_offered_one_that_is_legal_there(ranks: int) -> None:
    path, world = (
        REPOSITORY / "ds_configs" / "gpt3_175b_3d.json",
        World(ranks, 50257, bf16_native=True),
    )
    (line,) = legality.problems(load_config(path), world)
    assert (
        f"expects 1024 ranks and {ranks} started: bring back the missing hosts; nearest legal"
        in line
    )
    assert f"megagpt.parallel.world_size={ranks}" in printed_items(line)
    assert is_legal(path, printed_items(line), world)


def test_missing_ranks_hide_nothing_else() -> None:
    """Tied embeddings and micro-batches are known of the run as it is stated."""
    changes = ["megagpt.parallel.gradient_reduction=per_micro_batch"]
    path, world = (
        REPOSITORY / "ds_configs" / "gpt3_175b_3d.json",
        World(1000, 50257, bf16_native=True),
    )
    reduction, missing, offer = legality.problems(load_config(path, changes), world)
    assert "copies of the tied embedding" in reduction
    assert "bring back the missing hosts" in missing
    assert is_legal(path, [*changes, *printed_items(offer)], world)
