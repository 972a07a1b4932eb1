"""A sample of packed conversations computes what each conversation computes alone."""

import json

import pytest
import torch

from megagpt.dataset import SampleStream
from megagpt.download_data import PreparationRequest, prepare
from megagpt.model import GPT, IGNORED, initialise_
from megagpt.schema.model import ModelConfig
from tests.data.chat_tokenizers import turns
from tests.support.configurations import KINDS

SIZES = {"vocab_size": 384, "num_layers": 2, "hidden_size": 32, "num_heads": 4}
FAMILIES = {name: ModelConfig(**SIZES, sequence_length=96, **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> SampleStream:
    """Of four samples, in each some conversations of different lengths."""
    directory = tmp_path_factory.mktemp("data")
    rows = [{"messages": turns("?" * (n % 9), "abc" * (n % 5 + 1))} for n in range(40)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = PreparationRequest(
        str(directory / "rows.jsonl"),
        directory / "data",
        tokenizer="bytes",
        messages="messages",
        chat_template="plain",
    )
    prepare(wanted, report=lambda line: None)
    return SampleStream.open(
        [(wanted.output, 1.0)], split="train", sequence_length=96, seed=0, document_mask=False
    )


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_loss_and_gradients_are_those_of_each_conversation_alone(stream, config):
    """In fp64. Learned positions and rotary ones, windows, caps, scaled frequencies."""
    batch = stream.batch(range(3))
    tokens, targets, documents, positions = map(
        torch.from_numpy, (batch.tokens, batch.targets, batch.document_ids, batch.positions)
    )
    packed, alone, shifted = (initialise_(GPT(config), seed=0).double() for _ in range(3))
    packed(tokens, targets, document_ids=documents, positions=positions).backward()
    conversations = [
        (tokens[row, own], targets[row, own])
        for row in range(len(tokens))
        for number in documents[row].unique()
        if (targets[row, own := documents[row] == number] != IGNORED).any()
    ]
    assert len(conversations) >= 6
    every = int((targets != IGNORED).sum())
    assert every < targets.numel() / 2
    loss = sum(
        alone(own[None], learnt[None]) * (learnt != IGNORED).sum() / every
        for own, learnt in conversations
    )
    loss.backward()
    shifted(tokens, targets, document_ids=documents).backward()
    for name, parameter in alone.named_parameters():
        scale = parameter.grad.abs().max()
        difference = (packed.get_parameter(name).grad - parameter.grad).abs().max()
        assert difference <= 1e-11 * scale, f"{name}: {difference / scale:.1e}"
    if config.position == "learned":
        table = "embedding.positions.weight"
        assert not torch.allclose(
            shifted.get_parameter(table).grad, alone.get_parameter(table).grad
        )
