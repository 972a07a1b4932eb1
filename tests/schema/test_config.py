"""Reading a configuration: unknown and wrong keys, syntax, overrides; every error at once."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import ConfigError, RunConfig, load_config
from tests.support.config_documents import MINIMAL, errors_of, parse, put, resolve

TYPOS = {  # what was typed, where; what was meant
    "train_bach_size": "train_batch_size",
    "train_micro_batch_size_per_gp": "train_micro_batch_size_per_gpu",
    "gradient_acumulation_steps": "gradient_accumulation_steps",
    "gradient_cliping": "gradient_clipping",
    "optimiser": "optimizer",
    "zero_optimisation": "zero_optimization",
    "zero_optimization.stge": "stage",
    "zero_optimization.offload_optimiser": "offload_optimizer",
    "zero_optimization.offload_optimizer.devise": "device",
    "zero_optimization.stage3_max_live_paramters": "stage3_max_live_parameters",
    "zero_optimization.reduce_bucketsize": "reduce_bucket_size",
    "scheduler.params.warmup_steps": "warmup_num_steps",
    "optimizer.params.weight_decy": "weight_decay",
    "megagpt.model.num_layer": "num_layers",
    "megagpt.model.hiden_size": "hidden_size",
    "megagpt.model.seq_length": "sequence_length",
    "megagpt.trainning": "training",
    "megagpt.training.total_step": "total_steps",
    "megagpt.training.evaluation_interval_steps": "eval_interval_steps",
    "num_heads": "megagpt.model.num_heads",
}


def test_at_least_18_of_20_seeded_typos_get_the_right_suggestion() -> None:
    right = []
    for typo, meant in TYPOS.items():
        lines = [
            line
            for line in errors_of(put(MINIMAL, typo, 1))
            if f"x.json: {typo}: unknown key" in line
        ]
        assert len(lines) == 1, f"{typo} must be reported once"
        right.append(lines[0].endswith(f'did you mean "{meant}"?'))
    assert len(TYPOS) == 20
    assert sum(right) >= 18, [typo for typo, found in zip(TYPOS, right, strict=True) if not found]


def test_error_line_has_file_key_and_suggestion() -> None:
    assert errors_of(put(MINIMAL, "zero_optimization.stge", 3)) == [
        'x.json: zero_optimization.stge: unknown key, did you mean "stage"?'
    ]


def test_all_errors_are_reported_at_once() -> None:
    document = put(MINIMAL, "zero_optimization.stge", 3)
    for key, value in {
        "megagpt.model.num_layers": 2.5,
        "megagpt.model.norm": "layernrm",
        "megagpt.checkpoint.keep": 1,
        "bf16.enabled": "yes",
        "gradient_clipping": -1,
        "sequence_parallel_size": 2,
    }.items():
        document = put(document, key, value)
    del document["megagpt"]["training"]["total_steps"]
    assert sorted(errors_of(document)) == sorted(
        [
            'x.json: zero_optimization.stge: unknown key, did you mean "stage"?',
            "x.json: megagpt.model.num_layers: expected an integer, got 2.5",
            'x.json: megagpt.model.norm: expected one of "layernorm", "rmsnorm"; got "layernrm", '
            'did you mean "layernorm"?',
            "x.json: megagpt.checkpoint.keep: must be at least 2, got 1",
            'x.json: bf16.enabled: expected true or false, got "yes"',
            "x.json: gradient_clipping: must be at least 0, got -1",
            "x.json: sequence_parallel_size: Ulysses sequence parallelism is not used; see "
            "megagpt.parallel.sequence",
            "x.json: megagpt.training.total_steps: required key is missing (or give total_tokens)",
        ]
    )


@pytest.mark.parametrize("value", [2.5, True, "2", [2], 1e400])
@pytest.mark.parametrize(
    "key", ["train_batch_size", "megagpt.model.num_layers", "zero_optimization.reduce_bucket_size"]
)
def test_only_integers_are_integers(key: str, value: object) -> None:
    assert any(line.startswith(f"x.json: {key}: ") for line in errors_of(put(MINIMAL, key, value)))


def test_integral_floats_are_accepted_for_element_counts_only() -> None:
    config = parse(put(MINIMAL, "zero_optimization.reduce_bucket_size", 5e8))
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert errors_of(put(MINIMAL, "train_batch_size", 16.0)) == [
        "x.json: train_batch_size: expected an integer, got 16.0"
    ]


@pytest.mark.parametrize("spelling", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(spelling: str) -> None:
    text = json.dumps(put(MINIMAL, "gradient_clipping", "HERE")).replace('"HERE"', spelling)
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(text, "x.json")
    assert caught.value.errors == [
        f"x.json: gradient_clipping: {spelling} is not a JSON number; write a finite one"
    ]


def test_duplicate_keys_at_any_depth() -> None:
    text = json.dumps(MINIMAL).replace('"num_layers": 2', '"num_layers": 2, "num_layers": 3')
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(text, "x.json")
    assert caught.value.errors == [
        "x.json: megagpt.model.num_layers: written more than once; keep one"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  "a": 1,\n}', "x.json: line 3, column 1: "),
        ('{\n  "a" 1\n}', "x.json: line 2, column 7: "),
        ('{"a": 1 // why\n}', "(JSON has no comments)"),
        ("{'a': 1}", "double quotes"),
        ("", "x.json: empty; need one JSON object"),
        ("train_batch_size: 8\noptimizer:\n", "x.json: this is YAML, need JSON; to convert it: "),
        ("# mine\n---\na: 1\n", "x.json: this is YAML"),
        ("[1]", "expected one JSON object"),
        ("[" * 100_000, "x.json: "),
    ],
)
def test_syntax_errors_name_line_and_column(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(text, "x.json")
    assert len(caught.value.errors) == 1
    assert expected in caught.value.errors[0]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KEYS = [
    "megagpt",
    "scheduler",
    "optimizer.params.betas",
    "megagpt.data.path",
    "megagpt.data.validation",
    "megagpt.model.preset",
    "$schema",
    "optimizer",
    "fp16",
    "zero_optimization",
    "zero_optimization.cpu_offload",
    "zero_optimization.sub_group_size",
    "steps_per_print",
    "activation_checkpointing",
    "aio",
    "checkpoint",
]


@settings(deadline=None)
@given(st.sampled_from(KEYS), ANY_JSON)
def test_whatever_stands_at_a_key_only_config_errors_come_out(key: str, value: object) -> None:
    try:
        parse(put(MINIMAL, key, value))
    except ConfigError as error:
        lines = error.errors
    else:
        lines = ["x.json: none"]
    assert lines
    assert all(line.startswith("x.json: ") for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("megagpt.model.num_heads", 5, "5 does not divide hidden_size 64: use 4 or 8"),
        ("megagpt.model.num_kv_heads", 3, "3 does not divide num_heads 4: use 2 or 4"),
        ("megagpt.training.total_tokens", 5, "given together with total_steps; keep only one"),
        (
            "megagpt.checkpoint.milestone_interval_steps",
            600,
            "600 is not a multiple of interval_steps 500: use 1000 or 0",
        ),
        ("megagpt.data.path", [], "the list is empty; name at least one dataset"),
        (
            "megagpt.data.validation",
            {"a b": "data/a"},
            '"a b": use letters, digits, _ and - in the name of a validation set',
        ),
        ("megagpt.data.validation.web", "", "empty; name the directory of a dataset"),
        ("megagpt.data.validation.web", 5, "expected a string, got 5"),
        ("megagpt.data.validation", "data/web", 'expected an object, got "data/web"'),
        ("fp16.enabled", True, 'true, and bf16.enabled is "auto"; enable only one'),
        (
            "optimizer.params.adam_w_mode",
            False,
            'DeepSpeed ignores false with type "AdamW"; use type "Adam"',
        ),
    ],
)
def test_sections_check_themselves(key: str, value: object, expected: str) -> None:
    assert errors_of(put(MINIMAL, key, value)) == [f"x.json: {key}: {expected}"]


def test_nvme_needs_a_path() -> None:
    document = put(MINIMAL, "zero_optimization.offload_param", {"device": "nvme"})
    assert errors_of(document) == [
        "x.json: zero_optimization.offload_param.nvme_path: required with device nvme: a "
        "directory on the drive"
    ]


def test_a_schedule_may_not_replace_the_learning_rate() -> None:
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 10},
    }
    assert errors_of(put(MINIMAL, "scheduler", scheduler)) == [
        "x.json: scheduler.params.warmup_max_lr: 0.001 differs from optimizer.params.lr 0.0003; "
        "make them equal, or remove it"
    ]
    del scheduler["params"]["warmup_max_lr"]  # type: ignore[attr-defined]
    params = resolve(put(MINIMAL, "scheduler", scheduler)).deepspeed_dict()["scheduler"]["params"]
    assert params["warmup_max_lr"] == 3e-4  # DeepSpeed's own default would be 0.001
    assert params["total_num_steps"] == 100


def test_validation_sets_are_named_and_no_part_of_the_identity() -> None:
    plain = resolve(MINIMAL)
    config = plain.changed(
        ["megagpt.data.validation.web=data/web", "megagpt.data.validation.code=~/code"]
    )
    home = str(Path.home() / "code")
    assert config.megagpt.data.validation == {"web": "data/web", "code": home}
    assert resolve(config.as_written()).identity() == plain.identity()
    assert config.changed(["megagpt.data.validation.web=null"]).megagpt.data.validation == {
        "code": home
    }


def test_data_may_be_a_blend() -> None:
    config = parse(
        put(MINIMAL, "megagpt.data.path", [{"path": "data/a", "weight": 0.25}, {"path": "data/b"}])
    )
    assert [(source.path, source.weight) for source in config.megagpt.data.sources] == [
        ("data/a", 0.25),
        ("data/b", 1.0),
    ]
    assert parse(MINIMAL).megagpt.data.sources[0].path == "data/stdlib"


def test_a_configuration_is_frozen() -> None:
    config = parse(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train_batch_size = 3
    with pytest.raises(ValueError, match="frozen"):
        config.megagpt.model.num_layers = 3


def test_a_missing_file_lists_the_present_ones(tmp_path: Path) -> None:
    (tmp_path / "default.json").write_text("{}")
    with pytest.raises(
        ConfigError,
        match=r'defualt.json: no such file; .* holds default.json, did you mean "default.json"',
    ):
        load_config(tmp_path / "defualt.json")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (json.dumps(MINIMAL).encode("utf-16"), "x.json: UTF-16, need UTF-8; iconv -f UTF-16"),
        (b'{"a": "\xff"}', "x.json: not UTF-8 text (byte 7); save it as UTF-8"),
    ],
    ids=["UTF-16", "Latin-1"],
)
def test_a_file_that_is_not_text(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(tmp_path / "x.json")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(json.dumps(MINIMAL).encode("utf-8-sig"))
    assert load_config(tmp_path / "x.json") == parse(MINIMAL)


def test_overrides_pass_the_same_checks(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(MINIMAL))
    config = load_config(
        path,
        ["megagpt.model.num_layers=24", "megagpt.data.path=data/web", "zero_optimization.stage=2"],
    )
    assert config.megagpt.model.num_layers == 24
    assert config.megagpt.data.path == "data/web"
    assert config.zero_optimization.stage == 2
    with pytest.raises(ConfigError) as caught:
        load_config(
            path,
            [
                "megagpt.model.num_layer=24",
                "nonsense",
                "train_batch_size.x=1",
                'megagpt.data.path="open',
                "gradient_clipping=NaN",
            ],
        )
    assert [line.split(": ")[0] for line in caught.value.errors] == [
        "--set nonsense",
        "--set train_batch_size.x=1",
        '--set megagpt.data.path="open',
        "--set",
        "--set",
    ]
    assert (
        '--set: megagpt.model.num_layer: unknown key, did you mean "num_layers"?'
        in caught.value.errors
    )
    assert (
        "--set: gradient_clipping: NaN is not a JSON number; write a finite one"
        in caught.value.errors
    )


def test_what_the_command_line_sets_in_a_refused_section_is_named_there(tmp_path: Path) -> None:
    """The file is blamed for a section that it has itself."""
    remedy = "use megagpt.training.recompute"

    def errors(overrides: list[str], **sections: object) -> list[str]:
        (tmp_path / "x.json").write_text(json.dumps(MINIMAL | sections))
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "x.json", overrides)
        return [line.removeprefix(f"{tmp_path}/") for line in caught.value.errors]

    names = ("activation_checkpointing.cpu_checkpointing", "activation_checkpointing.profile")
    lines = [f"--set: {name}: {remedy}" for name in names]
    assert errors([f"{name}=true" for name in names]) == lines
    of_the_file = {"activation_checkpointing": {"number_checkpoints": 4}}
    of_section = f"x.json: activation_checkpointing: {remedy}"
    assert errors([f"{names[0]}=true"], **of_the_file) == [of_section, lines[0]]
    assert errors([], **of_the_file) == [of_section]
    # A key of an unknown section is named whole, with the key that was meant.
    meant = 'unknown key, did you mean "zero_optimization.stage"?'
    assert errors(["zero_optimisation.stage=2"]) == [f"--set: zero_optimisation.stage: {meant}"]
    meant = 'unknown key, did you mean "megagpt.training.total_steps"?'
    assert errors(["training.total_steps=100"]) == [f"--set: training.total_steps: {meant}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_checkpointing", {"partition_activations": True}),
        ("zero_optimization.zero_quantized_weights", True),
        ("optimizer.params.amsgrad", True),
        ("my_own_key", 3),
        ("zero_optimization.stge", 2),
        ("nothing.at.all", 1),
    ],
)
def test_null_removes_what_the_file_has_whatever_it_is(
    tmp_path: Path, key: str, value: object
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(put(MINIMAL, key, value)))
    with pytest.raises(ConfigError, match=key.split(".")[0]):
        load_config(tmp_path / "x.json")
    top = key if "nothing" not in key else "nothing"
    assert load_config(tmp_path / "x.json", [f"{top}=null"]) == parse(MINIMAL)


def test_null_takes_back_an_earlier_item(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(MINIMAL))
    items = ["activation_checkpointing.profile=true", "activation_checkpointing=null"]
    assert load_config(tmp_path / "x.json", items) == parse(MINIMAL)
    assert load_config(tmp_path / "x.json", ["csv_monitor.enabled=null"]) == parse(MINIMAL)


def test_an_override_error_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(MINIMAL))
    with pytest.raises(ConfigError, match=r"--set nonsense: expected KEY\.KEY=VALUE"):
        load_config(tmp_path / "x.json", ["nonsense"])


@pytest.mark.parametrize(
    "key", ["bf16", "bf16.enabled", "zero_optimization.offload_optimizer", "scheduler", "aio"]
)
def test_null_on_the_command_line_removes_a_key(tmp_path: Path, key: str) -> None:
    document = copy.deepcopy(MINIMAL)
    (tmp_path / "with.json").write_text(json.dumps(document))
    *parents, last = key.split(".")
    here = document
    for name in parents:
        here = here[name]
    here.pop(last, None)
    (tmp_path / "without.json").write_text(json.dumps(document))
    assert load_config(tmp_path / "with.json", [f"{key}=null"]) == load_config(
        tmp_path / "without.json"
    )


def test_what_is_required_cannot_be_removed(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(MINIMAL))
    with pytest.raises(ConfigError, match="optimizer: required key is missing"):
        load_config(tmp_path / "x.json", ["optimizer=null"])


@pytest.mark.parametrize(
    "key", ["bf61", "zero_optimization.stge", "optimizer.params.lrr", "bf61.enabled"]
)
def test_a_typo_is_not_removed_but_said(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps(MINIMAL))
    with pytest.raises(ConfigError, match="unknown key, did you mean"):
        load_config(tmp_path / "x.json", [f"{key}=null"])
