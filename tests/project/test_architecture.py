"""docs/architecture.md and its picture are those of the code."""

import re

import pytest

from benchmarks import architecture_figure
from tests import REPOSITORY

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()


def test_the_picture_is_drawn_from_these_imports() -> None:
    assert architecture_figure.FIGURE.read_text() == architecture_figure.draw(), (
        "python -m benchmarks.architecture_figure"
    )


def test_a_circle_has_no_layers() -> None:
    assert architecture_figure.layers({"a": {"b"}, "b": set()}) == {"a": 1, "b": 0}
    with pytest.raises(ValueError, match=r"among \['a', 'b'\]"):
        architecture_figure.layers({"a": {"b"}, "b": {"a"}, "c": set()})


def test_every_package_is_on_the_page() -> None:
    table = PAGE.partition("## The house")[2].partition("\n## ")[0]
    packages = [path.parent.name for path in (REPOSITORY / "megagpt").glob("*/__init__.py")]
    modules = [path.name for path in (REPOSITORY / "megagpt").glob("[!_]*.py")]
    assert [name for name in packages if f"`megagpt/{name}/`" not in table] == []
    assert [name for name in modules if f"`megagpt/{name}`" not in table] == []


def test_no_package_is_crowded() -> None:
    """At most 12 files beside packages at the top, at most 18 in any package."""
    for root, most_at_top in (("megagpt", 12), ("kernels", 12), ("tests", 12)):
        for path in [REPOSITORY / root, *(REPOSITORY / root).rglob("*/")]:
            files = list(path.glob("*.py"))
            most = most_at_top if path.name == root else 18
            assert len(files) <= most, f"{path}: {len(files)} files"


def test_the_glossary_stays_small() -> None:
    words = re.findall(r"^\| (?!word|---)", PAGE.partition("## Words")[2], flags=re.MULTILINE)
    assert 1 <= len(words) <= 15
