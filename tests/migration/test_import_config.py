"""Configurations of other trainers become ours: what each key becomes, and what is refused.

The values of gpt-neox's files are those of configs/20B.yml, 125M.yml and llama/7B.yml of its
repository; nanoGPT's those of config/train_gpt2.py and train_shakespeare_char.py.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from launch import import_config as command
from megagpt.cluster.hosts import Host
from megagpt.config import ConfigError, RunConfig, load_config
from megagpt.migration.configuration.importing import ImportedConfig, import_config
from megagpt.migration.configuration.megatron_family import NAMES
from megagpt.migration.configuration.nanogpt import RENAMED
from megagpt.planning.cost.accelerators import find
from megagpt.planning.plan import Limits, assume, make_plan
from megagpt.schema.errors import all_keys
from megagpt.schema.synonyms import SYNONYMS
from megagpt.utils import UserError
from tests import REPOSITORY

PUBLISHED = sorted((REPOSITORY / "tests" / "fixtures" / "deepspeed_files").glob("*.json"))
# What a DeepSpeed file leaves to its script, as the messages ask for it.
OF_THE_SCRIPT = (
    "megagpt.model.preset=gpt2-124m",
    "megagpt.training.total_steps=2000",
    "optimizer.type=AdamW",
    "optimizer.params.lr=0.001",
)


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def kinds(made: ImportedConfig) -> dict[str, str]:
    return {verdict.key: verdict.kind for verdict in made.verdicts}


def texts(made: ImportedConfig) -> dict[str, str]:
    return {verdict.key: verdict.text for verdict in made.verdicts}


def config_of(made: ImportedConfig) -> RunConfig:
    return RunConfig.from_json(made.text)


def planned(made: ImportedConfig, directory: Path, ranks: int) -> None:
    """The file is one that launch/plan.py takes, as it takes any other."""
    path = write(directory, "ours.json", made.text)
    device = find("h100")
    assert device is not None
    limits = Limits(device_gib=2000.0, host_gib=100_000.0, reserve_gib=1.0)
    plan = make_plan(str(path), (), [Host("a", ranks)], limits, assume(device, ranks))
    assert plan.refusals == []
    assert load_config(path).to_json() == config_of(made).to_json()


# -------------------------------------------------------------------------------------- DeepSpeed

# Published files with what no --set of ours can mend, and why.
NOT_OURS = {
    "dstest_ds_config_func_bs8_no_zero": "16-bit weights at ZeRO 0",
    "trlx_stage2": "parameter offload below ZeRO 3",
}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_every_key_of_a_published_deepspeed_file_has_a_verdict(path: Path, tmp_path: Path) -> None:
    document = json.loads(path.read_text())
    del document["megagpt"]
    file = write(tmp_path, "ds.json", json.dumps(document))
    optimizer = document.get("optimizer", {}).get("params", {}).get("lr", "auto")
    items = list(OF_THE_SCRIPT[: 4 if optimizer == "auto" else 2])
    if not isinstance(document.get("train_micro_batch_size_per_gpu"), int):
        items.append("train_micro_batch_size_per_gpu=1")
    batch = ("train_batch_size", "gradient_accumulation_steps")
    items += [f"{key}=null" for key in batch if key in document]
    if path.stem in NOT_OURS:
        with pytest.raises(ConfigError, match=NOT_OURS[path.stem]):
            import_config([file], [], items)
        return
    made = import_config([file], [], items)
    named = kinds(made)
    for leaf in leaves(document):
        assert any(leaf == key or leaf.startswith(f"{key}.") for key in named), leaf
    planned(made, tmp_path, 1)


def leaves(section: dict, prefix: str = "") -> list[str]:
    found = []
    for name, value in section.items():
        inner = isinstance(value, dict) and value
        found += leaves(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


def test_deepspeeds_keys_fall_into_the_classes_of_the_table(tmp_path: Path) -> None:
    document = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 20,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "bfloat16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "allgather_partitions": True, "cpu_offload": True},
        "sparse_gradients": True,
        "n_layer": 3,
        "_comment": "mine",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
    }
    file = write(tmp_path, "ds.json", json.dumps(document))
    made = import_config([file], [], OF_THE_SCRIPT)
    assert kinds(made) == {
        "train_micro_batch_size_per_gpu": "taken",
        "steps_per_print": "taken",
        "wall_clock_breakdown": "changes nothing",
        "zero_allow_untested_optimizer": "changes nothing",
        "bfloat16": "taken",
        "zero_optimization.stage": "taken",
        "zero_optimization.allgather_partitions": "changes nothing",
        "zero_optimization.cpu_offload": "taken",
        "sparse_gradients": "dropped",
        "n_layer": "dropped",
        "_comment": "changes nothing",
        "gradient_clipping": "changes nothing",
        "fp16.enabled": "taken",
        "optimizer.type": "taken",
        "optimizer.params.lr": "changes nothing",
        "optimizer.params.betas": "taken",
    }
    config = config_of(made)
    assert config.bf16.enabled == config.fp16.enabled == "auto"
    assert config.zero_optimization.optimizer_device == "cpu"
    assert config.megagpt.monitor.log_interval_steps == 20


def test_what_a_deepspeed_file_leaves_open_must_be_given(tmp_path: Path) -> None:
    file = write(tmp_path, "ds.json", '{"train_batch_size": 8, "optimizer": {"type": "Lion"}}')
    with pytest.raises(ConfigError) as error:
        import_config([file], [], ())
    assert all(line.startswith(f"{file}: ") for line in error.value.errors)
    message = str(error.value)
    assert "megagpt.model.preset=gpt2-124m megagpt.training.total_steps=1000" in message
    assert 'expected one of "Adam", "AdamW"; got "Lion"' in message


# ----------------------------------------------------------------------------------------- gpt-neox

NEOX_20B = """\
# gpt-neox writes braces, hyphens, True and commas before a brace
{
  "vocab-file": "./20B_checkpoints/20B_tokenizer.json",
  "save": "./20B_checkpoints",
  "data-path": "./data/pile_20B_tokenizer/pile_20B_tokenizer_text_document",
  "pipe-parallel-size": 4, "model-parallel-size": 2,
  "num-layers": 44, "hidden-size": 6144, "num-attention-heads": 64,
  "seq-length": 2048, "max-position-embeddings": 2048,
  "norm": "layernorm", "pos-emb": "rotary", "rotary_pct": 0.25,
  "no-weight-tying": true, "gpt_j_residual": true, "output_layer_parallelism": "column",
  "scaled-upper-triang-masked-softmax-fusion": true, "bias-gelu-fusion": true,
  "init_method": "small_init", "output_layer_init_method": "wang_init",
  "optimizer": {"type": "Adam", "params": {"lr": 0.97e-4, "betas": [0.9, 0.95], "eps": 1e-8, }},
  "min_lr": 0.97e-5,
  "zero_optimization": {"stage": 1, "allgather_partitions": True, "overlap_comm": True,
    "reduce_bucket_size": 1260000000, "contiguous_gradients": True, },
  "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 32,
  "data-impl": "mmap", "split": "995,4,1",
  "checkpoint-activations": true, "checkpoint-num-layers": 1, "partition-activations": false,
  "gradient_clipping": 1.0, "weight-decay": 0.01, "hidden-dropout": 0, "attention-dropout": 0,
  "fp16": {"fp16": true, "enabled": true, "loss_scale": 0, "initial_scale_power": 12},
  "train-iters": 150000, "lr-decay-iters": 150000,
  "distributed-backend": "nccl", "lr-decay-style": "cosine", "warmup": 0.01,
  "save-interval": 500, "eval-interval": 1000, "eval-iters": 10,
  "log-interval": 2, "steps_per_print": 2, "wall_clock_breakdown": false,
  "tokenizer_type": "HFTokenizer", "tensorboard-dir": "./tensorboard",
}
"""


def test_gpt_neox_20b_is_the_model_that_was_trained(tmp_path: Path) -> None:
    file = write(tmp_path, "20B.yml", NEOX_20B)
    made = import_config([file], [], ["megagpt.model.vocabulary=50277"])
    config = config_of(made)
    model = config.megagpt.model
    assert (model.num_layers, model.hidden_size, model.num_heads) == (44, 6144, 64)
    assert (model.position, model.rope_fraction, model.parallel_residual) == ("rotary", 0.25, True)
    assert (model.activation, model.tie_embeddings, model.dropout) == ("gelu", False, 0.0)
    assert model.init_std == pytest.approx(math.sqrt(2 / (5 * 6144)), abs=1e-6)
    assert config.optimizer.type == "AdamW"
    assert config.optimizer.params.model_dump() == {
        "lr": 0.97e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01,
        "adam_w_mode": True, "torch_adam": False,
    }  # fmt: skip
    assert config.scheduler is not None
    assert config.scheduler.params.model_dump() == {
        "warmup_num_steps": 1500, "warmup_type": "linear", "total_num_steps": 150_000,
        "warmup_min_ratio": 0.0, "cos_min_ratio": pytest.approx(0.1),
    }  # fmt: skip
    parallel = config.megagpt.parallel
    assert (parallel.pipeline, parallel.tensor) == (4, 2)
    assert config.megagpt.training.recompute == "full"
    assert config.megagpt.data.validation_fraction == 0.005
    assert config.fp16.initial_scale_power == 12
    assert set(kinds(made).values()) == {"taken", "changes nothing", "dropped"}
    assert texts(made)["vocab_file"].startswith("a tokenizer is a directory with tokenizer.json")
    planned(made, tmp_path, 96)


def test_defaults_of_gpt_neox_are_written_out(tmp_path: Path) -> None:
    """What its files leave out is its own default there, not ours."""
    text = "num-layers: 2\nhidden-size: 64\nnum-attention-heads: 4\nseq-length: 128\n"
    text += "train-iters: 200\ntrain_micro_batch_size_per_gpu: 2\ndata-path: d/text_document\n"
    text += "optimizer: {type: adam, params: {lr: 6e-4}}\nfp16: {enabled: true}\n"
    made = import_config([write(tmp_path, "small.yml", text)], [], ["megagpt.model.vocabulary=99"])
    config = config_of(made)
    assert config.megagpt.model.dropout == 0.1
    assert config.megagpt.model.activation == "gelu_exact"
    assert config.optimizer.params.weight_decay == 0.01
    assert config.scheduler is not None
    assert config.scheduler.type == "WarmupDecayLR"
    assert config.scheduler.params.warmup_num_steps == 2
    assert config.megagpt.data.validation_fraction == 0.031
    assert config.megagpt.training.seed == config.megagpt.data.seed == 1234
    assert config.zero_optimization.stage == 1  # 16-bit weights need it here
    planned(made, tmp_path, 1)


def test_llama_of_gpt_neox_in_two_files(tmp_path: Path) -> None:
    model = """{"num-layers": 32, "hidden-size": 4096, "num-attention-heads": 32,
      "seq-length": 2048, "max-position-embeddings": 2048, "pos-emb": "rotary", "rotary-pct": 1,
      "no-weight-tying": true, "norm": "rmsnorm", "rms_norm_epsilon": 1.0e-6,
      "use_bias_in_norms": false, "use_bias_in_attn_linear": false, "mlp_type": "llama",
      "activation": "silu", "make_vocab_size_divisible_by": 1}"""
    run = """{"train-iters": 100, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": true},
      "precision": "bfloat16", "hidden-dropout": 0, "attention-dropout": 0,
      "optimizer": {"type": "Adam", "params": {"lr": 0.0003}}, "lr-decay-style": "constant",
      "train-data-paths": ["a/one", "b/two"], "train-data-weights": [1., 2.],
      "valid-data-paths": ["c/held_out"], "test-data-paths": ["d/test"],
      "vocab-file": "llama/tokenizer.json"}"""
    files = [write(tmp_path, "7B.yml", model), write(tmp_path, "run.yml", run)]
    config = config_of(import_config(files, [], ()))
    model_config = config.megagpt.model
    assert (model_config.activation, model_config.mlp_size) == ("swiglu", 11008)
    assert (model_config.norm, model_config.norm_epsilon) == ("rmsnorm", 1e-6)
    biases = [getattr(model_config, name) for name in ("qkv_bias", "output_bias", "mlp_bias")]
    assert biases == [False] * 3
    assert [source.weight for source in config.megagpt.data.sources] == [1.0, 2.0]
    assert config.megagpt.data.tokenizer == "llama"
    assert config.megagpt.data.validation == {"valid": "c/held_out"}
    assert config.megagpt.data.validation_fraction == 0


NEOX_BAD = {
    "another program's": (
        "compute_environment: LOCAL\nnum_machines: 1\n",
        "not a configuration of",
    ),
    "a list": ("- 1\n- 2\n", "holds no keys"),
    "no YAML": ("a: [1, 2\nb: }", "a.yml:2: not YAML that can be read"),
    "an object of Python": (
        "num-layers: !!python/object/apply:os.system ['touch RAN']\n",
        "a.yml:1: not YAML that can be read",
    ),
    "other positions": ("num-layers: 2\npos-emb: alibi\n", "position: must be given: pos_emb"),
    "two dropouts": ("num-layers: 2\nhidden-dropout: 0.2\n", "dropout: must be given"),
    "another optimizer": ("num-layers: 2\noptimizer: {type: sm3}\n", "optimizer.type: must be"),
}


@pytest.mark.parametrize("what", NEOX_BAD)
def test_a_yaml_that_is_not_gpt_neoxs_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = NEOX_BAD[what]
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.yml", text)
    with pytest.raises(UserError, match=message) as error:
        import_config([Path("a.yml")], [], ())
    assert all(line.startswith("a.yml") for line in str(error.value).splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["a.yml"]


def test_a_given_key_answers_what_has_no_equal(tmp_path: Path) -> None:
    text = "num-layers: 2\nhidden-size: 64\nnum-attention-heads: 4\nseq-length: 128\n"
    text += "pos-emb: alibi\ntrain-iters: 9\ntrain_micro_batch_size_per_gpu: 1\ndata-path: d\n"
    text += "hidden-dropout: 0\nattention-dropout: 0\noptimizer: {params: {lr: 0.1}}\n"
    file = write(tmp_path, "a.yml", text)
    made = import_config([file], [], ["megagpt.model.position=rotary"])
    assert config_of(made).megagpt.model.position == "rotary"


# ------------------------------------------------------------------------------------------ nanoGPT

TRAIN_GPT2 = """\
# config for training GPT-2 (124M) down to very nice loss of ~2.85 on 1 node of 8X A100 40GB
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = max_iters
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
"""


def test_nanogpts_gpt2_is_its_124_million(tmp_path: Path) -> None:
    file = write(tmp_path, "config/train_gpt2.py", TRAIN_GPT2)
    made = import_config([file], [], ())
    config = config_of(made)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (480, 12)
    assert config.optimizer.params.betas == (0.9, 0.95)
    assert config.gradient_clipping == 1.0
    assert config.scheduler is not None
    assert config.scheduler.params.model_dump() == {
        "warmup_num_steps": 2000, "warmup_type": "linear", "total_num_steps": 600_000,
        "warmup_min_ratio": 0.0, "cos_min_ratio": pytest.approx(0.1),
    }  # fmt: skip
    assert config.megagpt.training.eval_batches == 5  # 200 batches of 12 are 5 of 480
    assert config.megagpt.data.path == str(tmp_path / "data" / "openwebtext")
    assert config.wandb.enabled
    assert config.wandb.project == "owt"
    resolved = config.resolved(world_size=8, vocabulary=50304, bf16_native=True)
    width, layers, rows = 768, 12, 50304
    # model.py: two tables, per block two weights of norms, 4 + 8 squares of the width, a last norm
    parameters = (rows + 1024) * width + layers * (12 * width**2 + 2 * width) + width
    assert resolved.megagpt.model.vocab_size == rows
    assert resolved.megagpt.model.num_parameters == parameters == 124_373_760
    assert resolved.megagpt.model.activation == "gelu_exact"
    planned(made, tmp_path, 8)


def test_arguments_override_a_file_and_stand_alone(tmp_path: Path) -> None:
    file = write(tmp_path, "config/a.py", "n_layer = 6\nbatch_size = 64\n")
    words = [
        "--n_layer=4",
        "--device=cpu",
        "--compile=False",
        "--dtype=float32",
        "--decay_lr=False",
    ]
    config = config_of(import_config([file], words, ()))
    assert config.megagpt.model.num_layers == 4
    assert config.train_micro_batch_size_per_gpu == 64
    assert config.scheduler is None
    assert config.zero_optimization.stage == 0
    alone = config_of(import_config([], ["--n_layer=4", "--n_head=4", "--n_embd=64"], ()))
    assert alone.megagpt.model.hidden_size == 64


def test_characters_need_their_number(tmp_path: Path) -> None:
    """Which is in a pickle, and no pickle is opened."""
    file = write(tmp_path, "config/char.py", "dataset = 'shakespeare'\ndropout = 0.2\n")
    write(tmp_path, "data/shakespeare/meta.pkl", "cos\nsystem\n(S'touch RAN'\ntR.")
    with pytest.raises(ConfigError, match=r"megagpt\.model\.vocabulary: must be given"):
        import_config([file], [], ())
    config = config_of(import_config([file], [], ["megagpt.model.vocabulary=65"]))
    assert config.megagpt.model.vocabulary == 65
    assert config.megagpt.model.dropout == 0.2


def test_what_would_be_run_is_not_run(tmp_path: Path) -> None:
    touched = tmp_path / "RAN"
    value = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    named = write(tmp_path, "c/a.py", f"n_layer = 2\nwandb_run_name = {value}\n")
    assert kinds(import_config([named], [], ()))["wandb_run_name"] == "changes nothing"
    matters = write(tmp_path, "c/b.py", f"n_layer = {value}\n")
    with pytest.raises(UserError, match=r"b\.py:1: n_layer is .* which is not run"):
        import_config([matters], [], ())
    assert config_of(import_config([matters], ["--n_layer=3"], ())).megagpt.model.num_layers == 3
    for text in (f"n_layer = 2\n{value}\n", "n_layer = 2\nfor i in (): pass\n"):
        with pytest.raises(UserError, match=r"c\.py:2: \w+ is not a plain assignment"):
            import_config([write(tmp_path, "c/c.py", text)], [], ())
    assert not touched.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 'x'\n", r"not a configuration of nanoGPT \(found model"),
        ("n_layer = = 2\n", r"a\.py:1: not Python"),
        ("", "found nothing"),
        ("n_layer = 2 / 0\n", "which is not run"),
    ],
)
def test_a_file_that_is_not_nanogpts_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_config([write(tmp_path, "a.py", text)], [], ())


# ------------------------------------------------------------------------------- Megatron-DeepSpeed

MEGATRON = """--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048
 --max-position-embeddings 2048 --micro-batch-size 4 --global-batch-size 512 --lr 2.0e-4
 --min-lr 1.0e-6 --lr-decay-style cosine --lr-warmup-iters 300 --train-iters 30000
 --lr-decay-iters 30000 --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
 --init-method-std 0.013 --attention-dropout 0 --hidden-dropout 0 --tensor-model-parallel-size 2
 --pipeline-model-parallel-size 2 --fp16 --checkpoint-activations --log-interval 10
 --eval-interval 100 --eval-iters 10 --save-interval 1000 --split 949,50,1 --data-impl mmap
 --data-path 0.3 a/one 0.7 b/two --vocab-file gpt2-vocab.json --deepspeed-activation-checkpointing
 """


def test_megatron_deepspeeds_arguments_come_with_its_json(tmp_path: Path) -> None:
    file = write(
        tmp_path, "ds.json", '{"zero_optimization": {"stage": 1}, "fp16": {"enabled": true}}'
    )
    made = import_config([file], MEGATRON.split(), ["megagpt.model.vocabulary=50257"])
    config = config_of(made)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (512, 4)
    assert (config.megagpt.parallel.tensor, config.megagpt.parallel.pipeline) == (2, 2)
    assert config.megagpt.model.init_std == 0.013
    assert config.megagpt.model.activation == "gelu"
    assert config.optimizer.params.betas == (0.9, 0.95)
    assert config.scheduler is not None
    assert config.scheduler.params.model_dump()["cos_min_ratio"] == pytest.approx(0.005)
    assert [source.path for source in config.megagpt.data.sources] == ["a/one", "b/two"]
    assert config.megagpt.data.validation_fraction == pytest.approx(0.051)
    assert kinds(made)["vocab_file"] == "dropped"
    planned(made, tmp_path, 8)


# ------------------------------------------------------------------------------------------ command


def run_command(*words: str) -> None:
    with patch.object(sys, "argv", ["launch/import_config.py", *words]):
        command.main()


def test_the_command_writes_a_file_and_says_what_became_of_each_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "config/train_gpt2.py", TRAIN_GPT2)
    output = tmp_path / "ours.json"
    run_command(str(file), "--output", str(output), "--", "--n_layer=2")
    said = capsys.readouterr()
    assert said.out == ""
    assert "n_layer 2: taken as megagpt.model.num_layers\n" in said.err
    assert 'wandb_run_name "gpt2-124M": changes nothing: ' in said.err
    assert f"next: python launch/plan.py --deepspeed_config {output} --ranks N" in said.err
    with pytest.raises(UserError, match="exists already"):
        run_command(str(file), "--output", str(output))
    run_command(str(file), "--", "--n_layer=2")
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text())


def test_no_file_at_all_says_which_there_are() -> None:
    with pytest.raises(UserError, match="no file is named; need one DeepSpeed"):
        run_command()


def test_nothing_is_written_for_a_bad_file(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "n_layer = 2")
    with pytest.raises(UserError, match="need one DeepSpeed"):
        run_command(str(file), "--output", str(tmp_path / "ours.json"))
    assert not (tmp_path / "ours.json").exists()


# --------------------------------------------------------------------------------------------- docs

PAGE = (REPOSITORY / "docs" / "migration.md").read_text()


@pytest.mark.parametrize("section", re.findall(r"^## (From .*)$", PAGE, re.MULTILINE))
def test_the_page_names_keys_that_there_are(section: str) -> None:
    """Every key of ours in its tables is one, and stands beside that of theirs if we know it."""
    table = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    rows = [row.split("|") for row in table.splitlines() if row.startswith("| `")]
    assert len(rows) > 8
    known = set(all_keys(RunConfig))
    for _, theirs, ours, _ in rows:
        named = re.findall(r"`([\w.]+)`", ours)
        assert [key for key in named if key not in known] == [] or "--" in ours
        for key in re.findall(r"`-{0,2}([\w-]+)`", theirs):
            name = key.replace("-", "_")
            meant = {**SYNONYMS, **NAMES, **(RENAMED if "nanoGPT" in section else {})}.get(name)
            if name in ("gradient_accumulation_steps", "batch_size") or meant is None:
                continue
            assert meant in named, f"{section}: {key} is {meant}"
