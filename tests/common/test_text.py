"""Which environment variables hold secrets, that their values do not reach a text, and tables."""

import pytest

from megagpt.common.text import MASK, redacted, text_table
from megagpt.preflight import forwarded

VALUE = "canary-0123456789"


@pytest.mark.parametrize(
    ("variable", "secret"),
    [
        ("WANDB_API_KEY", True),
        ("PGPASSWORD", True),
        ("PIP_BASIC_AUTH", True),
        ("http_authorization", True),
        ("GIT_AUTHOR_NAME", False),
        ("XAUTHORITY", False),
        ("NCCL_DEBUG", False),
    ],
)
def test_what_is_masked_in_a_text_is_not_forwarded_either(
    variable: str, secret: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, VALUE)
    assert redacted(f"failed with {VALUE}") == f"failed with {MASK if secret else VALUE}"
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text(f"{variable}={VALUE}\n")
    variables, problems = forwarded.read()
    assert (variables, len(problems)) == ({} if secret else {variable: VALUE}, int(secret))


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    rows = [("host", "GiB"), ("a", "1"), ("node-17", "100.5")]
    assert text_table(rows) == ["host       GiB", "a            1", "node-17  100.5"]
    assert text_table(rows, numbers=False) == ["host     GiB", "a        1", "node-17  100.5"]
