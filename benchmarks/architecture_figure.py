"""Draw the packages of megagpt from their imports: python -m benchmarks.architecture_figure.

Writes docs/figures/architecture.svg. A package stands one layer above the highest package that it
imports. Arrows that follow from other arrows are left out. The same sources give the same bytes, so
a test can tell when the picture is out of date.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
FIGURE = REPOSITORY / "docs" / "figures" / "architecture.svg"
ENTRY_MODULES = {  # modules beside the packages, each with its package
    "utils": "common",
    "config": "schema",
    "dataset": "data",
    "download_data": "data",
    "distributed": "parallel",
    "train": "run",
}

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 236, 76, 26, 34, 20  # pixels
CHARACTERS_PER_LINE = 38


def package_files() -> dict[str, list[Path]]:
    """Return the files of each package; an entry module counts as part of its package."""
    found: dict[str, list[Path]] = defaultdict(list)
    for root in ("megagpt", "kernels", "launch"):
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            found[package_of(path.relative_to(REPOSITORY).with_suffix("").parts)].append(path)
    del found["megagpt"]  # its __init__.py
    return dict(found)


def package_of(parts: tuple[str, ...]) -> str:
    """Return the package of a module, given as the parts of its dotted name."""
    if parts[0] != "megagpt" or len(parts) == 1 or parts[1] == "__init__":
        return parts[0]
    return ENTRY_MODULES.get(parts[1], parts[1])


def imports(path: Path) -> Iterator[str]:
    """Yield the packages that a file imports from, its own included."""
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
                yield package_of(parts)


def arrows(files: dict[str, list[Path]]) -> dict[str, set[str]]:
    """Return what each package imports from, without itself."""
    return {
        package: {other for path in paths for other in imports(path)} & set(files) - {package}
        for package, paths in files.items()
    }


def layers(below: dict[str, set[str]]) -> dict[str, int]:
    """Return the layer of each package: 0 imports nothing.

    Raises ValueError if packages import in a circle.
    """
    found: dict[str, int] = {}
    while len(found) < len(below):
        ready = [
            package for package in below if package not in found and below[package] <= set(found)
        ]
        if not ready:
            raise ValueError(f"imports go in a circle among {sorted(set(below) - set(found))}")
        found |= {
            package: 1 + max((found[other] for other in below[package]), default=-1)
            for package in ready
        }
    return found


def direct(below: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the arrows that do not follow from others."""

    def reach(package: str) -> set[str]:
        return below[package].union(*(reach(other) for other in below[package]))

    return {
        package: others - set().union(*(reach(other) for other in others))
        for package, others in below.items()
    }


def purpose(package: str) -> str:
    """Return the first line of a package's docstring."""
    root = REPOSITORY if package in ("kernels", "launch") else REPOSITORY / "megagpt"
    path = root / package / "__init__.py"
    path = path if path.exists() else root / f"{package}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n\n")[0].replace("\n", " ").replace("``", "")


def folded(text: str, width: int, most: int) -> list[str]:
    """Return at most ``most`` lines of at most ``width`` characters, cut with an ellipsis."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1].rstrip(".,:;") + " ..."]
    return lines


def draw() -> str:
    """Return the picture as SVG."""
    files = package_files()
    below = arrows(files)
    level = layers(below)
    rows: dict[int, list[str]] = defaultdict(list)
    for package in sorted(files):
        rows[level[package]].append(package)
    widest = max(len(row) for row in rows.values())
    width = 2 * MARGIN + widest * BOX_WIDTH + (widest - 1) * GAP_X
    height = 2 * MARGIN + len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    place: dict[str, tuple[float, float]] = {}
    for layer, row in rows.items():
        left = (width - len(row) * BOX_WIDTH - (len(row) - 1) * GAP_X) / 2
        top = height - MARGIN - BOX_HEIGHT - layer * (BOX_HEIGHT + GAP_Y)
        place |= {package: (left + i * (BOX_WIDTH + GAP_X), top) for i, package in enumerate(row)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *_lines(place, direct(below)),
        *(
            part
            for package in sorted(files)
            for part in _box(package, place[package], files[package])
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lines(place: dict[str, tuple[float, float]], below: dict[str, set[str]]) -> Iterable[str]:
    for package in sorted(below):
        for other in sorted(below[package]):
            x1, y1 = place[package][0] + BOX_WIDTH / 2, place[package][1] + BOX_HEIGHT
            x2, y2 = place[other][0] + BOX_WIDTH / 2, place[other][1]
            middle = (y1 + y2) / 2
            yield (
                f'<path d="M{x1:g} {y1:g} C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" '
                'fill="none" stroke="#8a97a6" stroke-width="1.4"/>'
            )


def _box(package: str, corner: tuple[float, float], files: list[Path]) -> Iterable[str]:
    x, y = corner
    title = f"{package}/" if len(files) > 1 else f"{package}.py"
    fill = "#eef3f8" if package not in ("kernels", "launch") else "#f3eee4"
    count = f"{len(files)} files" if len(files) > 1 else ""
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        f'fill="{fill}" stroke="#4c6a88"/>'
    )
    yield (
        f'<text x="{x + 10:g}" y="{y + 20:g}" font-size="14" font-weight="bold">{title}</text>'
        f'<text x="{x + BOX_WIDTH - 10:g}" y="{y + 20:g}" font-size="10" fill="#5b6875" '
        f'text-anchor="end">{count}</text>'
    )
    for number, line in enumerate(folded(purpose(package), CHARACTERS_PER_LINE, 3)):
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
