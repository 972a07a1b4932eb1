"""Instruction tuning as a run: epochs of packed conversations, on one mesh and on another, equal
a plain loop that reads each conversation alone.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.config import ResolvedConfig
from megagpt.dataset import SampleStream
from megagpt.download_data import PreparationRequest, prepare
from megagpt.model import GPT, IGNORED, initialise_
from megagpt.monitoring.metrics import read_metrics
from megagpt.parity import plain
from megagpt.rundir.data import open_stream
from tests.data.chat_tokenizers import TEMPLATES, turns, write_chat_tokenizer
from tests.support.configurations import LLAMA, Config, tiny, with_zero
from tests.support.ranks import RankPool

TRAIN = "tests.support.jobs.checkpoint:train"
LENGTH = 64
TWO_STAGES = {"pipeline": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one turn or two, of many lengths."""
    directory = tmp_path_factory.mktemp("data")
    model = write_chat_tokenizer(directory / "model", "qwen", TEMPLATES["chatml"])
    rows = [
        {"messages": turns(*["abc" * (n % 5 + 1), "xy" * (n % 7 + 1)] * (1 + n % 2))}
        for n in range(80)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = PreparationRequest(
        str(directory / "rows.jsonl"),
        directory / "data",
        tokenizer=str(model),
        messages="messages",
        max_length=LENGTH + 1,
    )
    prepare(wanted, report=lambda line: None)
    return wanted.output


def tuning(data: Path, stage: int, parallel: dict[str, Any] | None = None, **length: Any) -> Config:
    config = with_zero(tiny(batch=4, micro=2, vocab_size=512, **LLAMA), stage)
    config["optimizer"]["params"]["eps"] = 1e-6
    config["megagpt"] |= {
        "model": config["megagpt"]["model"] | {"sequence_length": LENGTH},
        "data": {"path": str(data)},
        "training": {"eval_interval_steps": 0, **(length or {"total_epochs": 1.5})},
        "checkpoint": {"interval_steps": 3, "keep": 2},
        "monitor": {"log_interval_steps": 1},
    }
    return config | {"megagpt": config["megagpt"] | ({"parallel": parallel} if parallel else {})}


def losses(directory: Path) -> list[float]:
    return [record.loss for record in read_metrics(directory).steps]


def plain_losses(config: ResolvedConfig, stream: SampleStream) -> list[float]:
    """AdamW and clipping in one process; a step is the mean over all targets of its samples."""
    model = initialise_(GPT(config.megagpt.model), config.megagpt.training.seed)
    optimizer = plain.adam(config, model)
    found = []
    for step in range(config.megagpt.training.total_steps):
        samples = [stream.sample(4 * step + index) for index in range(4)]
        every = sum(int((sample.targets != IGNORED).sum()) for sample in samples)
        total = torch.zeros(())
        for sample in samples:
            for number in range(int(sample.document_ids.max()) + 1):
                own = sample.document_ids == number
                tokens = torch.from_numpy(sample.tokens[own])[None]
                targets = torch.from_numpy(sample.targets[own])[None]
                if count := int((targets != IGNORED).sum()):
                    total = total + count * model(tokens, targets)
        (total / every).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        found.append((total / every).item())
    return found


def test_epochs_of_packed_conversations_equal_a_plain_loop_also_over_a_resume_on_another_mesh(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    config = tuning(data, 3)
    two_ranks.run(TRAIN, config=config, directory=tmp_path / "whole")
    resolved = ResolvedConfig.model_validate_json((tmp_path / "whole" / "config.json").read_text())
    stream = open_stream(resolved, "train")
    assert stream.packing == "conversations"
    steps = -(-3 * stream.samples_per_epoch // (2 * 4))  # 1.5 epochs of batches of 4
    assert resolved.megagpt.training.total_steps == steps > 6
    expected = plain_losses(resolved, stream)
    assert losses(tmp_path / "whole") == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < expected[0] - 0.1

    two_ranks.run(TRAIN, config=tuning(data, 3, total_steps=5), directory=tmp_path / "parts")
    ranks = two_ranks.run(TRAIN, config=tuning(data, 1, TWO_STAGES), directory=tmp_path / "parts")
    assert {rank["first_step"] for rank in ranks} == {5}
    assert losses(tmp_path / "parts") == pytest.approx(expected, rel=5e-5)
