"""Another DeepSpeed, or a patched one, is refused by name before anything relies on it."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megagpt import internals
from megagpt.utils import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_installed_is_what_was_tested() -> None:
    internals.check()
    assert len({digest for _, digest in internals.digests()}) == len(internals.DIGESTS)


@pytest.mark.parametrize("fault", ["one line more", "a file less"])
def test_a_patched_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A copy of the package stands before the installed one, as a vendored one would."""
    installed = find_spec("deepspeed")
    assert installed is not None
    assert installed.origin is not None
    shutil.copytree(Path(installed.origin).parent, tmp_path / "deepspeed", ignore=shutil.ignore_patterns("*.pyc"))
    stage3 = tmp_path / "deepspeed" / "runtime" / "zero" / "stage3.py"
    stage3.write_text(stage3.read_text() + "\n") if fault == "one line more" else stage3.unlink()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(
        UserError, match=r"not as tested here: deepspeed/runtime/zero/stage3\.py; pip install .*0\.19\.8"
    ):
        internals.check()


def test_the_versions_are_those_of_requirements_txt() -> None:
    pins = (ROOT / "requirements.txt").read_text().split()
    assert {f"{package}=={version}" for package, version in internals.TESTED.items()} <= set(pins)
