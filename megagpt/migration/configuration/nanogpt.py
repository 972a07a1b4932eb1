"""nanoGPT's configuration: plain assignments and `--key=value` arguments, read and never run.

nanoGPT's own configurator.py executes the file. Here its text is parsed, and only constants, names
that were assigned before, and arithmetic of these have a value.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagpt.migration.configuration.ledger import Ledger
from megagpt.migration.configuration.megatron_family import MODEL, Options
from megagpt.utils import UserError

# The values of train.py at commit 3adf61e, which a file or an argument overrides.
DEFAULTS: Options = {
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "init_from": "scratch",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "dtype": "auto",
}
RENAMED = {
    "n_layer": f"{MODEL}.num_layers",
    "n_head": f"{MODEL}.num_heads",
    "n_embd": f"{MODEL}.hidden_size",
    "block_size": f"{MODEL}.sequence_length",
    "dropout": f"{MODEL}.dropout",
    "bias": f"{MODEL}.bias",
    "max_iters": "megagpt.training.total_steps",
    "eval_interval": "megagpt.training.eval_interval_steps",
    "log_interval": "megagpt.monitor.log_interval_steps",
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "grad_clip": "gradient_clipping",
    "wandb_project": "wandb.project",
    "wandb_log": "wandb.enabled",
}
CHANGES_NOTHING = {
    "out_dir": "the run directory is --run_dir",
    "always_save_checkpoint": "a checkpoint is saved at each interval, and the newest are kept",
    "wandb_run_name": "the run directory names the run",
    "backend": "nccl on GPUs, gloo on CPUs",
    "device": "the launcher chooses the devices",
    "compile": "the model has kernels of its own",
    "seed_offset": "one seed gives one order of samples on any number of ranks",
}
BELONGING = DEFAULTS.keys() | CHANGES_NOTHING.keys() | {"eval_only", "wandb_log", "wandb_project"}
ROWS = 50304  # of the embedding, where the data have no meta.pkl (train.py)
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class _Unreadable:
    """A value that would have to be computed by running the file."""

    def __init__(self, line: int, text: str) -> None:
        self.line = line
        self.text = text


def read_assignments(path: Path, text: str) -> Options:
    """Return the assignments of a file; raise UserError for a statement that is none.

    A value that is no constant stays unread until it is asked for.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{path}:{line}: not Python ({error.args[0]})") from error
    options: Options = {}
    for statement in tree.body:
        name = _assigned(statement)
        if name is not None:
            options[name] = _value(statement.value, options)  # type: ignore[attr-defined]
        elif not isinstance(statement, ast.Import | ast.ImportFrom) and not _is_text(statement):
            raise UserError(
                f"{path}:{statement.lineno}: {type(statement).__name__} is not a plain assignment, "
                f"and the file is not run; write KEY = VALUE, or give --KEY=VALUE after --"
            )
    return options


def _assigned(statement: ast.stmt) -> str | None:
    """Return the name that a plain assignment gives a value, else None."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target = statement.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def _is_text(statement: ast.stmt) -> bool:
    """Return whether a statement is a text that stands alone, as a comment."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _value(node: ast.expr, known: Options) -> Any:
    try:
        return _computed(node, known)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError, RecursionError):
        return _Unreadable(node.lineno, ast.unparse(node))


def _computed(node: ast.expr, known: Options) -> Any:
    """Return a constant, the value of an earlier name, or arithmetic of numbers."""
    if isinstance(node, ast.Name) and node.id in known:
        if isinstance(known[node.id], _Unreadable):
            raise ValueError(node.id)
        return known[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _computed(node.left, known), _computed(node.right, known)
        if not all(isinstance(side, int | float) for side in (left, right)):
            raise ValueError("arithmetic of what are no numbers")
        return OPERATORS[type(node.op)](left, right)
    return ast.literal_eval(node)


def read_arguments(words: list[str]) -> Options:
    """Return the `--key=value` arguments, read as nanoGPT's configurator.py reads them."""
    options: Options = {}
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise UserError(f"{word}: not an argument of nanoGPT; write --KEY=VALUE")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def take_nanogpt(path: Path | None, given: Options, ledger: Ledger) -> None:
    """Move nanoGPT's keys, with its defaults for others, into the ledger."""
    if not given.keys() & BELONGING:
        named = ", ".join(list(given)[:4]) or "nothing"
        raise UserError(
            f"{path or 'arguments'}: not a configuration of nanoGPT (found {named}; need some of "
            f"n_layer, batch_size, learning_rate, max_iters)"
        )
    options = {**DEFAULTS, **given}
    _require_read(path, options)
    _take_batch(options, ledger)
    _take_schedule(options, ledger)
    _take_data(path, options, ledger)
    _take_precision(options, ledger)
    start = options.pop("init_from")
    if start == "scratch":
        ledger.nothing("init_from", start, "a run begins with initial weights")
    else:
        ledger.drop(
            "init_from", start, "launch/import_hf.py --model DIR starts from a published model"
        )
    for key, value in options.items():
        if key in RENAMED:
            ledger.take(key, value, RENAMED[key])
        elif isinstance(value, _Unreadable):
            why = CHANGES_NOTHING.get(key, "no key of nanoGPT")
            ledger.nothing(key, value.text, why)
        elif key in CHANGES_NOTHING:
            ledger.nothing(key, value, CHANGES_NOTHING[key])
        elif key == "eval_only":
            ledger.drop(key, value, "launch/evaluate.py evaluates a run")
        else:
            ledger.drop(key, value, "no key of nanoGPT's train.py")
    # torch's nn.GELU() is the exact form (model.py), and its layer norms have the bias's choice.
    ledger.put(f"{MODEL}.activation", "gelu_exact")


def _require_read(path: Path | None, options: Options) -> None:
    """Raise UserError if the value of a key that matters would have to be computed."""
    for key, value in options.items():
        if isinstance(value, _Unreadable) and key in DEFAULTS.keys() | RENAMED.keys():
            raise UserError(
                f"{path}:{value.line}: {key} is {value.text}, which is not run; give its value: "
                f"-- --{key}=VALUE"
            )


def _take_batch(options: Options, ledger: Ledger) -> None:
    """Take the batch: there, the accumulation is that of all ranks together."""
    micro, steps = options.pop("batch_size"), options.pop("gradient_accumulation_steps")
    ledger.take("batch_size", micro, "train_micro_batch_size_per_gpu")
    ledger.take(
        "gradient_accumulation_steps",
        steps,
        "train_batch_size",
        steps * micro,
        "of all ranks together; each has its share",
    )
    evaluated = options.pop("eval_iters")
    ledger.take(
        "eval_iters",
        evaluated,
        "megagpt.training.eval_batches",
        max(round(evaluated / steps), 1),
        "global batches of as many sequences",
    )


def _take_schedule(options: Options, ledger: Ledger) -> None:
    ledger.put("optimizer.type", "AdamW")
    betas = [options.pop("beta1"), options.pop("beta2")]
    for key, value in zip(("beta1", "beta2"), betas, strict=True):
        ledger.took(key, value, "as optimizer.params.betas")
    ledger.put("optimizer.params.betas", betas)
    keys = ("warmup_iters", "lr_decay_iters", "min_lr")
    warmup, length, least = (options.pop(key) for key in keys)
    decays = options.pop("decay_lr")
    if not decays:
        ledger.nothing("decay_lr", decays, "without a scheduler the learning rate is constant")
        for key, value in zip(keys, (warmup, length, least), strict=True):
            ledger.nothing(key, value, "decay_lr is off")
        return
    ledger.take("decay_lr", decays, "scheduler.type", "WarmupCosineLR")
    ledger.put("scheduler.params.warmup_type", "linear")
    why = "" if warmup >= 2 else "DeepSpeed's shortest"
    ledger.take("warmup_iters", warmup, "scheduler.params.warmup_num_steps", max(warmup, 2), why)
    ledger.take("lr_decay_iters", length, "scheduler.params.total_num_steps")
    share = round(least / options["learning_rate"], 9)
    ledger.take("min_lr", least, "scheduler.params.cos_min_ratio", share, "share of learning_rate")


def _take_data(path: Path | None, options: Options, ledger: Ledger) -> None:
    """Take the directory of train.bin and val.bin, beside the directory of the configuration."""
    name = options.pop("dataset")
    home = path.parent.parent if path is not None else Path()
    directory = home / "data" / str(name)
    ledger.take("dataset", name, "megagpt.data.path", str(directory))
    if (directory / "meta.pkl").exists() or str(name).endswith("_char"):
        ledger.needed[f"{MODEL}.vocabulary"] = (
            f"dataset {name!r}: how many ids it has is in meta.pkl, a pickle, which is never opened"
        )
    else:
        ledger.put(f"{MODEL}.vocab_size", ROWS)
        ledger.put(f"{MODEL}.vocabulary", ROWS)
        ledger.took("dataset", name, f"with {MODEL}.vocabulary {ROWS}", "as without meta.pkl")


def _take_precision(options: Options, ledger: Ledger) -> None:
    kind = options.pop("dtype")
    stage = "zero_optimization.stage"
    if kind == "float32":
        ledger.nothing("dtype", kind, "weights are fp32 unless bf16 or fp16 is enabled")
        return
    if kind == "auto":
        ledger.took("dtype", kind, "as bf16.enabled and fp16.enabled auto", "the device decides")
        ledger.put("bf16.enabled", "auto")
        ledger.put("fp16.enabled", "auto")
    elif kind in ("bfloat16", "float16"):
        ledger.take("dtype", kind, f"{'bf16' if kind == 'bfloat16' else 'fp16'}.enabled", True)
    else:
        ledger.need("dtype", kind, "bf16.enabled", "it is float32, bfloat16 or float16")
    ledger.put(stage, 1)  # 16-bit weights need it
