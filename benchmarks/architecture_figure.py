"""Draw the packages of megagpt from their imports: python -m benchmarks.architecture_figure.

Writes docs/figures/architecture.svg. A package stands one floor above the highest package that it
imports; arrows that follow from other arrows are left out. The same sources give the same bytes, so
a test can tell when the picture is out of date.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
FIGURE = REPOSITORY / "docs" / "figures" / "architecture.svg"
FRONT_DOORS = {  # modules beside the packages, and the package that each one leads to
    "utils": "common",
    "config": "schema",
    "dataset": "data",
    "download_data": "data",
    "distributed": "parallel",
    "train": "run",
}

ROOM_WIDTH, ROOM_HEIGHT, GAP_X, GAP_Y, MARGIN = 236, 76, 26, 34, 20  # pixels
CHARACTERS_PER_LINE = 38


def rooms() -> dict[str, list[Path]]:
    """The files of each package, by the package's name; a front door counts to its package."""
    found: dict[str, list[Path]] = defaultdict(list)
    for root in ("megagpt", "kernels", "launch"):
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            found[room_of(path.relative_to(REPOSITORY).with_suffix("").parts)].append(path)
    del found["megagpt"]  # its __init__.py
    return dict(found)


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module given as the parts of its dotted name."""
    if parts[0] != "megagpt" or len(parts) == 1 or parts[1] == "__init__":
        return parts[0]
    return FRONT_DOORS.get(parts[1], parts[1])


def imports(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, its own among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "megagpt":
            names = [f"megagpt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] in ("kernels", "launch") or (parts[0] == "megagpt" and len(parts) > 1):
                yield room_of(parts)


def arrows(files: dict[str, list[Path]]) -> dict[str, set[str]]:
    """What each room imports from, without itself."""
    return {
        room: {other for path in paths for other in imports(path)} & set(files) - {room}
        for room, paths in files.items()
    }


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room: 0 imports nothing. Raises ValueError where imports go in a circle."""
    found: dict[str, int] = {}
    while len(found) < len(below):
        ready = [room for room in below if room not in found and below[room] <= set(found)]
        if not ready:
            raise ValueError(f"imports go in a circle among {sorted(set(below) - set(found))}")
        found |= {
            room: 1 + max((found[other] for other in below[room]), default=-1) for room in ready
        }
    return found


def necessary(below: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others."""

    def reach(room: str) -> set[str]:
        return below[room].union(*(reach(other) for other in below[room]))

    return {
        room: others - set().union(*(reach(other) for other in others))
        for room, others in below.items()
    }


def purpose(room: str) -> str:
    """The first line of the docstring of a room's package."""
    root = REPOSITORY if room in ("kernels", "launch") else REPOSITORY / "megagpt"
    path = root / room / "__init__.py"
    path = path if path.exists() else root / f"{room}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n\n")[0].replace("\n", " ").replace("``", "")


def folded(text: str, width: int, most: int) -> list[str]:
    """At most so many lines of at most so many characters, cut with an ellipsis."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1].rstrip(".,:;") + " ..."]
    return lines


def draw() -> str:
    """The picture as SVG."""
    files = rooms()
    below = arrows(files)
    level = floors(below)
    rows: dict[int, list[str]] = defaultdict(list)
    for room in sorted(files):
        rows[level[room]].append(room)
    widest = max(len(row) for row in rows.values())
    width = 2 * MARGIN + widest * ROOM_WIDTH + (widest - 1) * GAP_X
    height = 2 * MARGIN + len(rows) * (ROOM_HEIGHT + GAP_Y) - GAP_Y
    place: dict[str, tuple[float, float]] = {}
    for floor, row in rows.items():
        left = (width - len(row) * ROOM_WIDTH - (len(row) - 1) * GAP_X) / 2
        top = height - MARGIN - ROOM_HEIGHT - floor * (ROOM_HEIGHT + GAP_Y)
        place |= {room: (left + i * (ROOM_WIDTH + GAP_X), top) for i, room in enumerate(row)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *_lines(place, necessary(below)),
        *(part for room in sorted(files) for part in _room(room, place[room], files[room])),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lines(place: dict[str, tuple[float, float]], below: dict[str, set[str]]) -> Iterable[str]:
    for room in sorted(below):
        for other in sorted(below[room]):
            x1, y1 = place[room][0] + ROOM_WIDTH / 2, place[room][1] + ROOM_HEIGHT
            x2, y2 = place[other][0] + ROOM_WIDTH / 2, place[other][1]
            middle = (y1 + y2) / 2
            yield (
                f'<path d="M{x1:g} {y1:g} C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" '
                'fill="none" stroke="#8a97a6" stroke-width="1.4"/>'
            )


def _room(room: str, corner: tuple[float, float], files: list[Path]) -> Iterable[str]:
    x, y = corner
    title = f"{room}/" if len(files) > 1 else f"{room}.py"
    fill = "#eef3f8" if room not in ("kernels", "launch") else "#f3eee4"
    count = f"{len(files)} files" if len(files) > 1 else ""
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{ROOM_WIDTH}" height="{ROOM_HEIGHT}" rx="6" '
        f'fill="{fill}" stroke="#4c6a88"/>'
    )
    yield (
        f'<text x="{x + 10:g}" y="{y + 20:g}" font-size="14" font-weight="bold">{title}</text>'
        f'<text x="{x + ROOM_WIDTH - 10:g}" y="{y + 20:g}" font-size="10" fill="#5b6875" '
        f'text-anchor="end">{count}</text>'
    )
    for number, line in enumerate(folded(purpose(room), CHARACTERS_PER_LINE, 3)):
        yield (
            f'<text x="{x + 10:g}" y="{y + 37 + 14 * number:g}" font-size="11" fill="#1d2329">'
            f"{escape(line)}</text>"
        )


def main() -> int:
    """Write the picture."""
    FIGURE.write_text(draw())
    print(FIGURE.relative_to(REPOSITORY))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
