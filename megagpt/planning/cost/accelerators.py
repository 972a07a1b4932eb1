"""Data-sheet values of accelerators: peak FLOP/s, memory, links. No torch.

NVIDIA's data sheets (V100 2018 and 2020, T4 2018, A100 2020 and 2021, A10, A30 and A40 2021, RTX
A6000 2020, RTX 6000 Ada 2022, L4, L40 and L40S 2023, H100 and H200 2023, H20, H200 NVL and B200
2024; GeForce: the appendices of the architecture whitepapers GA102 2020, Ada 2022, Blackwell 2025)
and AMD's (MI300X 2023, MI325X 2024): dense 16-bit peaks with fp32 accumulation in TFLOP/s, memory
in GiB and GB/s. Links are in GB/s per direction, to the other devices of a host (NVLink, NVLink
bridges between two, Infinity Fabric, or PCI Express without them) and to host memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    `link_gb_per_s` connects the devices of a host, `host_gb_per_s` a device and host memory.
    `bf16_native`: it multiplies bf16 matrices in hardware.
    """

    peak_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float
    host_gb_per_s: float
    bf16_native: bool = True


# Keyed by words of the driver's name ("NVIDIA H100 80GB HBM3"); the first key whose words all occur
# is used.
ACCELERATORS = {
    "B200": Accelerator(2250.0, 180, 8000, 900, 64),
    "H200 NVL": Accelerator(835.0, 141, 4800, 450, 64),
    "H200": Accelerator(989.4, 141, 4800, 450, 64),
    "H100 PCIe": Accelerator(756.0, 80, 2000, 300, 64),
    "H100 NVL": Accelerator(835.0, 94, 3900, 300, 64),
    "H100": Accelerator(989.4, 80, 3350, 450, 64),
    "H800": Accelerator(989.4, 80, 3350, 200, 64),
    "H20": Accelerator(148.0, 96, 4000, 450, 64),
    "A100 40GB": Accelerator(312.0, 40, 1555, 300, 32),
    "A100 PCIe": Accelerator(312.0, 80, 1935, 300, 32),
    "A100": Accelerator(312.0, 80, 2039, 300, 32),
    "A800 40GB": Accelerator(312.0, 40, 1555, 200, 32),
    "A800": Accelerator(312.0, 80, 2039, 200, 32),
    "A40": Accelerator(149.7, 48, 696, 56, 32),
    "A30": Accelerator(165.0, 24, 933, 100, 32),
    "A10G": Accelerator(70.0, 24, 600, 32, 32),
    "A10": Accelerator(125.0, 24, 600, 32, 32),
    "L40S": Accelerator(362.0, 48, 864, 32, 32),
    "L40": Accelerator(181.0, 48, 864, 32, 32),
    "L4": Accelerator(121.0, 24, 300, 32, 32),
    "V100 PCIe 16GB": Accelerator(112.0, 16, 900, 16, 16, bf16_native=False),
    "V100 PCIe": Accelerator(112.0, 32, 900, 16, 16, bf16_native=False),
    "V100 16GB": Accelerator(125.0, 16, 900, 150, 16, bf16_native=False),
    "V100": Accelerator(125.0, 32, 900, 150, 16, bf16_native=False),
    "T4": Accelerator(65.0, 16, 320, 16, 16, bf16_native=False),
    "RTX 6000 Ada": Accelerator(364.2, 48, 960, 32, 32),
    "A6000": Accelerator(154.8, 48, 768, 56, 32),
    "RTX 5090": Accelerator(209.5, 32, 1792, 64, 64),
    "RTX 4090": Accelerator(165.2, 24, 1008, 32, 32),
    "RTX 3090": Accelerator(71.0, 24, 936, 56, 32),
    "MI325X": Accelerator(1307.4, 256, 6000, 448, 64),
    "MI300X": Accelerator(1307.4, 192, 5300, 448, 64),
}
# A slice of a device (MIG), and variants with other rates: laptops, 4090 D, 3090 Ti
OTHER_DEVICES = {"mig", "laptop", "d", "ti", "super", "max"}


def find(name: str) -> Accelerator | None:
    """Return the accelerator that a driver's name or a user's word means, or None.

    Case does not matter. Words are compared whole: a GH200, an L40 and an RTX A1000 are other
    devices than an H200, an L4 and an A100. A slice of a device (MIG) gives None: it has only
    part of the rates.
    """
    words = set(re.findall(r"[a-z0-9]+", re.sub(r"\brtx(?=\w)", "rtx ", name.lower())))
    if words & OTHER_DEVICES:
        return None
    return next(
        (found for known, found in ACCELERATORS.items() if words.issuperset(known.lower().split())),
        None,
    )
