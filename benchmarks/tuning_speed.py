"""Compare the speed of instruction tuning with that of trl's SFTTrainer, in one run.

    pip install trl accelerate peft
    python -m benchmarks.tuning_speed

The same Qwen 3 of 5 million parameters in fp32 on one CPU thread, the same 2,000 conversations of
log-normal lengths (at most 512 tokens), a loss on the answers only. Each contender is a process of
its own, and they take turns. trl pads the conversations of a batch to the longest, as it does by
default; recomputation is off in both. Counted are tokens of conversations, no padding, for each
second of processor time, so the figures hold on a machine that others use.
"""

from __future__ import annotations

import itertools
import json
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser, whole_number

LENGTH = 512
SAMPLES = 4  # of a batch here: 2,048 places
CONVERSATIONS = 8  # of a batch of trl: about as many tokens
SHAPE = {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4}
HEAD_SIZE, MLP_SIZE, ROWS = 32, 1024, 4096
WARM_UP = 2

Turn = tuple[int, float]  # tokens of conversations, seconds of processor time


def write_inputs(directory: Path) -> None:
    """Write a tokenizer with its template, a model for transformers, and conversations."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megagpt.data.byte_level_bpe import END_OF_DOCUMENT, save_encoding, train_byte_level_bpe
    from megagpt.data.chat.named import NAMED

    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text() for path in sorted(library.glob("[a-d]*.py"))]
    model = directory / "model"
    config = Qwen3Config(
        vocab_size=ROWS,
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=MLP_SIZE,
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        head_dim=HEAD_SIZE,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(model)
    save_encoding(train_byte_level_bpe(texts, ROWS), model)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").write_text(NAMED["plain"].source)
    words = itertools.cycle(" ".join(texts).split())
    lengths = np.random.default_rng(0).lognormal(np.log(20), 0.8, size=2000).astype(int) + 2
    with (directory / "rows.jsonl").open("w") as file:
        for length in np.minimum(lengths, LENGTH // 8):
            question, answer = (
                " ".join(itertools.islice(words, int(n))) for n in (length // 3 + 1, length)
            )
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def megagpt_steps(directory: Path) -> Iterator[Turn]:
    """Train on packed conversations; yield what each step took."""
    from megagpt.config import RunConfig
    from megagpt.dataset import SampleStream
    from megagpt.download_data import PreparationRequest, prepare
    from megagpt.parallel.batches import BatchLoader
    from megagpt.parallel.engine import build_engine, build_mesh, join_ranks
    from megagpt.parallel.pipeline import train_step

    data = directory / "data"
    prepare(
        PreparationRequest(
            str(directory / "rows.jsonl"),
            data,
            tokenizer=str(directory / "model"),
            messages="messages",
            max_length=LENGTH,
            skip_bad_rows=50,
        )
    )
    stream = SampleStream.open(
        [(data, 1.0)], split="train", sequence_length=LENGTH, seed=0, document_mask=False
    )
    document = {
        "train_batch_size": SAMPLES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 0},
        "megagpt": {
            "model": {
                **SHAPE,
                "head_size": HEAD_SIZE,
                "mlp_size": MLP_SIZE,
                "vocab_size": ROWS,
                "sequence_length": LENGTH,
                "position": "rotary",
                "norm": "rmsnorm",
                "activation": "swiglu",
                "qk_norm": "per_head",
                "bias": False,
            },
            "training": {"total_steps": 1_000_000},
        },
    }
    config = RunConfig.from_json(json.dumps(document)).resolved(
        world_size=1, vocabulary=stream.vocabulary, bf16_native=False
    )
    join_ranks(config)
    engine = build_engine(config, build_mesh(config))
    loader = BatchLoader(stream, config, engine.mesh, engine.device)
    for step in itertools.count():
        started = time.process_time()
        train_step(engine, loader.load(SAMPLES * step, step))
        seconds = time.process_time() - started
        batch = stream.batch(range(SAMPLES * step, SAMPLES * (step + 1)))
        yield _places(batch), seconds


def _places(batch: Any) -> int:
    """Return the places that hold conversations: those up to the last target of each sample."""
    from megagpt.utils import IGNORED

    filled = 0
    for ids, targets in zip(batch.document_ids, batch.targets, strict=True):
        documents = np.unique(ids[targets != IGNORED])
        filled += int(np.isin(ids, documents).sum())
    return filled


def trl_steps(directory: Path) -> Iterator[Turn]:
    """Train with trl's SFTTrainer; yield what each step took."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (directory / "rows.jsonl").open()]
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    tokenizer.pad_token = tokenizer.eos_token
    settings = SFTConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=CONVERSATIONS,
        max_length=LENGTH,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        learning_rate=1e-4,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory / "model"),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    trainer.current_gradient_accumulation_steps = 1  # train() would set it
    trainer.model.train()
    batches = itertools.chain.from_iterable(
        trainer.get_train_dataloader() for _ in itertools.count()
    )
    while True:
        started = time.process_time()
        batch = next(batches)
        trainer.training_step(trainer.model, batch)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), settings.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        seconds = time.process_time() - started
        yield int(batch["attention_mask"].sum()), seconds


CONTENDERS: dict[str, Callable[[Path], Iterator[Turn]]] = {
    "megagpt, packed": megagpt_steps,
    "trl SFTTrainer, padded": trl_steps,
}


def serve(name: str, directory: Path, connection: Any) -> None:
    """Receive numbers of steps, run them, and send tokens and seconds, until a 0."""
    import torch

    torch.set_num_threads(1)
    steps = CONTENDERS[name](directory)
    for wanted in iter(connection.recv, 0):
        turns = list(itertools.islice(steps, wanted))
        connection.send((sum(turn[0] for turn in turns), sum(turn[1] for turn in turns)))


def measure(directory: Path, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Return a row for each contender."""
    context = get_context("spawn")
    connections = {}
    for name in CONTENDERS:
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, directory, theirs), daemon=True).start()
        theirs.close()  # so that a contender that ends is noticed
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        for name, connection in connections.items():
            connection.send(steps if number else WARM_UP)
            tokens, seconds = connection.recv()
            if number:
                speeds[name].append(tokens / seconds)
    for connection in connections.values():
        connection.send(0)
    ours, of_trl = speeds.values()
    ratio = median(mine / other for mine, other in zip(ours, of_trl, strict=True))
    return [
        {
            "contender": name,
            "tokens_per_processor_s": round(median(found)),
            "beside_trl": f"{ratio if found is ours else 1:.2f}",
        }
        for name, found in speeds.items()
    ]


def main() -> None:
    """Write the table."""
    parser = command_parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=whole_number(1), default=5, help="turns [5]")
    parser.add_argument("--steps", type=whole_number(1), default=6, help="steps of a turn [6]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_inputs(Path(place))
        rows = measure(Path(place), arguments.rounds, arguments.steps)
    write_table("tuning_speed", "benchmarks.tuning_speed", rows)


if __name__ == "__main__":
    main()
