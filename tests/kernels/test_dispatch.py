"""The table that chooses implementations: every row reachable, every choice explained, every
force obeyed.
"""

import functools
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

import kernels
from kernels import dispatch, launcher, reference
from kernels.verification.assembler import assembler


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
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_cpu_runs_the_twin(q: torch.Tensor) -> None:
    assert (
        kernels.explain("attention", q, q, q)
        == "attention: torch (hopper, triton: tensors on cpu, not on a GPU)"
    )
    assert torch.equal(kernels.attention(q, q, q), reference.attention(q, q, q))
    assert kernels.launches() == {}


def test_torch_is_obeyed(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert (
        kernels.explain("attention", q, q, q)
        == "attention: torch (hopper, triton: MEGAGPT_KERNELS=torch)"
    )


def test_triton_is_obeyed_or_refused_with_the_reason(
    q: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(
        ValueError,
        match="no implementation for MEGAGPT_KERNELS=triton: hopper, triton: tensors on cpu, not "
        "on",
    ):
        kernels.attention(q, q, q)


@pytest.mark.skipif(
    not launcher.INTERPRETED, reason="needs TRITON_INTERPRET=1, which conftest sets without a GPU"
)
def test_the_interpreter_is_obeyed_and_counted(
    q: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "interpret")
    assert (
        kernels.explain("attention", q, q, q)
        == "attention: triton (hopper: the interpreter cannot run Gluon)"
    )
    kernels.attention(q, q, q)
    assert kernels.launches() == {"attention_forward": 1}
    with pytest.raises(
        ValueError,
        match=r"triton: head_dim 300 is above 256; torch: MEGAGPT_KERNELS asks for fused",
    ):
        kernels.attention(*[torch.zeros(1, 1, 2, 300)] * 3)
    with pytest.raises(
        ValueError, match=r"dtype torch\.float64 is not bfloat16, float16 or float32"
    ):
        kernels.attention(q.double(), q.double(), q.double())


def test_an_unknown_value_names_the_known_ones(
    q: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(
        ValueError, match="MEGAGPT_KERNELS=cuda: unknown value; set it to triton, torch, interpret"
    ):
        kernels.attention(q, q, q)


def by(capability: tuple[int, int]) -> str:
    """What follows in a line about such a GPU."""
    return f", {assembler(capability)}"


def test_what_gpus_that_are_not_here_would_run(q: torch.Tensor) -> None:
    x, weight = torch.randn(3, 16), torch.ones(16)
    assert kernels.explain("rms_norm", x, weight, capability=(8, 0)) == (
        f"rms_norm: triton (first in the table){by((8, 0))}"
    )
    assert kernels.explain("rms_norm", x, weight, capability=(7, 5)) == (
        "rms_norm: torch (triton: compute capability 7.5 is below 8.0)"
    )
    assert kernels.explain("attention", q, q, q, capability=(7, 5)) == (
        "attention: torch (hopper: compute capability 7.5 is not 9.0; triton: compute capability "
        "7.5 is below 8.0)"
    )
    assert (
        kernels.explain("attention", q, q, q)
        == "attention: torch (hopper, triton: tensors on cpu, not on a GPU)"
    )


@pytest.fixture
def halves() -> torch.Tensor:
    """What attention in Gluon is for: 16 bits, head dimension 64, rows of whole 16 bytes."""
    return torch.randn(1, 2, 20, 64, dtype=torch.bfloat16)


def test_hopper_runs_its_own_attention(halves: torch.Tensor) -> None:
    assert kernels.explain("attention", halves, halves, halves, capability=(9, 0)) == (
        f"attention: hopper (first in the table){by((9, 0))}"
    )
    all_keys = {"q": halves, "k": halves, "v": halves, "window": 20}
    assert "hopper (first in" in kernels.explain("attention", **all_keys, capability=(9, 0))
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        line = kernels.explain("attention", halves, halves, halves, capability=capability)
        name = ".".join(map(str, capability))
        assert (
            line
            == f"attention: triton (hopper: compute capability {name} is not 9.0){by(capability)}"
        )


LEFT_TO_TRITON = {
    "it has no dropout": {"dropout": 0.1, "dropout_seed": torch.tensor([1])},
    "it has no document masks": {"document_ids": torch.zeros(1, 20, dtype=torch.int64)},
    "it has no window": {"window": 19},
    "it has no soft cap": {"softcap": 50.0},
    "dtype torch.float32 is not bfloat16 or float16": dict.fromkeys(
        "qkv", torch.zeros(1, 2, 20, 64)
    ),
    "head_dim 80 is neither 64 nor 128": dict.fromkeys("qkv", torch.zeros(1, 2, 20, 80).half()),
    "the first of 20 queries see none of 7 keys": dict.fromkeys(
        "kv", torch.zeros(1, 2, 7, 64).bfloat16()
    ),
    "there is nothing to attend to": dict.fromkeys("kv", torch.zeros(1, 2, 0, 64).bfloat16()),
    "k has stride 20 between channels, not 1": {"k": torch.zeros(1, 2, 64, 20).bfloat16().mT},
    "v has a stride of 0 elements, not a positive multiple of 8": {
        "v": torch.zeros(1, 1, 20, 64).bfloat16().expand(1, 2, -1, -1)
    },
    "q has a stride of 68 elements, not a positive multiple of 8": {
        "q": torch.zeros(1, 2, 20, 68).bfloat16()[..., :64]
    },
}


@pytest.mark.parametrize("reason", LEFT_TO_TRITON)
def test_what_the_hopper_kernel_cannot_do_is_left_to_the_portable_one(
    reason: str, halves: torch.Tensor
) -> None:
    arguments = {"q": halves, "k": halves, "v": halves} | LEFT_TO_TRITON[reason]
    line = kernels.explain("attention", **arguments, capability=(9, 0))
    assert line == f"attention: triton (hopper: {reason}){by((9, 0))}"


def test_the_hopper_kernel_can_be_switched_off(
    halves: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAGPT_HOPPER", "0")
    line = kernels.explain("attention", halves, halves, halves, capability=(9, 0))
    assert line == f"attention: triton (hopper: MEGAGPT_HOPPER=0){by((9, 0))}"
    monkeypatch.setenv("MEGAGPT_HOPPER", "off")
    with pytest.raises(
        ValueError, match="MEGAGPT_HOPPER=off: unknown value; set it to 0 or 1, or unset it"
    ):
        kernels.attention(halves, halves, halves)


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


@pytest.mark.parametrize("name", kernels.__all__)
def test_every_public_name_is_pickled_by_reference(name: str) -> None:
    found = getattr(kernels, name)
    assert pickle.loads(pickle.dumps(found)) is found  # noqa: S301
    assert pickle.loads(pickle.dumps(functools.partial(found, 1))).func is found  # noqa: S301


class Activation(torch.nn.Module):
    """A module that holds an operation, as a user's may."""

    def __init__(self) -> None:
        super().__init__()
        self.function = functools.partial(kernels.rms_norm, eps=1e-6)
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


def test_a_saved_module_computes_in_a_spawned_process(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    torch.save((Activation(), x), tmp_path / "module.pt")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        y = processes.submit(_load_and_call, tmp_path / "module.pt").result(timeout=120)
        sent = processes.submit(kernels.rms_norm, x, torch.ones(8), eps=1e-6).result(timeout=120)
    assert y == sent.tolist() == kernels.rms_norm(x, torch.ones(8), eps=1e-6).tolist()


def _load_and_call(path: Path) -> list[list[float]]:
    module, x = torch.load(path, weights_only=False)
    y: torch.Tensor = module(x).detach()
    return y.tolist()


def test_importing_kernels_imports_neither_torch_nor_triton() -> None:
    done = run_python(
        "import kernels, kernels.costs, sys; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_dtype_is_that_of_the_numbers_whatever_comes_first() -> None:
    arguments = {
        "targets": torch.zeros(3, dtype=torch.int64),
        "hidden": torch.ones(3, 8),
        "weight": torch.ones(5, 8),
    }
    line = kernels.explain("linear_cross_entropy", **arguments, capability=(9, 0))
    assert line == f"linear_cross_entropy: triton (first in the table){by((9, 0))}"


COLD = """
import torch, kernels

x, weight, head, target = torch.ones(2, 8), torch.ones(8), torch.ones(5, 8), torch.tensor([1, 2])
def model():
    kernels.rms_norm(x, weight)
    kernels.attention(*[torch.ones(1, 1, 4, 16)] * 3)
    return kernels.linear_cross_entropy(x, head, target)
torch.compile(model, backend="eager", fullgraph=True)()
print(sorted(kernels.launches()))
"""


def test_torch_compile_may_be_the_first_to_use_an_operation() -> None:
    """In a fresh process, several operations in one graph: it cannot trace the imports that a
    first use makes.
    """
    done = run_python(COLD, MEGAGPT_KERNELS="interpret")
    assert (
        done.stdout.strip() == "['attention_forward', 'cross_entropy_statistics', 'norm_forward']"
    ), done.stderr


def test_interpret_set_after_the_start_is_refused() -> None:
    code = (
        "import os, torch, kernels; q = torch.ones(1, 1, 2, 16); kernels.attention(q, q, q); "
        "os.environ['MEGAGPT_KERNELS'] = 'interpret'; kernels.attention(q, q, q)"
    )
    done = run_python(code)
    assert (
        "MEGAGPT_KERNELS=interpret was set after kernels was imported; set it before Python starts"
        in done.stderr
    )


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
