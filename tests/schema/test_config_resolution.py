"""Resolving a configuration: batch arithmetic, identity, canonical text, presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import ModelConfig, ResolvedConfig, RunConfig, identity_differences, load_config
from megagpt.schema.arithmetic import BatchSizes, solve_batch
from megagpt.schema.model import PRESETS
from megagpt.schema.presets import OPEN_MODELS
from tests import REPOSITORY
from tests.support.config_documents import (
    MINIMAL,
    errors_of,
    parse,
    put,
    resolve,
    resolve_errors,
)

CONFIG_FILES = sorted(
    path for path in (REPOSITORY / "ds_configs").glob("*.json") if path.name != "schema.json"
)


def test_resolution_fills_in_everything() -> None:
    config = resolve(MINIMAL, world_size=2, vocabulary=1000)
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (8, 1)
    assert config.data_parallel_size == 2
    assert config.tokens_per_step == 16 * 32
    assert config.megagpt.model.vocab_size == 1024
    assert config.megagpt.model.num_kv_heads == 4
    assert config.megagpt.parallel.gradient_reduction == "per_micro_batch"
    assert config.bf16.enabled is False
    assert config.deepspeed_dict()["scheduler"]["params"]["total_num_steps"] == 100
    assert (
        parse(MINIMAL).resolved(world_size=1, vocabulary=1000, bf16_native=True).bf16.enabled
        is True
    )


def test_deepspeed_gets_its_own_sections_only() -> None:
    document = put(put(MINIMAL, "$schema", "schema.json"), "wandb.enabled", True)
    given_to_deepspeed = resolve(document).deepspeed_dict()
    assert not {"megagpt", "$schema", "wandb", "tensorboard", "schema_file"} & set(
        given_to_deepspeed
    )
    assert given_to_deepspeed["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }
    assert given_to_deepspeed["gradient_clipping"] == 1.0
    assert "auto" not in json.dumps(given_to_deepspeed)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 63), (3, 188), (0.1, 7), (2.5, 157), (0.03, 2)])
def test_a_length_in_epochs_becomes_whole_steps(epochs: float, steps: int) -> None:
    """Of 1,000 samples in batches of 16; 0.1 is a tenth, not the nearest binary fraction."""
    document = put(MINIMAL, "megagpt.training", {"total_epochs": epochs})
    written = parse(put(document, "scheduler.params.warmup_num_steps", 2))
    resolved = written.resolved(
        world_size=2, vocabulary=1000, bf16_native=False, samples_per_epoch=1000
    )
    assert resolved.megagpt.training.total_steps == steps
    assert resolved.deepspeed_dict()["scheduler"]["params"]["total_num_steps"] == steps
    again = ResolvedConfig.from_json(resolved.to_json())
    assert again.megagpt.training.total_steps == steps


def test_two_lengths_are_refused_and_neither_is_identity() -> None:
    document = put(MINIMAL, "megagpt.training", {"total_epochs": 1, "total_steps": 5})
    assert errors_of(document) == [
        "x.json: megagpt.training.total_epochs: given together with total_steps; keep only one"
    ]
    assert "megagpt.training.total_epochs" not in resolve(MINIMAL).identity()


def test_packing_is_identity_where_it_is_given() -> None:
    packed = resolve(put(MINIMAL, "megagpt.data.packing", "one_per_row")).identity()
    assert set(packed) - set(resolve(MINIMAL).identity()) == {"megagpt.data.packing"}


def test_a_length_in_tokens_becomes_whole_steps() -> None:
    document = put(MINIMAL, "megagpt.training", {"total_tokens": 512 * 10 + 1})
    config = resolve(put(document, "scheduler.params.warmup_num_steps", 2))
    assert config.megagpt.training.total_steps == 11
    assert config.megagpt.training.total_tokens == 512 * 10 + 1


@pytest.mark.parametrize(
    ("world_size", "changes", "expected"),
    [
        (
            3,
            {"train_batch_size": 512},
            "train_batch_size: 512 on 3 data-parallel ranks: use 510 or 513",
        ),
        (
            1,
            {"train_micro_batch_size_per_gpu": 5},
            "train_batch_size: 16 on 1 data-parallel rank x micro-batches of 5: use 15 or 20",
        ),
        (32, {}, "train_batch_size: 16 on 32 data-parallel ranks: use 32"),
        (
            2,
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
            "train_batch_size: 16 is not 3 accumulation steps x 2 x 2 data-parallel ranks: "
            "use gradient_accumulation_steps 4, or train_batch_size 12",
        ),
        (
            6,
            {"megagpt.parallel.tensor": 4},
            "megagpt.parallel: 6 ranks is not a multiple of tensor 4 x pipeline 1: use 4 or 8 "
            "ranks",
        ),
        (
            1,
            {"megagpt.model.vocabulary": 999},
            "megagpt.model.vocabulary: 999 is smaller than the data's vocabulary of 1000: use "
            "1000 or remove it",
        ),
        (
            1,
            {"megagpt.model.vocab_size": 1000, "megagpt.model.vocabulary": 1030},
            "megagpt.model.vocabulary: 1030 tokens do not fit into vocab_size 1000: "
            "remove one of the two",
        ),
        (
            1,
            {"megagpt.model.vocab_size": 999},
            "megagpt.model.vocab_size: 999 is smaller than the data's vocabulary of 1000: use "
            "1000 or remove it",
        ),
        (
            1,
            {"megagpt.training.total_steps": 10},
            "scheduler.params.warmup_num_steps: 20 is longer than the schedule of 10 steps: use "
            "at most 10",
        ),
    ],
)
def test_impossible_arithmetic_names_the_nearest_values(
    world_size: int, changes: dict[str, object], expected: str
) -> None:
    document = MINIMAL
    for key, value in changes.items():
        document = put(document, key, value)
    assert resolve_errors(document, world_size) == [expected]


def test_a_shrunken_world_is_refused() -> None:
    (line,) = resolve_errors(put(MINIMAL, "megagpt.parallel.world_size", 16), world_size=8)
    assert "expects 16 ranks and 8 started" in line


def test_every_impossible_value_is_reported_together() -> None:
    lines = resolve_errors(put(put(MINIMAL, "train_batch_size", 15), "megagpt.model.vocab_size", 5))
    assert [line.split(":")[0] for line in lines] == [
        "train_batch_size",
        "megagpt.model.vocab_size",
    ]


def test_an_unknown_vocabulary_needs_data_or_a_preset() -> None:
    (line,) = resolve_errors(MINIMAL, vocabulary=None)
    assert line.startswith("megagpt.model.vocab_size: unknown until the data are prepared")
    document = put(MINIMAL, "megagpt.model", {"preset": "gpt2-124m"})
    assert resolve(document, vocabulary=None).megagpt.model.vocab_size == 50304


sizes = st.integers(1, 64)


@settings(deadline=None)
@given(st.none() | st.integers(1, 4096), st.none() | sizes, st.none() | sizes, sizes)
def test_a_solved_batch_is_exact_and_keeps_what_was_given(
    train: int | None, micro: int | None, steps: int | None, ranks: int
) -> None:
    solved = solve_batch(train, micro, steps, ranks)
    if isinstance(solved, str):
        assert train is None or train % (ranks * (micro or steps or 1)) or steps is not None
        return
    assert solved.train_batch == solved.micro_batch * solved.accumulation_steps * ranks
    asked = (train, micro, steps)
    found = (solved.train_batch, solved.micro_batch, solved.accumulation_steps)
    assert all(wanted in (None, got) for wanted, got in zip(asked, found, strict=True))


@settings(deadline=None)
@given(st.integers(1, 4096), sizes, sizes)
def test_the_nearest_batches_that_are_offered_do_fit(train: int, micro: int, ranks: int) -> None:
    solved = solve_batch(train, micro, None, ranks)
    if isinstance(solved, str):
        for offered in solved.rsplit("use ", 1)[1].split(" or "):
            assert isinstance(solve_batch(int(offered), micro, None, ranks), BatchSizes)
            assert abs(int(offered) - train) < micro * ranks


def test_identity_names_what_differs() -> None:
    first = resolve(MINIMAL)
    other = resolve(put(put(MINIMAL, "megagpt.model.num_layers", 3), "optimizer.params.lr", 1e-4))
    assert identity_differences(first.identity(), other.identity()) == [
        "optimizer.params.lr: 0.0003 in the run directory, 0.0001 requested",
        "megagpt.model.num_layers: 2 in the run directory, 3 requested",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization": {"stage": 1}},
        {"bf16.enabled": True},
        {"train_micro_batch_size_per_gpu": 2},
        {"megagpt.training.total_steps": 500, "megagpt.training.recompute": "full"},
        {
            "megagpt.checkpoint.interval_steps": 7,
            "megagpt.monitor.log_interval_steps": 1,
            "wandb.enabled": True,
        },
    ],
)
def test_execution_is_no_part_of_the_identity(changes: dict[str, object]) -> None:
    document = MINIMAL
    for key, value in changes.items():
        document = put(document, key, value)
    assert (
        identity_differences(
            resolve(MINIMAL).identity(), resolve(document, world_size=1).identity()
        )
        == []
    )


def test_a_preset_and_its_spelled_out_shape_are_one_identity() -> None:
    preset = put(MINIMAL, "megagpt.model", {"preset": "gpt2-124m"})
    shape = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "sequence_length": 1024}
    assert resolve(preset).identity() == resolve(put(MINIMAL, "megagpt.model", shape)).identity()


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_text_round_trips_exactly(path: Path) -> None:
    config = load_config(path)
    ranks = config.megagpt.parallel.world_size or 16
    resolved = config.resolved(world_size=ranks, vocabulary=50257, bf16_native=True)
    again = ResolvedConfig.from_json(resolved.to_json())
    assert again == resolved
    assert again.to_json() == resolved.to_json()
    assert again.identity() == resolved.identity()
    assert RunConfig.from_json(config.to_json()).to_json() == config.to_json()


# parameters; GPT-2 as released (token and position tables included), GPT-3 as table 2.1 rounds them
PUBLISHED = {
    "gpt2-124m": (124_439_808, 0),
    "gpt2-355m": (354_823_168, 0),
    "gpt2-774m": (774_030_080, 0),
    "gpt2-1.5b": (1_557_611_200, 0),
    "gpt2": (124_439_808, 0),
    "gpt2-medium": (354_823_168, 0),
    "gpt2-large": (774_030_080, 0),
    "gpt2-xl": (1_557_611_200, 0),
    "gpt3-125m": (125e6, 0.02),
    "gpt3-350m": (350e6, 0.02),
    "gpt3-760m": (760e6, 0.02),
    "gpt3-1.3b": (1.3e9, 0.02),
    "gpt3-2.7b": (2.7e9, 0.02),
    "gpt3-6.7b": (6.7e9, 0.02),
    "gpt3-13b": (13.0e9, 0.02),
    "gpt3-175b": (175.0e9, 0.02),
}


def test_every_preset_has_a_published_number() -> None:
    assert PUBLISHED.keys() | OPEN_MODELS.keys() == PRESETS.keys(), "tests/model/test_presets.py"


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    published, tolerance = PUBLISHED[preset]
    counted = ModelConfig.model_validate({"preset": preset, "vocab_size": 50257}).num_parameters
    assert counted == pytest.approx(published, rel=tolerance, abs=0)


def test_explicit_keys_override_the_preset() -> None:
    model = ModelConfig.model_validate({"preset": "gpt2-124m", "num_layers": 3, "vocab_size": 128})
    assert (model.num_layers, model.hidden_size, model.sequence_length) == (3, 768, 1024)


def test_the_mlp_is_as_wide_as_stated() -> None:
    shape = {"num_layers": 1, "hidden_size": 4096, "num_heads": 32, "vocab_size": 128}
    assert ModelConfig.model_validate(shape).mlp_size == 16384
    assert (
        ModelConfig.model_validate({**shape, "activation": "swiglu"}).mlp_size == 11008
    )  # Llama 7B's width
