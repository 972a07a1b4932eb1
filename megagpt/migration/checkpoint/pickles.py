"""Read a file of torch.save without running anything that it may contain."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.utils import UserError

# What torch says of an object that it does not make.
REFUSED = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class|unpickl\w+ \w+) (\S+)")
OPERATION = re.compile(r"Unsupported operand (\d+)")


def load(path: Path) -> Any:
    """Return the content, tensors mapped from the file; raise UserError with what was refused."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refused(path, str(error))) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: not a file of torch.save ({_first_line(error)})") from error


def _refused(path: Path, message: str) -> str:
    """Return what is said of a file with objects that are not tensors or plain values."""
    found = REFUSED.search(message)
    named = found[1] if found else f"something unknown ({message.splitlines()[0][:80]})"
    return (
        f"{path}: holds {named}, which is not loaded because making it can run code; import the "
        f"universal checkpoint instead: python -m deepspeed.checkpoint.ds_to_universal "
        f"--input_folder {path.parent} --output_folder DIR"
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def tensors_in(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dicts by dotted name; other values are left out."""
    if isinstance(content, Tensor):
        return {prefix: content}
    found: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        found |= tensors_in(value, f"{prefix}.{name}" if prefix else str(name))
    return found
