"""The word list of `make check` finds what it should."""

import pytest

from tests.project import words


@pytest.mark.parametrize(
    "source",
    [
        '"""It died for want\n    of memory."""\n',
        "# died for want\n# of memory\n",
        'print("died for want "\n      f"of {memory}")\n',
        "print(f'died for want of {memory}')\n",
    ],
)
def test_a_phrase_is_found_across_lines_and_literals(source: str) -> None:
    (found,) = words.findings(words.prose(source), "a.py")
    assert found == 'a.py:1: "for want of"; say "without, for lack of"'


@pytest.mark.parametrize(
    "source",
    [
        "wish = anew.shall\n",
        'stop["wish"]\n',
        'x = ["for want", "of"]\n',
        "# shallow, renew, micro-batch\n",
    ],
)
def test_names_and_longer_words_are_not_read(source: str) -> None:
    assert list(words.findings(words.prose(source), "a.py")) == []


def test_the_command_names_the_line_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert words.main(["tests/project/test_words.py"]) == 1
    assert 'tests/project/test_words.py:14: "for want of"; say' in capsys.readouterr().out
