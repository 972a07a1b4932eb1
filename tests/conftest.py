"""Where the kernels' tests run: the GPU (``-m gpu``) where there is one, Triton's interpreter elsewhere."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before anything imports triton, which decorates its own library once: a DeepSpeed import in another test may.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_GPU else "cpu"])
def fused_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which ``kernels.*`` must run the Triton functions, with the launch counters at zero."""
    from kernels.launcher import reset_launches

    monkeypatch.setenv("MEGAGPT_KERNELS", "triton" if HAS_GPU else "interpret")
    reset_launches()
    return str(request.param)
