"""The whole way of an open model: imported, trained on, tuned with adapters, evaluated, given back.

The outside reference is transformers: it computes the same loss and writes the same text.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megagpt.data.byte_level_bpe import END_OF_DOCUMENT
from megagpt.data.tokenizer import load_tokenizer
from megagpt.download_data import PreparationRequest, prepare
from megagpt.huggingface.export import export
from megagpt.inference.chat import open_chat
from megagpt.inference.evaluate import evaluate, open_validation
from megagpt.inference.generate import generate
from megagpt.inference.placed_model import place_model
from megagpt.model import IGNORED
from megagpt.monitoring.metrics import read_metrics
from megagpt.rundir.directory import read_config
from tests.conftest import _Pools
from tests.huggingface.test_continued_training import MESH, on_mesh, saved_topology
from tests.huggingface.test_families import FAMILIES, greedy, publish
from tests.support.configurations import Config, with_zero
from tests.support.exported_models import TRAIN, import_into
from tests.support.jobs.checkpoint import run_config
from tests.support.trained_run import SEQUENCE_LENGTH, write_dataset

LENGTH = 2 * SEQUENCE_LENGTH  # what the published model can read


def write_conversations(directory: Path, model: Path) -> Path:
    """Prepared with the model's tokenizer; answers repeat their question."""
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]}
        for word in ["ab" * (n % 3 + 1) for n in range(60)]
    ]
    file = directory / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = PreparationRequest(
        str(file),
        directory / "chats",
        tokenizer=str(model),
        messages="messages",
        chat_template="plain",
        max_length=LENGTH + 1,
    )
    prepare(request, report=lambda line: None)
    return request.output


def tuned(config: Config, base: Path, chats: Path, steps: int) -> Config:
    """The run of adapters on ``base``: two replicas of ZeRO 1, with a rate that moves them."""
    config = with_zero(on_mesh(json.loads(json.dumps(config))), 1)
    config["megagpt"]["data"] = {"path": str(chats)}
    config["megagpt"]["model"]["sequence_length"] = LENGTH
    lora: dict[str, Any] = {"rank": 4, "alpha": 16.0, "base": str(base)}
    config["megagpt"]["training"] |= {"total_steps": steps, "lora": lora}
    config["optimizer"]["params"]["lr"] = 2e-2
    return config


def loss_of_transformers(model: Any, stream: Any) -> float:
    """The mean over all targets, each conversation read alone."""
    nats, count = 0.0, 0
    for index in range(stream.samples_per_epoch):
        sample = stream.sample(index)
        for number in range(int(sample.document_ids.max()) + 1):
            own = sample.document_ids == number
            targets = torch.from_numpy(sample.targets[own]).long()
            logits = model(torch.from_numpy(sample.tokens[own])[None]).logits[0].double()
            nats += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
            count += int((targets != IGNORED).sum())
    return nats / count


@torch.no_grad()
def test_an_open_model_becomes_one_that_answers(pools: _Pools, tmp_path: Path) -> None:
    text = write_dataset(tmp_path / "text")
    llama3 = FAMILIES["llama3"]._replace(dtype=torch.float32)
    published, _ = publish(tmp_path / "published", llama3)
    shutil.copy(text / "tokenizer.json", published)
    (published / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_DOCUMENT}))

    # trained on, on two stages of two tensor ranks
    config = on_mesh(run_config(text, 2, (3, "cpu", "cpu"), save_every=2), **MESH)
    imported = import_into(tmp_path / "base", published, config)
    pools.get(4).run(TRAIN, config=imported, directory=tmp_path / "base")
    assert saved_topology(tmp_path / "base", 2).items() >= MESH.items()

    # tuned with adapters, on two replicas
    chats = write_conversations(tmp_path, published)
    steps = 30
    config = tuned(imported, tmp_path / "base", chats, steps)
    pools.get(2).run(TRAIN, config=config, directory=tmp_path / "tuned")
    assert saved_topology(tmp_path / "tuned", steps).items() >= {"data": 2, "tensor": 1}.items()
    losses = [step.loss for step in read_metrics(tmp_path / "tuned").steps]
    assert losses[-1] < losses[0] - 1

    # evaluated: the loss of the answers, as transformers computes it with the merged export
    model = place_model(tmp_path / "tuned", step=None, device=torch.device("cpu"))
    tokenizer = load_tokenizer(chats)
    settings = read_config(tmp_path / "tuned").megagpt
    ((_, stream),) = open_validation(settings)
    found = evaluate(model, stream, tokenizer, batch_size=2)
    export(tmp_path / "tuned", tmp_path / "merged", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert found.loss == pytest.approx(loss_of_transformers(merged, stream), rel=1e-5)
    untuned = place_model(tmp_path / "base", step=None, device=torch.device("cpu"))
    assert evaluate(untuned, stream, tokenizer, batch_size=2).loss > found.loss + 1

    # given back: the same answer from transformers
    chat = open_chat(settings.data, tokenizer, None)
    prompt = tokenizer.decode(chat.prompt([{"role": "user", "content": "abab"}]))
    (answer,) = generate(
        lambda new, cache: model.logits(new, cache=cache),
        tokenizer,
        [prompt],
        sequence_length=LENGTH,
        max_new_tokens=8,
        temperature=0,
    )
    assert answer == greedy(merged, prompt, 8)
    assert answer.strip()
