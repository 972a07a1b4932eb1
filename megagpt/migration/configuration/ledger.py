"""What became of each key of another trainer's configuration, and the document made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megagpt.schema.errors import shown
from megagpt.schema.json_reader import ABSENT, Document, put, value_at

Kind = Literal["taken", "changes nothing", "dropped"]


@dataclass(frozen=True)
class Verdict:
    """What became of one key."""

    key: str
    value: Any
    kind: Kind
    text: str

    def line(self) -> str:
        """Return a line for people: `train_iters 5000: taken as megagpt.training.total_steps`."""
        said = f"{self.kind} {self.text}" if self.kind == "taken" else f"{self.kind}: {self.text}"
        return f"{self.key} {shown(self.value)}: {said}"


@dataclass
class Ledger:
    """The document so far, a verdict for each key, and what has no equal here.

    `needed` maps keys of ours to why they must be given by hand.
    """

    document: Document = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    needed: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any) -> None:
        """Set a key of ours."""
        put(self.document, tuple(key.split(".")), value)

    def get(self, key: str) -> Any:
        """Return what a key of ours has, None if it is absent."""
        value = value_at(self.document, tuple(key.split(".")))
        return None if value is ABSENT else value

    def take(self, key: str, value: Any, ours: str, meant: Any = None, why: str = "") -> None:
        """Take a value, or what it means here, at a key of ours."""
        found = value if meant is None else meant
        self.put(ours, found)
        as_what = ours if found == value else f"{ours} {shown(found)}"
        self.took(key, value, f"as {as_what}", why)

    def took(self, key: str, value: Any, how: str, why: str = "") -> None:
        """Record that a value was taken, and how."""
        self.verdicts.append(Verdict(key, value, "taken", f"{how} ({why})" if why else how))

    def nothing(self, key: str, value: Any, why: str) -> None:
        """Record a value without which the run would be the same."""
        self.verdicts.append(Verdict(key, value, "changes nothing", why))

    def drop(self, key: str, value: Any, why: str) -> None:
        """Record a value that this trainer does not follow."""
        self.verdicts.append(Verdict(key, value, "dropped", why))

    def need(self, key: str, value: Any, ours: str, why: str) -> None:
        """Record a value that has no equal here, so that a key of ours must be given by hand."""
        self.drop(key, value, why)
        self.needed[ours] = f"{key} {shown(value)}: {why}"
