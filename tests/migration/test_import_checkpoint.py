"""Checkpoints of other trainers become the start of a run, and compute what they computed.

`tests/fixtures/deepspeed_checkpoints` was written by DeepSpeed and its own tool; its logits are
those of transformers. No installable program writes gpt-neox's and Megatron-DeepSpeed's files, so
those are made here by hand, after the rules of gpt-neox's tools/ckpts/convert_neox_to_hf.py and of
Megatron's column- and row-parallel layers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launch import evaluate as evaluate_command
from launch import import_checkpoint as command
from megagpt.checkpoint.reader import open_checkpoint
from megagpt.config import RunConfig
from megagpt.huggingface.importing import resolved_for_import
from megagpt.inference.stored_model import load_model, open_weights
from megagpt.migration.checkpoint.importing import import_checkpoint
from megagpt.migration.checkpoint.megatron_names import canonical, merge
from megagpt.migration.checkpoint.sources import open_source
from megagpt.utils import UserError
from tests import REPOSITORY
from tests.data.token_files import write_nanogpt

WRITTEN = REPOSITORY / "tests" / "fixtures" / "deepspeed_checkpoints"
REFERENCE = load_file(WRITTEN / "logits.safetensors")
NEOX = {
    "num_layers": 2, "hidden_size": 16, "num_heads": 2, "sequence_length": 32,
    "position": "rotary", "rope_fraction": 0.5, "activation": "gelu_exact",
    "parallel_residual": True, "tie_embeddings": False, "vocabulary": 64,
}  # fmt: skip


def config(directory: Path, **model: Any) -> RunConfig:
    data = write_nanogpt(directory / "data" / "train.bin", [number % 64 for number in range(200)])
    return RunConfig.model_validate(
        {
            "train_batch_size": 2,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
            "megagpt": {
                "model": {**NEOX, **model},
                "data": {"path": str(data), "validation_fraction": 0.3},
                "training": {"total_steps": 4},
            },
        }
    )


def neox_weights() -> dict[str, Tensor]:
    """The fp32 weights of the reference, by transformers' names."""
    return {
        name: tensors[0] for name, tensors in open_source(WRITTEN / "universal").tensors.items()
    }


def logits(run: Path) -> Tensor:
    model, _, step = load_model(run)
    assert step == 0
    with torch.no_grad():
        return model(REFERENCE["ids"])[..., :64]


def test_a_universal_checkpoint_of_deepspeeds_own_tool_computes_the_same(tmp_path: Path) -> None:
    made = import_checkpoint(WRITTEN / "universal", config(tmp_path), tmp_path / "run")
    assert made.description.endswith("with the names of GPTNeoXForCausalLM")
    torch.testing.assert_close(logits(tmp_path / "run"), REFERENCE["logits"], rtol=1e-5, atol=1e-5)


def test_the_engines_own_file_has_the_weights_in_16_bit(tmp_path: Path) -> None:
    import_checkpoint(WRITTEN / "engine", config(tmp_path), tmp_path / "run")
    _, weight = open_weights(tmp_path / "run")
    for ours, theirs in {
        "blocks.1.mlp.down.weight": "gpt_neox.layers.1.mlp.dense_4h_to_h.weight",
        "head.weight": "lm_head.weight",
    }.items():
        found = weight(ours)[:64]
        assert torch.equal(found, neox_weights()[theirs].bfloat16().float())


def test_evaluation_on_nanogpts_files_is_the_loss_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of one trainer and token files of another, through the command that people type."""
    ids = REFERENCE["ids"][1]
    written = config(tmp_path).changed(["megagpt.data.validation_fraction=null"])
    write_nanogpt(tmp_path / "data" / "val.bin", [*ids.tolist(), 5])
    import_checkpoint(WRITTEN / "universal", written, tmp_path / "run")
    words = ["launch/evaluate.py", "--run_dir", str(tmp_path / "run")]
    with patch.object(sys, "argv", words), patch.dict(os.environ):  # it describes its launch there
        evaluate_command.main()
    found = json.loads(capsys.readouterr().out)
    targets = torch.cat([ids[1:], torch.tensor([5])])
    expected = torch.nn.functional.cross_entropy(REFERENCE["logits"][1].double(), targets)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert (found["tokens"], found["bits_per_byte"]) == (32, None)


def write_moments(directory: Path, steps: int) -> Path:
    """The universal checkpoint with moments, as ds_to_universal lays them out."""
    shutil.copytree(WRITTEN / "universal", directory)
    for name, weight in neox_weights().items():
        for moment, values in (("exp_avg", weight / 3), ("exp_avg_sq", weight.square())):
            content = {"cat_dim": 0, "param": values.clone()}
            torch.save(content, directory / "zero" / name / f"{moment}.pt")
        torch.save(torch.tensor(float(steps)), directory / "zero" / name / "step.pt")
    return directory


def test_moments_of_a_universal_checkpoint_go_on_at_its_step(tmp_path: Path) -> None:
    source = write_moments(tmp_path / "universal", 7)
    with pytest.raises(UserError, match=r"for 7 steps, and the run ends at 4; --set megagpt"):
        import_checkpoint(source, config(tmp_path), tmp_path / "run")
    written = config(tmp_path).changed(
        [
            "megagpt.training.total_steps=20",
            "scheduler.type=WarmupDecayLR",
            "scheduler.params.warmup_num_steps=4",
            "scheduler.params.warmup_type=linear",
        ]
    )
    assert import_checkpoint(source, written, tmp_path / "run").step == 7
    reader = open_checkpoint(tmp_path / "run")
    state = reader.manifest.state
    assert (state.step, state.applied_steps, state.cursor) == (7, 7, 0)
    # DeepSpeed's schedules count updates from -1; the rate falls from update 4 to 20 in a line.
    assert reader.manifest.learning_rates == pytest.approx([0.001 * (20 - 6) / 16] * 2)
    theirs = neox_weights()["gpt_neox.layers.1.attention.query_key_value.weight"]
    name = "blocks.1.attention.qkv.weight"
    assert torch.equal(reader.tensor("weight", name), theirs)
    assert torch.equal(reader.tensor("exp_avg", name), theirs / 3)
    assert torch.equal(reader.tensor("exp_avg_sq", name), theirs.square())
    (source / "zero" / "lm_head.weight" / "exp_avg.pt").unlink()
    with pytest.raises(UserError, match=r"lm_head\.weight: has not all of exp_avg\.pt"):
        import_checkpoint(source, written, tmp_path / "other")


# ---------------------------------------------------------------------------------- made by hand

OF_BLOCKS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    "input_layernorm",
    "post_attention_layernorm",
)


def split(name: str, tensor: Tensor, ranks: int, *, summed_biases: bool) -> list[Tensor]:
    """What each tensor rank holds, as Megatron's layers hold it."""
    if (
        "query_key_value" in name
        or "h_to_4h" in name
        or "word_embeddings" in name
        or ("final_linear" in name)
    ):
        return list(tensor.chunk(ranks, dim=0))
    if name.endswith(("dense.weight", "4h_to_h.weight")):
        return list(tensor.chunk(ranks, dim=1))
    if summed_biases and name.endswith(("dense.bias", "4h_to_h.bias")):
        parts = [tensor * (0.25 + 0.5 * rank) for rank in range(ranks - 1)]
        return [*parts, tensor - sum(parts)] if parts else [tensor]
    return [tensor] * ranks


def padded(table: Tensor) -> Tensor:
    """Rows up to a multiple of 128, as both trainers pad a vocabulary."""
    return torch.cat([table, torch.full((128 - len(table), table.shape[1]), 9.0)])


def write_layers(directory: Path, ranks: int, *, prefix: str = "") -> Path:
    """gpt-neox's files of a pipeline: embedding 0, blocks from 2, norm L + 3, head L + 4."""
    theirs = neox_weights()
    layers: dict[int, dict[str, Tensor]] = {
        0: {"word_embeddings.weight": padded(theirs["gpt_neox.embed_in.weight"])},
        5: {f"norm.{k}": theirs[f"gpt_neox.final_layer_norm.{k}"] for k in ("weight", "bias")},
        6: {"final_linear.weight": padded(theirs["lm_head.weight"])},
    }
    for block in range(2):
        layers[block + 2] = {
            f"{module}.{kind}": theirs[f"gpt_neox.layers.{block}.{module}.{kind}"]
            for module in OF_BLOCKS
            for kind in ("weight", "bias")
        } | {"attention.rotary_emb.inv_freq": torch.ones(2)}
    directory.mkdir(parents=True)
    whole: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for number, tensors in layers.items():
        parts = {n: split(n, t, ranks, summed_biases=True) for n, t in tensors.items()}
        for rank in range(ranks):
            held = {name: tensor[rank].clone() for name, tensor in parts.items()}
            whole[rank] |= {f"sequential.{number}.{name}": tensor for name, tensor in held.items()}
            if not prefix:
                torch.save(held, directory / f"layer_{number:02}-model_{rank:02}-model_states.pt")
    for rank in range(ranks if prefix else 0):
        path = directory / f"{prefix}_{rank:02}_model_states.pt"
        torch.save({"module": whole[rank], "global_steps": 7}, path)
    return directory


@pytest.mark.parametrize("prefix", ["", "mp_rank"])
def test_gpt_neoxs_files_of_two_tensor_ranks_compute_the_same(prefix: str, tmp_path: Path) -> None:
    directory = write_layers(tmp_path / "neox" / "global_step7", 2, prefix=prefix)
    (directory.parent / "latest").write_text("global_step7")
    made = import_checkpoint(directory.parent, config(tmp_path), tmp_path / "run")
    assert made.description.endswith("with the names of gpt-neox, 2 tensor ranks")
    torch.testing.assert_close(logits(tmp_path / "run"), REFERENCE["logits"], rtol=1e-5, atol=1e-5)


GPT = {"position": "learned", "rope_fraction": 1.0, "parallel_residual": False} | {
    "activation": "swiglu", "mlp_size": 24, "num_kv_heads": 1, "tie_embeddings": True,
    "bias": False,
}  # fmt: skip


def megatron_tensors() -> dict[str, Tensor]:
    """A model of Megatron-DeepSpeed: grouped queries, a gate, no biases, learned positions."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"embedding.word_embeddings.weight": (64, 16)}
    shapes |= {"embedding.position_embeddings.weight": (32, 16)}
    for block in range(2):
        shapes |= {
            f"encoder.layers.{block}.self_attention.query_key_value.weight": (32, 16),
            f"encoder.layers.{block}.self_attention.dense.weight": (16, 16),
            f"encoder.layers.{block}.mlp.dense_h_to_4h.weight": (48, 16),
            f"encoder.layers.{block}.mlp.dense_4h_to_h.weight": (16, 24),
            f"encoder.layers.{block}.input_layernorm.weight": (16,),
            f"encoder.layers.{block}.post_attention_layernorm.weight": (16,),
        }
    shapes |= {"encoder.final_layernorm.weight": (16,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_megatrons_nested_file_keeps_groups_and_gates(tmp_path: Path) -> None:
    theirs = megatron_tensors()
    nested: dict[str, Any] = {}
    for name, tensor in theirs.items():
        *path, last = name.split(".", 1)
        nested.setdefault(path[0], {})[last] = tensor
    directory = tmp_path / "mds"
    directory.mkdir()
    torch.save(
        {"module": {"language_model": nested}, "iteration": 3},
        directory / "mp_rank_00_model_states.pt",
    )
    made = import_checkpoint(directory, config(tmp_path, **GPT), tmp_path / "run")
    assert made.description.endswith("with the names of Megatron-DeepSpeed")
    _, weight = open_weights(tmp_path / "run")
    # A group's queries, its key, its value: Megatron's order and ours.
    name = "encoder.layers.1.self_attention.query_key_value.weight"
    assert torch.equal(weight("blocks.1.attention.qkv.weight"), theirs[name])
    gate, value = theirs["encoder.layers.0.mlp.dense_h_to_4h.weight"].chunk(2)
    ours = weight("blocks.0.mlp.up.weight")
    assert torch.equal(ours[0::2], gate)
    assert torch.equal(ours[1::2], value)
    positions = weight("embedding.positions.weight")
    assert torch.equal(positions, theirs["embedding.position_embeddings.weight"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (  # of a pipeline of Megatron-DeepSpeed, and of the universal format of one
            "tied_modules.embed.word_embeddings.weight "
            "tied_modules.embed.position_embeddings.weight "
            "3.input_layernorm.weight 3.self_attention.dense.bias 4.input_layernorm.weight "
            "6.weight 6.bias 7.lm_head.weight",
            "word_embeddings.weight position_embeddings.weight layers.0.input_layernorm.weight "
            "layers.0.attention.dense.bias layers.1.input_layernorm.weight final_norm.weight "
            "final_norm.bias head.weight",
        ),
        (  # of gpt-neox since 2024, with its RMS norm
            "0.word_embeddings.weight 2.input_layernorm.scale 2.mlp.linear1.weight "
            "2.mlp.linear2.weight 4.norm.scale 5.final_linear.weight",
            "word_embeddings.weight layers.0.input_layernorm.weight "
            "layers.0.mlp.dense_h_to_4h.weight layers.0.mlp.dense_4h_to_h.weight "
            "final_norm.weight head.weight",
        ),
        (  # without a pipeline
            "module.language_model.embedding.word_embeddings.weight "
            "module.language_model.encoder.layers.11.mlp.dense_h_to_4h.weight "
            "module.language_model.encoder.layers.11.input_layernorm.weight "
            "module.language_model.encoder.final_layernorm.weight "
            "module.language_model.output_layer.weight",
            "word_embeddings.weight layers.0.mlp.dense_h_to_4h.weight "
            "layers.0.input_layernorm.weight final_norm.weight head.weight",
        ),
    ],
)
def test_every_spelling_has_one_name(names: str, expected: str) -> None:
    assert list(canonical(names.split())) == expected.split()


def test_ranks_share_gates_and_groups_by_part(tmp_path: Path) -> None:
    """Each rank has a share of every part, so the parts of all ranks come together again."""
    model = resolved_for_import(config(tmp_path, **{**GPT, "num_heads": 4, "num_kv_heads": 2}))
    gate, value = torch.arange(24.0)[:, None], 100 + torch.arange(24.0)[:, None]
    ranks = [torch.cat([gate[part], value[part]]) for part in (slice(12), slice(12, 24))]
    name = "layers.0.mlp.dense_h_to_4h.weight"
    merged = merge(name, ranks, model.megagpt.model, gpt_neox=False)
    assert torch.equal(merged, torch.cat([gate, value]))
    # gpt-neox with grouped queries: a rank's queries, then its keys, then its values
    q, k, v = (100 * part + torch.arange(size)[:, None] for part, size in enumerate((16, 8, 8)))
    ranks = [torch.cat([q[:8], k[:4], v[:4]]), torch.cat([q[8:], k[4:], v[4:]])]
    name = "layers.0.attention.query_key_value.weight"
    merged = merge(name, ranks, model.megagpt.model, gpt_neox=True)
    assert torch.equal(merged, torch.cat([q, k, v]))
    # Megatron-DeepSpeed: whole groups a rank
    assert torch.equal(
        merge(name, ranks, model.megagpt.model, gpt_neox=False), torch.cat(list(ranks))
    )


# -------------------------------------------------------------------------------------- bad files


class Ran:
    """An object that would leave a file if it were made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (str(self.path),)  # type: ignore[return-value]


def _with(directory: Path, content: Any) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(content, directory / "mp_rank_00_model_states.pt")
    return directory


def _missing(directory: Path) -> Path:
    write_layers(directory / "x", 1)
    (directory / "x" / "layer_05-model_00-model_states.pt").unlink()
    return directory / "x"


def _one_rank_short(directory: Path) -> Path:
    write_layers(directory / "x", 2)
    (directory / "x" / "layer_03-model_01-model_states.pt").unlink()
    return directory / "x"


def _cut(directory: Path) -> Path:
    path = write_layers(directory / "x", 1) / "layer_03-model_00-model_states.pt"
    path.write_bytes(path.read_bytes()[:500])
    return directory / "x"


def _zero_3(directory: Path) -> Path:
    (directory / "x").mkdir()
    torch.save({}, directory / "x" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return directory / "x"


BAD = {
    "arguments of a program": (
        lambda d: _with(d / "x", {"args": argparse.Namespace(lr=1), "module": {}}),
        r"mp_rank_00_model_states\.pt: holds argparse\.Namespace, which is not loaded",
    ),
    "an object that runs": (lambda d: _with(d / "x", Ran(d / "RAN")), r"holds \S+, which is not l"),
    "a file that is missing": (_missing, r"x: final_norm\.weight: missing"),
    "a rank that is missing": (_one_rank_short, r"tensor rank 1 of 2 has none"),
    "a file that is cut": (_cut, r"layer_03-model_00-model_states\.pt: not a file of torch\.save"),
    "partitions of ZeRO 3": (
        _zero_3,
        r"ZeRO 3's partitions, no whole tensors; make",
    ),
    "nothing": (lambda d: d / "x", r"x: no checkpoint \(found no zero/"),
    "tensors of nobody": (
        lambda d: _with(d / "x", {"module": {"a.weight": torch.ones(2)}}),
        "tensors of no model that is known",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_named_and_nothing_is_written(what: str, tmp_path: Path) -> None:
    make, message = BAD[what]
    source = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(source, config(tmp_path), tmp_path / "run")
    assert str(source) in str(error.value)
    assert not (tmp_path / "RAN").exists()
    assert not (tmp_path / "run").exists()


def test_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GPTNeoXForCausalLM, and megagpt\.model is not: needs"):
        import_checkpoint(WRITTEN / "universal", config(tmp_path, norm="rmsnorm"), tmp_path / "run")
    wide = config(tmp_path, mlp_size=32)
    with pytest.raises(UserError, match=r"shape \(64, 16\), the model's is \(32, 16\)"):
        import_checkpoint(WRITTEN / "universal", wide, tmp_path / "run")


def test_the_command_says_what_to_type_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(config(tmp_path).to_json())
    words = ["--checkpoint", str(WRITTEN / "universal"), "--deepspeed_config", str(file)]
    words += ["--run_dir", str(tmp_path / "run")]
    with patch.object(sys, "argv", ["launch/import_checkpoint.py", *words]):
        command.main()
    said = capsys.readouterr().out
    assert "step 0, 10.7k parameters of DeepSpeed's universal checkpoint with the names" in said
    assert f"--deepspeed_config {tmp_path / 'run' / 'imported.json'}" in said
