"""Find the files that a path, a directory or a pattern names, with what they hold."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megagpt.data.compression import SUFFIXES, SourceFile, name_without_compression
from megagpt.data.kinds import (
    KIND_OF_SUFFIX,
    ROWS,
    TEXT_SUFFIXES,
    ForeignFileError,
    Recognized,
    recognize,
)
from megagpt.utils import UserError

# What lies beside rows and says something about them.
ABOUT_ROWS = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog)\b.*|"
    r"(dataset_infos?|dataset_dict|state|metadata|manifest)\.json",
    re.IGNORECASE,
)


class FoundFiles:
    """The files to read, in the order of their paths, as a shell and Python may sort otherwise.

    `notes` say what was found and is not read.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Raise UserError for a name without a file, and for a file that cannot be read."""
        self.notes: list[str] = []
        files: dict[Path, Recognized] = {}
        again: list[Path] = []
        for name in names:
            for found in self._named(name):
                # The cache of the hub has each file twice: as a blob, and as a link to it.
                first = files.setdefault(found.file.path.resolve(), found)
                if first is not found and first.file.path == found.file.path:
                    again.append(found.file.path)
        if again:
            more = f" and {len(again) - 1} others" if again[1:] else ""
            self.notes.append(f"{again[0]}{more}: named more than once, read once")
        self.files = tuple(sorted(files.values(), key=lambda found: found.file.path))
        likely_rows = [str(found.file.path) for found in self.files if found.looks_like_rows]
        if likely_rows:
            more = f" and {len(likely_rows) - 1} others" if likely_rows[1:] else ""
            self.notes.append(
                f"{likely_rows[0]}{more}: its first line is JSON, but a .txt is read as text; call "
                "it .jsonl to read its rows"
            )

    def _named(self, name: str) -> list[Recognized]:
        """Return what one path or pattern names; a path that exists is taken as it is written."""
        path = Path(name)
        if path.is_dir():
            return self._of_directory(path)
        if path.exists():
            return [recognize(SourceFile.found(path))]
        matches = sorted(Path(match) for match in glob.glob(_pattern(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if files:
            return [recognize(SourceFile.found(match)) for match in files]
        if matches:
            return [found for match in matches for found in self._of_directory(match)]
        raise UserError(f"--dataset {name}: no such file; {_advice(path)}")

    def _of_directory(self, directory: Path) -> list[Recognized]:
        """Return the files below a directory; either rows or texts, as both were hardly meant."""
        found: list[Recognized] = []
        foreign: list[str] = []
        for path in _visible_files(directory):
            try:
                found.append(recognize(SourceFile.found(path)))
            except ForeignFileError as error:
                if name_without_compression(path).endswith((*KIND_OF_SUFFIX, *TEXT_SUFFIXES)):
                    raise
                foreign.append(f"{path.name} is {error.what}")
        if foreign:
            more = f", and {len(foreign) - 1} others" if foreign[1:] else ""
            self.notes.append(f"{directory}: not read, as it is no text: {foreign[0]}{more}")
        rows = [file for file in found if file.kind in ROWS and not _is_about_rows(file)]
        texts = [file for file in found if file.kind == "text" and not _is_about_rows(file)]
        if rows and texts:
            both = Counter(file.suffix or file.file.path.name for file in (*rows, *texts))
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(both.items()))
            example = both.most_common(1)[0][0]
            raise UserError(
                f"--dataset {directory}: has files of rows and files of text ({kinds}); name one "
                f'kind: "{directory}/**/*{example}"'
            )
        if rows:
            about = [file.file.path.name for file in found if _is_about_rows(file)]
            if about:
                self.notes.append(f"{directory}: not read: {', '.join(about)}")
            found = [file for file in found if not _is_about_rows(file)]
        self._note_splits(directory, rows)
        if not found:
            raise UserError(f"--dataset {directory}: has no file of text; name another directory")
        return found

    def _note_splits(self, directory: Path, rows: list[Recognized]) -> None:
        """Say that the files of several splits are read as one."""
        names = (re.match(r"(train|test|val|dev)", file.file.path.name) for file in rows)
        splits = sorted({match[1] for match in names if match})
        if len(splits) > 1:
            self.notes.append(
                f"{directory}: the files of {', '.join(splits)} are all read; to read one of them: "
                f'"{directory}/**/{splits[-1]}*"'
            )


def is_local(name: str) -> bool:
    """Return whether a name is of files here: not stdlib, and not a dataset on the hub."""
    if os.path.lexists(name) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None:
        return True
    stem = name_without_compression(Path(name))
    return stem.endswith((*KIND_OF_SUFFIX, *TEXT_SUFFIXES)) or name.endswith(SUFFIXES)


def _pattern(path: Path) -> str:
    """Return a pattern whose first directories are taken as they are written, if they exist."""
    there = next(parent for parent in path.parents if parent.exists())
    return str(Path(glob.escape(str(there)), path.relative_to(there)))


def _visible_files(directory: Path) -> Iterator[Path]:
    """Yield the files below a directory in the order of their paths, but no hidden ones."""
    paths = []
    for parent, directories, names in os.walk(directory, followlinks=True):
        directories[:] = [name for name in directories if not name.startswith(".")]
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    return (path for path in sorted(paths) if path.is_file())


def _is_about_rows(found: Recognized) -> bool:
    return ABOUT_ROWS.fullmatch(found.file.path.name) is not None


def _advice(path: Path) -> str:
    if "," in str(path) and os.path.exists(str(path).partition(",")[0]):
        return "write several names with spaces between them, not commas"
    if glob.has_magic(str(path)):
        return "check the pattern; ** goes into directories"
    near = path.parent if path.parent.is_dir() else None
    return f"{near} has {len(list(near.iterdir()))} others" if near else f"nor {path.parent}"
