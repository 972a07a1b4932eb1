"""Which ptxas triton uses, by whatever way it came to it; a broken one is named, never a crash."""

from pathlib import Path

import pytest

from kernels.verification import assembler as assemblers
from kernels.verification.assembler import Assembler, assembler

triton = pytest.importorskip("triton")
SAYS = "#!/bin/sh\necho 'Cuda compilation tools, release 13.5, V13.5.37'\n"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.delenv("TRITON_PTXAS_BLACKWELL_PATH", raising=False)


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_triton_s_own() -> None:
    """That of the wheel, of which Blackwell has another."""
    for capability, variable in (
        ((9, 0), "TRITON_PTXAS_PATH"),
        ((10, 0), "TRITON_PTXAS_BLACKWELL_PATH"),
    ):
        used = assembler(capability)
        assert used.variable == variable
        assert used.origin == "triton's own"
        assert used.version is not None
        assert str(used) == f"ptxas {used.version} (triton's own)"
    assert assembler((9, 0)).version == "12.8.93"
    assert assembler((9, 0)).reported_wrong()


def test_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path / "ptxas", SAYS)
    monkeypatch.setenv("TRITON_PTXAS_PATH", path)
    assert str(assembler((9, 0))) == f"ptxas 13.5.37 (TRITON_PTXAS_PATH={path})"
    assert assembler((9, 0)).advice() == "this ptxas is not known to be wrong: please report it"
    assert assembler((10, 0)).origin == "triton's own"


def test_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton silently uses its own."""
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/nowhere/ptxas")
    assert (
        str(assembler((9, 0)))
        == "ptxas 12.8.93 (triton's own, as TRITON_PTXAS_PATH=/nowhere/ptxas does not run)"
    )


@pytest.mark.parametrize(
    "text", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\necho nonsense\n", "#!/nowhere/sh\n", "no program"]
)
def test_one_whose_version_cannot_be_read(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path / "ptxas", text)
    monkeypatch.setenv("TRITON_PTXAS_PATH", path)
    assert assemblers.version_of(path) is None
    assert str(assembler((9, 0))).startswith("ptxas ")  # triton's own, or none that triton can use
    unknown = Assembler(None, f"TRITON_PTXAS_PATH={path}", "TRITON_PTXAS_PATH")
    assert str(unknown) == f"ptxas of unknown version (TRITON_PTXAS_PATH={path})"
    assert unknown.reported_wrong()


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        return None

    monkeypatch.setattr(triton.knobs.NvidiaTool, "from_path", missing)
    assert (
        str(assembler((9, 0)))
        == "ptxas of unknown version (triton cannot use it: Cannot find ptxas)"
    )


def test_what_to_type_names_an_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemblers, "_installed", lambda: "/site/nvidia/cu13/bin/ptxas")
    assert (
        assembler((9, 0))
        .advice()
        .endswith("; export TRITON_PTXAS_PATH=/site/nvidia/cu13/bin/ptxas")
    )
    monkeypatch.setattr(assemblers, "_installed", lambda: None)
    assert (
        "pip install 'nvidia-cuda-nvcc>=13.3'; export TRITON_PTXAS_PATH="
        in assembler((9, 0)).advice()
    )
