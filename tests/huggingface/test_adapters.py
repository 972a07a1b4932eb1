"""Adapters trained on a mesh of ranks; the outside reference is peft on transformers, which trains
and loads the same ones in one plain process.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megagpt.data.tokenizer import load_tokenizer
from megagpt.huggingface.adapters import export_adapters, peft_config, published_adapters
from megagpt.huggingface.export import export
from megagpt.huggingface.published_config import PublishedConfig
from megagpt.inference.generate import generate
from megagpt.inference.stored_model import load_model
from megagpt.lora import build, initialise_
from megagpt.monitoring.metrics import read_metrics
from megagpt.rundir.directory import read_config
from tests.conftest import _Pools
from tests.huggingface.test_continued_training import on_mesh, plain_steps, saved_topology
from tests.huggingface.test_families import FAMILIES, PROMPTS, Published, greedy, publish
from tests.support.configurations import Config, with_zero
from tests.support.exported_models import TRAIN, assert_near, import_into, tokens_of
from tests.support.jobs.checkpoint import run_config
from tests.support.trained_run import SEQUENCE_LENGTH, write_dataset

peft = pytest.importorskip("peft", reason="peft is not installed; make setup installs it")

STEPS = 3
MESH = {"pipeline": 2, "tensor": 2}
# What peft can train the same: one adapter for each module that the published model has.
FUSED = {
    "gpt2": ["qkv", "output", "up", "down"],
    "neox": ["qkv", "output", "up", "down"],
    "phi3": ["qkv", "output", "gate_up", "down"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def adapted(config: Config, run: Path, **lora: Any) -> Config:
    """The run that trains adapters on an imported model, with a rate that moves them."""
    config = json.loads(json.dumps(config))
    config["megagpt"]["training"]["lora"] = {"rank": 4, "alpha": 12.0, "base": str(run)} | lora
    config["optimizer"]["params"]["lr"] = 1e-2
    return config


def in_peft(published: Published, config: Config, directory: Path) -> Any:
    """The published model under peft, with the adapters that our run begins with."""
    from megagpt.config import RunConfig

    resolved = RunConfig.from_json(json.dumps(config)).resolved(
        world_size=4, vocabulary=None, bf16_native=False
    )
    model = initialise_(build(resolved.megagpt), resolved.megagpt.training.seed)
    start = dict(model.named_parameters())
    architecture = PublishedConfig(published.directory / "config.json").architecture
    adapters = list(published_adapters(architecture, resolved, lambda name: start[name].detach()))
    lora = resolved.megagpt.training.lora
    assert lora is not None
    document = peft_config(architecture, lora, adapters, None)
    assert document["rank_pattern"] == {}
    document = {k: v for k, v in document.items() if k not in ("peft_type", "inference_mode")}
    model = peft.get_peft_model(published.theirs, peft.LoraConfig(**document))
    state = {}
    for adapter in adapters:
        state[f"base_model.model.{adapter.module}.lora_A.weight"] = adapter.a.clone()
        state[f"base_model.model.{adapter.module}.lora_B.weight"] = adapter.b.clone()
    assert state.keys() == peft.get_peft_model_state_dict(model).keys()
    peft.set_peft_model_state_dict(model, state)
    return model


def loaded_by_peft(published: Path, adapters: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(
        published, attn_implementation="eager", dtype=torch.float32
    )
    return peft.PeftModel.from_pretrained(base, adapters).eval()


def assert_both_exports_compute_the_same(
    run: Path, published: Path, data: Path, directory: Path
) -> None:
    """peft on the adapters, transformers on the merged weights, and our own model.

    In fp64: in fp32 peft alone is 1e-5 from it, of Gemma 2's largest logit.
    """
    export_adapters(run, directory / "adapters")
    export(run, directory / "merged", dtype="fp32")
    tokens = tokens_of(data)
    with torch.no_grad():
        expected = loaded_by_peft(published, directory / "adapters").double()(tokens).logits
        merged: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory / "merged", attn_implementation="eager", dtype=torch.float64
        )
        assert_near(merged(tokens).logits, expected)
        ours, config, _ = load_model(run, dtype=torch.float64)
        assert_near(ours(tokens)[..., : config.megagpt.model.vocabulary], expected)
        base = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
        change = (base(tokens).logits - expected).abs().max()
    assert change > 1e-3 * expected.abs().max(), "the adapters change nothing"


@pytest.mark.rotate(10)
@pytest.mark.parametrize(
    "name",
    [
        *("llama3.1-tied", "gemma2", "olmo2", "phi3", "neox", "qwen3"),
        *("gpt2", "mistral", "qwen2", "starcoder2"),
    ],
)
def test_adapters_learn_on_a_mesh_what_peft_learns_in_one_plain_process(
    pools: _Pools, data: Path, tmp_path: Path, name: str
) -> None:
    """PP 2 x TP 2 x ZeRO 3: loss and gradient norm of each step, every adapter after them, and
    the logits of both exports.
    """
    published = publish(tmp_path / "published", FAMILIES[name])
    config = on_mesh(run_config(data, STEPS, (3, "none", "none")), **MESH)
    imported = import_into(tmp_path / "base", published.directory, config)
    trained = adapted(imported, tmp_path / "base", targets=FUSED.get(name, ["all"]))
    pools.get(4).run(TRAIN, config=trained, directory=tmp_path / "run")
    steps = read_metrics(tmp_path / "run").steps

    model = in_peft(published, trained, tmp_path)
    before = {n: t.clone() for n, t in peft.get_peft_model_state_dict(model).items()}
    plain = list(plain_steps(model, data, trained, [s.learning_rate for s in steps]))
    assert [s.loss for s in steps] == pytest.approx([loss for loss, _ in plain], rel=1e-5)
    assert [s.grad_norm for s in steps] == pytest.approx([norm for _, norm in plain], rel=1e-4)
    assert_both_exports_compute_the_same(tmp_path / "run", published.directory, data, tmp_path)
    ours = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        change = (expected - before[tensor]).abs().max()
        assert change > 0
        assert (ours[tensor] - expected).abs().max() < 5e-3 * change, tensor


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", ["all"]),  # three adapters in one module
        ("phi3", ["query", "value", "up"]),  # two in one, one in one
        ("qwen2", ["qkv", "gate_up"]),  # one in three modules, one in two
    ],
)
def test_adapters_that_peft_would_cut_otherwise_are_exported_exactly(
    pools: _Pools, data: Path, tmp_path: Path, name: str, targets: list[str]
) -> None:
    published = publish(tmp_path / "published", FAMILIES[name])
    imported = import_into(
        tmp_path / "base", published.directory, run_config(data, 2, (1, "none", "none"))
    )
    trained = adapted(imported, tmp_path / "base", targets=targets)
    del trained["scheduler"]  # whose first steps move nothing
    pools.get(2).run(TRAIN, config=trained, directory=tmp_path / "run")
    assert_both_exports_compute_the_same(tmp_path / "run", published.directory, data, tmp_path)
    written = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (
        sorted(set(written["rank_pattern"].values()))
        == {
            "gpt2": [12],
            "phi3": [8],
            "qwen2": [],
        }[name]
    )


def test_adapters_are_saved_without_their_base_and_resumed_on_another_mesh(
    pools: _Pools, data: Path, tmp_path: Path
) -> None:
    """ZeRO 3 with offload on PP 2 x TP 2, then two data ranks of ZeRO 1, as one plain process."""
    published = publish(tmp_path / "published", FAMILIES["llama3"]._replace(dtype=torch.float32))
    config = on_mesh(run_config(data, 2, (3, "cpu", "cpu"), save_every=2), **MESH)
    imported = import_into(tmp_path / "base", published.directory, config)
    trained = adapted(imported, tmp_path / "base")
    run = tmp_path / "run"
    pools.get(4).run(TRAIN, config=trained, directory=run)
    first = saved_topology(run, 2)
    assert first.items() >= {**MESH, "zero_stage": 3, "parameter_device": "cpu"}.items()
    trained = with_zero(on_mesh(trained), 1)
    trained["megagpt"]["training"]["total_steps"] = 4
    (resumed, _) = pools.get(2).run(TRAIN, config=trained, directory=run)
    assert resumed["first_step"] == 2
    assert saved_topology(run, 4).items() >= {"data": 2, "zero_stage": 1}.items()

    steps = read_metrics(run).steps
    model = in_peft(published, trained, tmp_path)
    plain = list(plain_steps(model, data, trained, [s.learning_rate for s in steps]))
    assert [s.loss for s in steps] == pytest.approx([loss for loss, _ in plain], rel=1e-5)

    manifest = json.loads((run / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    base = json.loads((run / "base.json").read_text())
    assert manifest["base"] == base["sha256"]
    assert base["step"] == 0
    assert all(".lora." in name for name in manifest["tensors"])
    model_config = read_config(run).megagpt.model
    elements = sum(math.prod(tensor["shape"]) for tensor in manifest["tensors"].values())
    stored = sum(file["bytes"] for file in manifest["files"].values())
    assert 12 * elements < stored < 12 * elements + 200_000
    assert elements < model_config.num_parameters / 2

    assert_both_exports_compute_the_same(run, published.directory, data, tmp_path)
    ours, _, step = load_model(run)
    assert step == 4
    texts = generate(
        lambda new, cache: ours(new, cache=cache),
        load_tokenizer(data),
        PROMPTS,
        sequence_length=SEQUENCE_LENGTH,
        max_new_tokens=8,
        temperature=0,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert texts == [greedy(merged, prompt, 8) for prompt in PROMPTS]
