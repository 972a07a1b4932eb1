"""What ranks compare before they train together; ranks that really differ are in test_startup."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megagpt.health import agreement
from megagpt.utils import UserError


def test_any_change_to_the_code_is_seen_and_its_place_is_not(tmp_path: Path) -> None:
    prints = []
    for host, name, content in [
        ("a", "x.py", "1"),
        ("b", "x.py", "1"),
        ("c", "x.py", "2"),
        ("d", "y.py", "1"),
    ]:
        (tmp_path / host / "package" / "part").mkdir(parents=True)
        (tmp_path / host / "package" / "part" / name).write_text(content)
        prints.append(agreement.code_fingerprint([tmp_path / host / "package"]))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_the_code_that_is_compared_is_there() -> None:
    for directory in agreement.SOURCES:
        assert list(directory.rglob("*.py")), directory


@pytest.mark.parametrize(
    "what",
    [
        "code",
        "version of torch",
        "version of deepspeed",
        "version of triton",
        "--allow_change",
    ],
)
def test_a_rank_with_other_software_is_named(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(of_ranks: list[dict[str, str]], mine: dict[str, str]) -> None:
        of_ranks[:] = [
            mine | {"host": "a"},
            mine | {"host": "b", what: "another"},
            mine | {"host": "b"},
        ]

    monkeypatch.setattr(agreement.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(agreement.dist, "all_gather_object", gather)
    config, stream = SimpleNamespace(to_json=lambda: "{}"), SimpleNamespace(fingerprint="")
    with pytest.raises(
        UserError,
        match=rf"^rank 1 \(host b\) differs from rank 0 \(host a\) in {what}; give every host",
    ):
        agreement.require_agreement(config, [stream])  # type: ignore[arg-type]


def test_of_many_ranks_the_first_are_named_and_the_hosts_of_the_others() -> None:
    hosts = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    named = agreement._named(range(1, 12), hosts)
    assert named.startswith("rank 1 (host a), rank 2 (host a), ")
    assert named.endswith("rank 8 (host c) and 3 more (on c)")
