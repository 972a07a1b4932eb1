"""Sabotage on demand: read strictly, announced, and absent where nobody asked for it."""

import pytest

from megagpt.utils import UserError
from tests import REPOSITORY
from tests.support import faults
from tests.support.faults import KINDS, VARIABLE, Fault


def test_faults_are_read_as_they_are_written() -> None:
    text = "kill@rank=1,step=5; slow@rank=0,step=3,seconds=0.25;spike@step=60"
    read = faults.parse(text)
    assert read == [
        Fault("kill", 5, rank=1),
        Fault("slow", 3, rank=0, seconds=0.25),
        Fault("spike", 60),
    ]
    assert faults.parse("; ".join(map(str, read))) == read


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kil@step=5", 'unknown fault, did you mean "kill"?'),
        ("kill@rank=1", "step is missing"),
        ("kill@step=5,rnk=1", 'unknown key rnk, did you mean "rank"?'),
        ("kill@step=5.5", "invalid literal for int"),
        ("kill step=5", "expected KIND@KEY=NUMBER"),
        ("kill@step=5 rank=1", "expected KIND@KEY=NUMBER"),
        ("kill@", "expected KIND@KEY=NUMBER"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        faults.parse(f"spike@step=1; {text}; nonsense")
    first, second = str(refused.value).splitlines()
    assert first.startswith(f"{VARIABLE}: {text.strip()}: ")
    assert complaint in first
    assert "nonsense" in second


def test_a_fault_strikes_its_rank_in_its_step() -> None:
    assert [Fault("kill", 5, rank=1).concerns(*place) for place in ((1, 5), (0, 5), (1, 6))] == [
        True,
        False,
        False,
    ]
    assert [Fault("slow", 5).concerns(*place) for place in ((1, 4), (0, 5), (1, 6))] == [
        False,
        True,
        True,
    ]


def test_every_fault_is_described() -> None:
    assert faults.__doc__ is not None
    assert all(kind in faults.__doc__ for kind in KINDS)


def test_the_product_knows_nothing_of_it() -> None:
    """The variable acts in the tests' own script alone."""
    sources = [*(REPOSITORY / "megagpt").rglob("*.py"), *(REPOSITORY / "launch").rglob("*.py")]
    assert sources
    assert [path for path in sources if VARIABLE in path.read_text()] == []
