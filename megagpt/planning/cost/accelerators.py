"""Data-sheet values of accelerators: peak FLOP/s, memory, links. No torch.

NVIDIA's data sheets (A100 2020, L4 and L40S 2023, H100 and H200 2023, H200 NVL and B200 2024):
dense 16-bit peaks with fp32 accumulation in TFLOP/s, memory in GiB and GB/s. Links are in GB/s per
direction, to the other devices of a host (NVLink, or PCI Express without it) and to host memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    `link_gb_per_s` connects the devices of a host, `host_gb_per_s` a device and host memory.
    """

    peak_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float
    host_gb_per_s: float


# Keyed by words of the driver's name ("NVIDIA H100 80GB HBM3"); the first key whose words all occur
# is used.
ACCELERATORS = {
    "B200": Accelerator(2250.0, 180, 8000, 900, 64),
    "H200 NVL": Accelerator(835.0, 141, 4800, 450, 64),
    "H200": Accelerator(989.4, 141, 4800, 450, 64),
    "H100 PCIe": Accelerator(756.0, 80, 2000, 300, 64),
    "H100 NVL": Accelerator(835.0, 94, 3900, 300, 64),
    "H100": Accelerator(989.4, 80, 3350, 450, 64),
    "A100": Accelerator(312.0, 80, 2039, 300, 32),
    "L40S": Accelerator(362.0, 48, 864, 32, 32),
    "L4": Accelerator(121.0, 24, 300, 32, 32),
}


def find(name: str) -> Accelerator | None:
    """Return the accelerator that a driver's name or a user's word means, or None.

    Case does not matter. Words are compared whole: a GH200, an L40 and an RTX A1000 are other
    devices than an H200, an L4 and an A100. A slice of a device (MIG) gives None: it has only
    part of the rates.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if "mig" in words:
        return None
    return next(
        (found for known, found in ACCELERATORS.items() if words.issuperset(known.lower().split())),
        None,
    )
