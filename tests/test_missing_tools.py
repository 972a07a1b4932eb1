"""What keeps DeepSpeed's ops from being compiled is found before the compiler fails on it."""

import sysconfig
from pathlib import Path

import pytest

from megagpt import ops


def test_a_compiler_without_pythons_headers_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.EXTENSIONS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(ops.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    reason = "Python's own headers are missing (Debian, Ubuntu: apt install python3-dev)"
    assert ops.missing_tools("CPUAdamBuilder") == reason
    (tmp_path / "Python.h").touch()
    assert ops.missing_tools("CPUAdamBuilder") is None
