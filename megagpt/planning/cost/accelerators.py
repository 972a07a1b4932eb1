"""Data-sheet values of accelerators: peak FLOP/s, memory, links. No torch.

The figures, each row's source and where it was checked, are in `devices.json` beside this file,
which says what they mean. `launch/plan.py --devices FILE` adds rows of the user's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megagpt.utils import UserError, did_you_mean

TABLE = Path(__file__).with_name("devices.json")


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    `link_gb_per_s` connects the devices of a host, `host_gb_per_s` a device and host memory.
    `bf16_native`: it multiplies bf16 matrices in hardware. `efficiency`: the share of the peak
    that large products reach, fitted on published steps; None if there are none. `is_host`: a
    CPU, whose memory is the host's and needs no page-locking.
    """

    peak_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float
    host_gb_per_s: float
    bf16_native: bool = True
    efficiency: float | None = None
    is_host: bool = False
    names: tuple[str, ...] = ()
    source: str = ""
    checked: str = ""


def read_devices(path: Path) -> dict[str, Accelerator]:
    """Return the devices of a table, by name.

    Raises UserError with the first row that is not one, and what to write.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["devices"]
        found = {name: _device(row, f"{path}: devices.{name}", name) for name, row in rows.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give --devices FILE") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path}: not a table of devices, need {{"devices": {{"NAME": {{...}}}}}}; '
            f"copy a row of {TABLE}"
        ) from error
    return found


def _device(row: Mapping[str, Any], where: str, name: str) -> Accelerator:
    known = {field.name for field in fields(Accelerator)}
    for key, value in row.items():
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key{did_you_mean(key, known)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _RATES and not (is_number and value > 0):
            raise UserError(f"{where}.{key}: {value!r} is not a number above 0")
    if missing := [rate for rate in _RATES if rate not in row and rate != "efficiency"]:
        raise UserError(f"{where}: {', '.join(missing)} missing; copy a row of {TABLE}")
    return Accelerator(**{**row, "names": tuple(row.get("names", (name,)))})


_RATES = (
    *("peak_tflops", "memory_gib", "memory_gb_per_s", "link_gb_per_s", "host_gb_per_s"),
    "efficiency",
)
ACCELERATORS = read_devices(TABLE)
# A slice of a device (MIG), and variants with other rates: laptops, 4090 D, 3090 Ti
OTHER_DEVICES = {"mig", "laptop", "d", "ti", "super", "max"}


def find(name: str, among: Iterable[Accelerator] = ACCELERATORS.values()) -> Accelerator | None:
    """Return the accelerator that a driver's name or a user's word means, or None.

    Case does not matter. Words are compared whole: a GH200, an L40 and an RTX A1000 are other
    devices than an H200, an L4 and an A100. A slice of a device (MIG) gives None: it has only
    part of the rates.
    """
    words = _words(name)
    for device in among:
        for known in map(_words, device.names):
            if words >= known and not (words - known) & OTHER_DEVICES:
                return device
    return None


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"\brtx(?=\w)", "rtx ", name.lower())))
