"""DeepSpeed's keys in four classes, "auto", comments and other trainers' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import ConfigError, RunConfig, load_config
from megagpt.schema.errors import TO_PASTE, all_keys
from megagpt.schema.foreign import ALL_FALSE, FOREIGN, OFF, ForeignKey
from megagpt.schema.model import PRESETS
from megagpt.schema.synonyms import PRESET_SYNONYMS, SYNONYMS, WITHOUT_A_KEY
from tests.support.config_documents import MINIMAL, errors_of, parse, put, resolve

NVME = {"device": "nvme", "nvme_path": "d"}


def harmless() -> list[tuple[str, Any]]:
    examples = {
        OFF: [{"enabled": False}, {}],
        ALL_FALSE: [{"number_checkpoints": None, "profile": False}],
    }
    partial = [("pipeline", {}), ("pipeline", {"stages": "auto", "seed_layers": False})]
    return partial + [
        (row.key, example)
        for row in FOREIGN
        for value in (*row.nothing_at, None, "auto")
        for example in (examples[value] if value in (OFF, ALL_FALSE) else [value])
    ]


def test_a_key_that_changes_nothing_at_its_value_is_accepted_in_silence() -> None:
    plain = parse(MINIMAL)
    for key, value in harmless():
        config = parse(put(MINIMAL, key, value))
        assert (config, config.notes) == (plain, plain.notes), key


def rows(kind: str) -> list[ForeignKey]:
    found = [row for row in FOREIGN if row.otherwise == kind]
    assert len(found) > 10
    return found


def test_a_hint_is_accepted_with_a_line_and_not_handed_to_deepspeed() -> None:
    plain = resolve(MINIMAL).deepspeed_dict()
    for row in rows("hint"):
        document = put(MINIMAL, row.key, "something else")
        assert row.reason in "".join(parse(document).notes), row.key
        assert row.key in "".join(parse(document).notes)
        assert resolve(document).deepspeed_dict() == plain, row.key


def test_a_key_that_would_be_ignored_and_matters_is_refused_with_the_remedy() -> None:
    for row in rows("refused"):
        document = put(MINIMAL, row.key, {"enabled": True})
        if row.path[0] == "aio":  # without NVMe nothing reads the section
            document = put(document, "zero_optimization.offload_optimizer", NVME)
        assert errors_of(document) == [f"x.json: {row.key}: {row.reason}"]


@pytest.mark.parametrize(
    ("key", "value", "becomes", "result"),
    [
        ("steps_per_print", 1e5, "megagpt.monitor.log_interval_steps", 100_000),
        ("bfloat16", {"enabled": True}, "bf16", {"enabled": True}),
        ("zero_optimization", True, "zero_optimization", {"stage": 1}),
        ("zero_optimization.max_live_parameters", 0, "stage3_max_live_parameters", 0),
        ("zero_optimization.cpu_offload_param", True, "offload_param", {"device": "cpu"}),
        ("optimizer.params.max_grad_norm", 0.5, "gradient_clipping", 0.5),
        ("optimizer.type", "adamw", "optimizer.type", "AdamW"),
    ],
)
def test_another_spelling_acts(key: str, value: object, becomes: str, result: object) -> None:
    base = put(MINIMAL, "bf16", None)
    section = "zero_optimization." if becomes.startswith(("stage3", "offload")) else ""
    written = parse(put(base, key, value)).as_written()
    assert written == parse(put(base, section + becomes, result)).as_written()


def test_cpu_offload_is_an_offload_section() -> None:
    base = put(MINIMAL, "zero_optimization", {"stage": 2})
    config = parse(put(base, "zero_optimization.cpu_offload", True))
    assert config.zero_optimization.optimizer_device == "cpu"
    both = put(MINIMAL, "zero_optimization.cpu_offload", True)  # has an offload section too
    assert parse(both) == parse(MINIMAL)
    nvme = put(both, "zero_optimization.offload_optimizer", NVME)
    (line,) = errors_of(nvme)
    assert line.startswith("x.json: zero_optimization.cpu_offload: given with zero_optimization.")


def test_steps_per_print_yields_to_the_trainers_own_key() -> None:
    own = put(MINIMAL, "megagpt.monitor.log_interval_steps", 7)
    config = parse(put(own, "steps_per_print", 2000))
    assert config.megagpt.monitor.log_interval_steps == 7
    assert "steps_per_print" not in config.deepspeed_dict()
    assert any(
        line.startswith("steps_per_print")
        for line in parse(put(MINIMAL, "steps_per_print", 5)).notes
    )
    for value in ("often", True, 2.5, [1]):
        (line,) = errors_of(put(MINIMAL, "steps_per_print", value))
        assert line.startswith("x.json: steps_per_print: expected an integer")


@pytest.mark.parametrize(
    ("changes", "idle", "reason"),
    [
        (
            {"zero_optimization.allgather_bucket_size": 1000},
            "zero_optimization.allgather_bucket_size",
            "no effect at ZeRO 3",
        ),
        (
            {"zero_optimization": {"stage": 0, "reduce_bucket_size": 5e8}},
            "zero_optimization.reduce_bucket_size",
            "no effect at ZeRO 0",
        ),
        (
            {"zero_optimization.offload_optimizer.buffer_count": 4},
            "zero_optimization.offload_optimizer.buffer_count",
            'no effect with device "cpu"',
        ),
        ({"aio": {"queue_depth": 4, "thread_count": 2}}, "aio", "no effect without offload"),
        ({"aio": {"thread_count": 2}}, "aio", "no effect without offload"),
        (
            {
                "zero_optimization": {"stage": 3, "offload_param": NVME},
                "zero_optimization.stage3_prefetch_bucket_size": 5e7,
            },
            "zero_optimization.stage3_prefetch_bucket_size",
            "is read when its module needs it",
        ),
    ],
)
def test_what_tunes_something_absent_is_said_and_not_handed_to_deepspeed(
    changes: dict[str, object], idle: str, reason: str
) -> None:
    document = MINIMAL
    for key, value in changes.items():
        document = put(document, key, value)
    (line,) = [line for line in parse(document).notes if line.startswith(idle)]
    assert reason in line
    assert idle.rsplit(".", 1)[-1] not in json.dumps(resolve(document).deepspeed_dict())
    wrong = "many"  # the value is checked all the same
    leaf = f"{idle}.queue_depth" if idle == "aio" else idle
    assert any(leaf in line for line in errors_of(put(document, leaf, wrong)))


OPTIONAL = [
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "communication_data_type",
    "optimizer.params.betas",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_num_steps",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.offload_optimizer.pin_memory",
    "megagpt.model.num_kv_heads",
    "megagpt.checkpoint.keep",
]


@pytest.mark.parametrize("key", OPTIONAL)
def test_auto_of_an_optional_key_is_absent(key: str) -> None:
    absent = put(MINIMAL, key, None)
    here = absent
    *parents, last = key.split(".")
    for name in parents:
        here = here[name]
    del here[last]
    assert parse(put(MINIMAL, key, "auto")) == parse(absent)


def test_auto_where_it_is_a_value_or_a_name() -> None:
    config = resolve(put(MINIMAL, "scheduler.params.total_num_steps", "auto"))
    assert config.deepspeed_dict()["scheduler"]["params"]["total_num_steps"] == 100
    named = parse(put(MINIMAL, "megagpt.data.path", "auto"))
    assert named.megagpt.data.path == "auto"  # not the embedded corpus


@pytest.mark.parametrize("key", ["optimizer.params.lr", "optimizer.type"])
def test_auto_of_a_required_key_has_the_line_to_write(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(put(MINIMAL, key, "auto")))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (line,) = caught.value.errors
    assert f'{key}: "auto" is decided by other programs, not here; write "' in line
    load_config(path, line.split(" --set ")[1].split())


@pytest.mark.parametrize("key", TO_PASTE)
def test_what_is_missing_is_asked_for_with_lines_that_work(tmp_path: Path, key: str) -> None:
    document = put(MINIMAL, "scheduler", None)
    *parents, last = key.split(".")
    here = document
    for name in parents:
        here = here[name]
    del here[last]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (line,) = caught.value.errors
    assert line.startswith(f"{path}: {key}: required key is missing")
    load_config(path, line.split(" --set ")[1].split())
    fragment = json.loads("{" + line.split("; write ")[1].split(", or --set")[0] + "}")
    here |= fragment
    path.write_text(json.dumps(document))
    load_config(path)


def test_a_deepspeed_file_without_our_object_says_so_in_one_line() -> None:
    document = {key: value for key, value in MINIMAL.items() if key != "megagpt"}
    (line,) = errors_of(document | {"steps_per_print": 10, "wall_clock_breakdown": False})
    assert line.startswith("x.json: megagpt: required key is missing (everything that DeepSpeed")
    assert '"megagpt": {"model": {"preset": "gpt2-124m"}' in line


@pytest.mark.parametrize("mark", ["_comment", "_comment_2", "__comment__", "//", "# why"])
def test_comments_are_no_keys(mark: str) -> None:
    document = put(MINIMAL, "megagpt.model", MINIMAL["megagpt"]["model"] | {mark: ["any", 1]})
    assert parse(document | {mark: {"enabled": True}}) == parse(MINIMAL)


def test_another_underscore_is_no_comment() -> None:
    assert errors_of(MINIMAL | {"_read_the_docs": "there"}) == [
        "x.json: _read_the_docs: unknown key; a comment begins with _comment, // or #"
    ]


def test_a_section_of_null_is_absent_and_a_number_of_null_is_not() -> None:
    assert parse(MINIMAL | {"fp16": None, "aio": None}) == parse(MINIMAL)
    assert errors_of(MINIMAL | {"gradient_clipping": None}) == [
        "x.json: gradient_clipping: expected a number, got null; write one, or remove the key"
    ]


def test_clipping_by_default_is_said() -> None:
    (line,) = parse(MINIMAL).notes
    assert line.startswith(
        "gradient_clipping: not given, so gradients are clipped at a norm of 1.0"
    )
    for value in (0, 1.0):
        assert parse(put(MINIMAL, "gradient_clipping", value)).notes == ()


ROW_11 = {
    "megagpt.model.block_size": "sequence_length",
    "megagpt.model.n_embd": "hidden_size",
    "megagpt.model.n_layer": "num_layers",
    "megagpt.model.n_head": "num_heads",
    "megagpt.model.d_model": "hidden_size",
    "megagpt.model.max_position_embeddings": "sequence_length",
    "learning_rate": "optimizer.params.lr",
    "max_iters": "megagpt.training.total_steps",
    "save_interval": "megagpt.checkpoint.interval_steps",
    "gradient_checkpointing": "megagpt.training.recompute",
    "megagpt.parallel.tp": "tensor",
    "megagpt.parallel.pp": "pipeline",
}


@pytest.mark.parametrize(("typed", "meant"), ROW_11.items())
def test_other_trainers_names_get_the_right_suggestion(typed: str, meant: str) -> None:
    assert errors_of(put(MINIMAL, typed, 1)) == [
        f'x.json: {typed}: unknown key, did you mean "{meant}"?'
    ]


def test_names_without_a_key_here_say_why() -> None:
    for typed, why in WITHOUT_A_KEY.items():
        (line,) = errors_of(put(MINIMAL, f"megagpt.model.{typed}", 1))
        assert line == f"x.json: megagpt.model.{typed}: unknown key: {why}"


def test_synonyms_name_keys_and_presets_that_exist() -> None:
    keys = set(all_keys(RunConfig))
    assert set(SYNONYMS.values()) <= keys
    assert set(PRESET_SYNONYMS.values()) <= set(PRESETS)
    assert not {name for name in WITHOUT_A_KEY if f"megagpt.model.{name}" in keys}
    (line,) = errors_of(put(MINIMAL, "megagpt.model.preset", "openai-community/gpt2-xl"))
    assert line.endswith('did you mean "gpt2-xl"?')


def test_names_of_other_trainers_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(MINIMAL))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "x.json", ["parallel.tp=2", "max_iters=5", "model.n_layer=2"])
    assert caught.value.errors == [
        '--set: parallel.tp: unknown key, did you mean "megagpt.parallel.tensor"?',
        '--set: max_iters: unknown key, did you mean "megagpt.training.total_steps"?',
        '--set: model.n_layer: unknown key, did you mean "megagpt.model.num_layers"?',
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.params.lr", "1e-3", 'expected a number, got "1e-3"; write 1e-3 without quotes'),
        ("train_batch_size", "8", 'expected an integer, got "8"; write 8 without quotes'),
        ("zero_optimization.stage", "2", 'expected an integer, got "2"; write 2 without quotes'),
        (
            "zero_optimization.reduce_bucket_size",
            "5e8",
            'expected an integer, got "5e8"; write 500000000 without quotes',
        ),
        ("fp16.enabled", "true", 'expected true or false, got "true"; write true without quotes'),
        ("train_batch_size", "many", 'expected an integer, got "many"'),
    ],
)
def test_a_number_in_quotes(key: str, value: str, said: str) -> None:
    assert errors_of(put(MINIMAL, key, value)) == [f"x.json: {key}: {said}"]


def test_several_kinds_of_errors_come_at_once() -> None:
    """A check of several keys does not wait for other keys to be right."""
    document = MINIMAL
    for key, value in {
        "nonsense": 1,
        "train_batch_size": "many",
        "zero_optimization.zero_quantized_weights": True,
        "fp16.enabled": True,
        "bf16.enabled": True,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}},
        "megagpt.model.num_heads": 5,
        "megagpt.checkpoint.milestone_interval_steps": 600,
        "megagpt.training": {"sample_interval_steps": 5, "eval_batches": 8},
        "zero_optimization.offload_optimizer": {"device": "nvme"},
    }.items():
        document = put(document, key, value)
    assert sorted(line.split(": ")[1] for line in errors_of(document)) == sorted(
        [
            "nonsense",
            "train_batch_size",
            "zero_optimization.zero_quantized_weights",
            "fp16.enabled",
            "scheduler.params.warmup_max_lr",
            "megagpt.model.num_heads",
            "megagpt.checkpoint.milestone_interval_steps",
            "megagpt.training.total_steps",
            "megagpt.training.sample_prompts",
            "zero_optimization.offload_optimizer.nvme_path",
        ]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"megagpt.model.hidden_size": "wide", "megagpt.model.num_heads": 7},
        {"megagpt.model.num_heads": "many", "megagpt.model.num_kv_heads": 2},
        {
            "optimizer.params.lr": "auto",
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}},
        },
        {"optimizer": {}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}}},
        {"megagpt.training.sample_interval_steps": "x", "megagpt.training.sample_prompts": ["a"]},
        {"megagpt": {}},
        {"scheduler": {"type": "Cosine", "params": {}}},
        {"megagpt.data.path": [{"path": "a", "weight": "x"}, {"path": 3}]},
    ],
)
def test_stand_ins_are_never_blamed(changes: dict[str, object]) -> None:
    """What is reported is wrong in the file itself: no line but for a key that was changed."""
    document = MINIMAL
    for key, value in changes.items():
        document = put(document, key, value)
    for line in errors_of(document):
        assert line.split(": ")[1].startswith(tuple(changes)), line
        assert "num_kv_heads" not in line
        assert "warmup_max_lr" not in line
        assert "sample_prompts" not in line
