"""Find the words that this project does not use: python -m tests.project.words [PATH ...]

`make check` runs it. It reads Markdown whole, and the comments and strings of Python; names are
not read, nor strings of one word, which are keys. A phrase is found across the end of a line, and
across two adjacent string literals.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests import REPOSITORY

# A regular expression, where a space is any gap -> what to say. Literary words first, then words
# that the glossary of docs/architecture.md replaces.
WORDS = {
    r"acquaint\w*": "tell",
    r"acquit\w*": "clear",
    r"afresh": "again",
    r"albeit": "although",
    r"amidst?": "in, during",
    r"amongst": "among",
    r"anew": "again",
    r"beforehand": "before, in advance",
    r"beneath": "below, under",
    r"bears": "has",
    r"dealt": "assigned",
    r"farewell": "last message",
    r"for want of": "without, for lack of",
    r"hears? of": "is told of",
    r"hence(?:forth)?": "so, therefore",
    r"hitherto": "so far",
    r"in vain": "without success",
    r"(?:is|are|was|were) to be": "must be, will be",
    r"learnt": "learned",
    r"lest": "so that ... not",
    r"likewise": "also, the same",
    r"lopsided": "uneven",
    r"luckily": "by chance",
    r"no word (?:of|from)": "nothing about, no message from",
    r"(?:left|leaves) no word": "wrote nothing",
    r"nought": "nothing, 0",
    r"ought": "should",
    r"outlasts?": "takes longer than",
    r"reckon(?:s|ed|ing)?": "estimate",
    r"save for": "except",
    r"seldom": "rarely",
    r"shall": "must, will",
    r"singly": "one at a time",
    r"slivers?": "small remainder",
    r"so long(?! (?:as|that))": "for that time, until then",
    r"spoil(?:s|ed|ing|t)?": "corrupt, damage",
    r"stray(?:s|ed|ing)": "differ, deviate",
    r"(?:tells?|telling|told)(?: \w+)? apart": "distinguish",
    r"thereby|therein|thereof|thereupon": "by it, in it, of it, then",
    r"unasked": "unless asked",
    r"upon": "on",
    r"vouch(?:es|ed)?(?: for)?": "confirm, list",
    r"whence": "from where",
    r"whereas|whereby|wherein|whereof|whereupon": "while, by which, in which, of which, then",
    r"whilst": "while",
    r"wish(?:es|ed)?": "want, request",
    r"without a word": "silently",
    # Glossary.
    r"mini-?batch(?:es)?": "micro-batch, or global batch",
    r"micro-?steps?": "micro-batch",
    r"optimisers?": "optimizer",
    r"virtual (?:pipeline )?stages?": "chunk",
    r"(?:data|pipeline|tensor|mesh)(?:-parallel)? dimensions?": "axis (a tensor has dims)",
    r"ZeRO levels?": "ZeRO stage",
    r"yardsticks?": "tolerance, reference",
}


_THEMSELVES = ("tests/project/words.py", "tests/project/test_words.py")
_GAP = r"""(?:\s|["'#>*]|\bf(?=["']))+"""
_PATTERN = re.compile(
    "|".join(
        f"(?P<w{number}>(?<![\\w-])(?:{word.replace(' ', _GAP)})(?![\\w-]))"
        for number, word in enumerate(WORDS)
    ),
    re.IGNORECASE,
)
_NAME = re.compile(r"""[a-zA-Z]?["'][\w.-]*["']""")  # a string of one word: a key, not prose
_PROSE = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def prose(source: str) -> str:
    """Return the comments and strings of Python in their places, NUL in place of the rest."""
    lines = source.splitlines(keepends=True)
    kept = [[c if c.isspace() else "\0" for c in line] for line in lines]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _PROSE or _NAME.fullmatch(token.string):
            continue
        (first, start), (last, end) = token.start, token.end
        for row in range(first - 1, last):
            left = start if row == first - 1 else 0
            right = end if row == last - 1 else len(lines[row])
            kept[row][left:right] = lines[row][left:right]
    return "".join("".join(line) for line in kept)


def findings(text: str, where: str) -> Iterator[str]:
    """Yield a line for each unwanted word of a text: ``where:line: "WORD"; say "..."``."""
    advice = list(WORDS.values())
    for match in _PATTERN.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        word = re.sub(_GAP, " ", match.group())
        number = int(str(match.lastgroup).removeprefix("w"))
        yield f'{where}:{line}: "{word}"; say "{advice[number]}"'


def files() -> list[Path]:
    """Return the Markdown and Python files that must be clean, relative to the repository."""
    found = list(REPOSITORY.glob("*.md"))
    for folder in ("benchmarks", "docs", "kernels", "launch", "megagpt", "tests"):
        found += (p for p in (REPOSITORY / folder).rglob("*") if p.suffix in (".md", ".py"))
    relative = (path.relative_to(REPOSITORY) for path in found)
    return sorted(path for path in relative if str(path) not in _THEMSELVES)


def main(arguments: Sequence[str]) -> int:
    """Print what was found in these files, or in all that must be clean; 1 where that is any."""
    found = []
    for path in [Path(name) for name in arguments] or files():
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        found += findings(prose(text) if path.suffix == ".py" else text, str(path))
    print("\n".join(found) if found else "words: no word of the list is used")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
