"""Compare the trainer's learning curve with a reference GPT's, on the same samples in order.

    python -m benchmarks.learning_curve TEXT.txt

Byte-level. The reference is transformers' GPT2LMHeadModel in a plain PyTorch loop with torch's
AdamW: other model code, its own initialisation, another Adam. The trainer runs ZeRO-3 with CPU
offload through its command. Both curves and the validation losses go to
benchmarks/results/learning_curve.csv and .png.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, provenance, write_table
from megagpt.common.arguments import command_parser, user_path

ROOT = Path(__file__).parent.parent
STEPS = 400
BATCH = 16
LENGTH = 128
EVAL_BATCHES = 8
LEARNING_RATE = 1e-3
WARMUP_STEPS = 40
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MODEL = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "sequence_length": LENGTH}


def configuration(data: Path) -> dict[str, Any]:
    """Return the trainer's configuration."""
    return {
        "train_batch_size": BATCH,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_num_steps": WARMUP_STEPS, "warmup_type": "linear"},
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 2_000_000,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        },
        "megagpt": {
            "model": MODEL,
            "data": {"path": str(data)},
            "training": {
                "total_steps": STEPS,
                "eval_interval_steps": 50,
                "eval_batches": EVAL_BATCHES,
            },
            "checkpoint": {"interval_steps": 0},
            "monitor": {"log_interval_steps": 10},
        },
    }


def trainer_curve(data: Path, directory: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Return training and validation losses by step, from metrics.jsonl of a real run."""
    config = directory / "config.json"
    config.write_text(json.dumps(configuration(data)))
    run = directory / "run"
    command = [
        sys.executable,
        str(ROOT / "launch/train.py"),
        "--deepspeed_config",
        str(config),
        "--run_dir",
        str(run),
    ]
    subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = {line["step"]: line["loss"] for line in lines if "event" not in line}
    return train, {line["step"]: line["val_loss"] for line in lines if line.get("event") == "eval"}


def reference_curve(data: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Return the same losses of transformers' GPT-2 in a plain loop."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from megagpt.dataset import SampleStream

    streams = {
        split: SampleStream.open(
            [(data, 1.0)], split=split, sequence_length=LENGTH, seed=0, document_mask=False
        )
        for split in ("train", "val")
    }
    vocabulary = math.ceil(streams["train"].vocabulary / 128) * 128
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=LENGTH,
            n_embd=MODEL["hidden_size"],
            n_layer=MODEL["num_layers"],
            n_head=MODEL["num_heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)

    def loss_of(split: str, index: int) -> torch.Tensor:
        batch = streams[split].batch(range(index * BATCH, (index + 1) * BATCH))
        logits = model(torch.from_numpy(batch.tokens)).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten()
        )

    train, validation = {}, {}
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:  # as DeepSpeed's WarmupLR: rate 0 at the first step
            group["lr"] = LEARNING_RATE * min(1.0, (step - 1) / WARMUP_STEPS)
        loss = loss_of("train", step - 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            train[step] = loss.item()
        if step % 50 == 0:
            with torch.no_grad():
                validation[step] = (
                    sum(loss_of("val", index).item() for index in range(EVAL_BATCHES))
                    / EVAL_BATCHES
                )
    return train, validation


def plot(curves: dict[str, tuple[dict[int, float], dict[int, float]]]) -> Path:
    """Plot both curves in one figure and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for color, (name, (train, validation)) in zip(("C0", "C1"), curves.items(), strict=True):
        axes.plot([*train], [*train.values()], color=color, alpha=0.5, label=f"{name}, training")
        axes.plot(
            [*validation], [*validation.values()], "o-", color=color, label=f"{name}, validation"
        )
    axes.set(
        xlabel="step",
        ylabel="loss (nats per byte)",
        title="Byte-level GPT, 0.8M parameters, the same samples",
    )
    axes.legend()
    path = RESULTS / "learning_curve.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    parser = command_parser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=user_path, help="a text file of a megabyte or more")
    text = parser.parse_args().text.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        prepare = [
            sys.executable,
            str(ROOT / "launch/download_data.py"),
            "--dataset",
            str(text),
            "--tokenizer",
            "bytes",
        ]
        subprocess.run([*prepare, "--output", str(data)], check=True)
        curves = {
            "megagpt, ZeRO-3 + CPU offload": trainer_curve(data, Path(temporary)),
            "transformers GPT-2, plain loop": reference_curve(data),
        }
    (ours_train, ours), (theirs_train, theirs) = curves.values()
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "megagpt_training": f"{ours_train[step]:.4f}",
            "reference_training": f"{theirs_train[step]:.4f}",
            "megagpt_validation": f"{ours[step]:.4f}" if step in ours else "",
            "reference_validation": f"{theirs[step]:.4f}" if step in theirs else "",
        }
        for step in theirs_train
    ]
    write_table("learning_curve", "benchmarks.learning_curve", rows)
    print(f"{plot(curves)}\n{provenance('benchmarks.learning_curve')}")


if __name__ == "__main__":
    main()
