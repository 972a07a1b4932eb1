"""The table that chooses implementations: every row reachable, every choice explained, every force obeyed."""

import subprocess
import sys

import pytest
import torch

import kernels
from kernels import dispatch, launcher, reference


@pytest.fixture
def q() -> torch.Tensor:
    return torch.randn(1, 2, 4, 16)


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    launcher.reset_launches()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: what is imported, and when variables count, is the question."""
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_cpu_runs_the_twin(q: torch.Tensor) -> None:
    assert kernels.explain("attention", q, q, q) == "attention: torch (triton: tensors on cpu, not on a GPU)"
    assert torch.equal(kernels.attention(q, q, q), reference.attention(q, q, q))
    assert kernels.launches() == {}


def test_torch_is_obeyed(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert kernels.explain("attention", q, q, q) == "attention: torch (triton: MEGAGPT_KERNELS=torch)"


def test_triton_is_obeyed_or_refused_with_the_reason(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(
        ValueError, match="no implementation for MEGAGPT_KERNELS=triton: triton: tensors on cpu, not on"
    ):
        kernels.attention(q, q, q)


@pytest.mark.skipif(not launcher.INTERPRETED, reason="needs TRITON_INTERPRET=1, which conftest sets without a GPU")
def test_the_interpreter_is_obeyed_and_counted(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "interpret")
    assert kernels.explain("attention", q, q, q) == "attention: triton (first in the table)"
    kernels.attention(q, q, q)
    assert kernels.launches() == {"attention_forward": 1}
    with pytest.raises(ValueError, match=r"triton: head_dim 300 is above 256; torch: MEGAGPT_KERNELS asks for fused"):
        kernels.attention(*[torch.zeros(1, 1, 2, 300)] * 3)
    with pytest.raises(ValueError, match=r"dtype torch\.float64 is not bfloat16, float16 or float32"):
        kernels.attention(q.double(), q.double(), q.double())


def test_an_unknown_value_names_the_known_ones(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="MEGAGPT_KERNELS=cuda: unknown value; set it to triton, torch, interpret"):
        kernels.attention(q, q, q)


def test_what_a_gpu_would_run(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda")
    assert dispatch._device_refusal(gpu, None) == "compute capability 7.5 is below 8.0"
    assert dispatch._device_refusal(gpu, "interpret") in (
        "the interpreter works on CPU tensors, not on cuda",
        "MEGAGPT_KERNELS=interpret came too late; set it before Python starts",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch._device_refusal(gpu, "triton") is None


def test_every_row_is_there() -> None:
    for op, rows in dispatch.TABLE.items():
        assert not rows[-1].fused, f"{op} has nothing to run on a CPU"
        for row in rows:
            module = dispatch._module(row.module)
            assert callable(getattr(module, op)), f"{row.module} lacks {op}"
            assert not row.fused or callable(module.refusal)
        assert callable(getattr(kernels, op))
        assert op in kernels.__all__


def test_an_unknown_operation_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kernels' has no attribute 'atention'"):
        kernels.atention  # noqa: B018


def test_importing_kernels_imports_neither_torch_nor_triton() -> None:
    done = run_python("import kernels, kernels.costs, sys; print(sorted({'torch', 'triton'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_interpret_set_after_the_start_is_refused() -> None:
    code = (
        "import os, torch, kernels; q = torch.ones(1, 1, 2, 16); kernels.attention(q, q, q); "
        "os.environ['MEGAGPT_KERNELS'] = 'interpret'; kernels.attention(q, q, q)"
    )
    done = run_python(code)
    assert "MEGAGPT_KERNELS=interpret came too late; set it before Python starts" in done.stderr


def test_the_log_says_once_which_implementation_runs_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_ANNOUNCED", set())  # as in a new process
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    caplog.set_level("INFO", logger="kernels.dispatch")
    kernels.rms_norm(x, torch.ones(24, dtype=torch.float64))
    kernels.rms_norm(x, torch.ones(24, dtype=torch.float64))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [kernels.explain("rms_norm", x, torch.ones(24, dtype=torch.float64))]
