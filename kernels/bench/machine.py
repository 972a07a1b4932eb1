"""What every measured number depends on: the GPU, its driver, libraries and the assembler."""

import importlib.util
import platform
import subprocess

import torch

from kernels.verification.assembler import assembler


def device_name() -> str:
    """Return the GPU's name, or the CPU's architecture and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> str:
    """Return the versions of torch and triton, and on a GPU of CUDA, cuDNN, driver and ptxas."""
    found = [f"torch {torch.__version__}"]
    if importlib.util.find_spec("triton") is not None:
        import triton

        found.append(f"triton {triton.__version__}")
    if torch.cuda.is_available():
        found += [
            f"CUDA {torch.version.cuda}",
            f"cuDNN {torch.backends.cudnn.version()}",
            f"driver {driver()}",
        ]
        found.append(f"ptxas {assembler(torch.cuda.get_device_capability()).version or 'unknown'}")
    return ", ".join(found)


def driver() -> str:
    """Return the version of the NVIDIA driver, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
