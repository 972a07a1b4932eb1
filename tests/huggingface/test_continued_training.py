"""Published models trained on a mesh of ranks; the outside reference is transformers, which trains
the same model in one plain process.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from megagpt.checkpoint.format import MANIFEST, step_directory
from megagpt.config import RunConfig
from megagpt.data.tokenizer import load_tokenizer
from megagpt.dataset import SampleStream
from megagpt.huggingface.export import export
from megagpt.inference.generate import generate
from megagpt.inference.stored_model import load_model
from megagpt.monitoring.metrics import read_metrics
from tests.conftest import _Pools
from tests.huggingface.test_families import FAMILIES, PROMPTS, greedy, publish
from tests.support.configurations import Config, with_zero
from tests.support.exported_models import TRAIN, import_into
from tests.support.jobs.checkpoint import run_config
from tests.support.trained_run import SEQUENCE_LENGTH, write_dataset

STEPS = 3
MESH = {"pipeline": 2, "tensor": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def saved_topology(run: Path, step: int) -> dict[str, Any]:
    """On what the ranks were that saved a step."""
    manifest = json.loads((step_directory(run / "checkpoints", step) / MANIFEST).read_text())
    return dict(manifest["topology"])


def on_mesh(config: Config, **parallel: int) -> Config:
    return config | {"megagpt": config["megagpt"] | {"parallel": parallel}}


def plain_steps(
    theirs: PreTrainedModel, data: Path, config: Config, rates: list[float]
) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of each step of transformers' model with torch's AdamW.

    Biases and norms have one dim and no weight decay.
    """
    given = RunConfig.from_json(json.dumps(config))
    adam = given.optimizer.params
    groups: dict[float, list[torch.nn.Parameter]] = {adam.weight_decay: [], 0.0: []}
    for parameter in theirs.parameters():
        groups[adam.weight_decay if parameter.dim() > 1 else 0.0].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        betas=tuple(adam.betas),
        eps=adam.eps,
    )
    stream = SampleStream.open(
        [(data, 1.0)], split="train", sequence_length=SEQUENCE_LENGTH, seed=0, document_mask=False
    )
    batch_size = config["train_batch_size"]
    for step, rate in enumerate(rates):
        batch = stream.batch(range(step * batch_size, (step + 1) * batch_size))
        logits = theirs(torch.from_numpy(batch.tokens)).logits
        targets = torch.from_numpy(batch.targets).long()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), given.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), norm.item()


# Softmax does not see the bias of keys, or where keys are rotated hardly that of some channels.
BIASES_OF_KEYS = ("query_key_value.bias", "c_attn.bias", "k_proj.bias")


@pytest.mark.rotate(10)
@pytest.mark.parametrize(
    "name",
    [
        *("llama3.1-tied", "gemma2", "olmo2", "phi3", "neox", "qwen3"),
        *("gpt2", "mistral", "qwen2", "starcoder2"),
    ],
)
def test_a_family_learns_on_a_mesh_what_it_learns_in_one_plain_process(
    pools: _Pools, data: Path, tmp_path: Path, name: str
) -> None:
    """PP 2 x TP 2 x ZeRO 3: loss and gradient norm of each step, and every weight after them."""
    published, theirs = publish(tmp_path / "published", FAMILIES[name])
    before = {n: t.clone() for n, t in theirs.state_dict().items()}
    config = on_mesh(run_config(data, STEPS, (3, "none", "none")), **MESH)
    imported = import_into(tmp_path / "run", published, config)
    pools.get(4).run(TRAIN, config=imported, directory=tmp_path / "run")
    assert saved_topology(tmp_path / "run", STEPS).items() >= {**MESH, "zero_stage": 3}.items()
    steps = read_metrics(tmp_path / "run").steps
    plain = list(plain_steps(theirs, data, imported, [s.learning_rate for s in steps]))
    assert [s.loss for s in steps] == pytest.approx([loss for loss, _ in plain], rel=1e-5)
    assert [s.grad_norm for s in steps] == pytest.approx([norm for _, norm in plain], rel=1e-4)
    export(tmp_path / "run", tmp_path / "out", dtype="fp32")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert trained.keys() == before.keys()
    for tensor, expected in theirs.state_dict().items():
        if tensor.endswith(BIASES_OF_KEYS):
            continue
        change = (expected - before[tensor]).abs().max()
        assert change > 0
        assert (trained[tensor] - expected).abs().max() < 5e-3 * change, tensor


def test_an_open_model_is_imported_trained_on_two_meshes_and_given_back(
    pools: _Pools, data: Path, tmp_path: Path
) -> None:
    """A Llama 3 in several files, with its tokenizer: trained on PP 2 x TP 2 x ZeRO 3 with
    offload, resumed on two data ranks of ZeRO 1, exported. Each step is that of one plain process,
    and transformers writes the text that we write.
    """
    llama3 = FAMILIES["llama3"]._replace(dtype=torch.float32)
    published, theirs = publish(tmp_path / "published", llama3)
    shutil.copy(data / "tokenizer.json", published)
    config = on_mesh(run_config(data, 2, (3, "cpu", "cpu"), save_every=2), **MESH)
    imported = import_into(tmp_path / "run", published, config)
    pools.get(4).run(TRAIN, config=imported, directory=tmp_path / "run")
    first = saved_topology(tmp_path / "run", 2)
    assert first.items() >= {**MESH, "zero_stage": 3, "optimizer_device": "cpu"}.items()
    assert first["parameter_device"] == "cpu"
    imported = with_zero(on_mesh(imported), 1)
    imported["megagpt"]["training"]["total_steps"] = 4
    (resumed, _) = pools.get(2).run(TRAIN, config=imported, directory=tmp_path / "run")
    assert resumed["first_step"] == 2
    second = saved_topology(tmp_path / "run", 4)
    assert second.items() >= {"pipeline": 1, "tensor": 1, "data": 2, "zero_stage": 1}.items()

    steps = read_metrics(tmp_path / "run").steps
    assert [step.step for step in steps] == [1, 2, 3, 4]
    plain = list(plain_steps(theirs, data, imported, [s.learning_rate for s in steps]))
    assert [s.loss for s in steps] == pytest.approx([loss for loss, _ in plain], rel=1e-5)

    export(tmp_path / "run", tmp_path / "out")
    names = {path.name for path in published.iterdir()}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes(), name
    ours, _, step = load_model(tmp_path / "run")
    assert step == 4
    texts = generate(
        lambda new, cache: ours(new, cache=cache),
        load_tokenizer(data),
        PROMPTS,
        sequence_length=SEQUENCE_LENGTH,
        max_new_tokens=8,
        temperature=0,
    )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert texts == [greedy(exported, prompt, 8) for prompt in PROMPTS]
    assert len("".join(texts)) > 8
    untrained = AutoModelForCausalLM.from_pretrained(published).eval()
    assert not torch.equal(exported.lm_head.weight, untrained.lm_head.weight)
