"""Choose the validation documents by position alone, so that an interrupted preparation agrees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from megagpt.data.corpora import Corpus, TextPiece
from megagpt.data.manifest import FRACTION_OF_MANY, Split

FEW_DOCUMENTS = 20
FRACTION_OF_FEW = 0.1


def assign_splits(
    source: Corpus, fraction: float | None, skip: int = 0
) -> Iterator[tuple[Split, TextPiece]]:
    """Yield each piece with its split, except the first `skip`.

    From twenty documents on, whole documents are held out at equal distances, beginning with
    the first: `fraction` of them (default 0.01). With fewer, the end of the text is held out:
    `fraction` of its characters (default 0.1). Conversations are held out whole, also of few.
    """
    characters = characters_of_few(source)
    if characters is None:
        return _every_nth(source, FRACTION_OF_MANY if fraction is None else fraction, skip)
    held_out = FRACTION_OF_FEW if fraction is None else fraction
    if source.has_conversations:
        return _every_nth(source, held_out, skip)
    cut = round(characters * (1 - held_out))
    return itertools.islice(_head_and_tail(source, cut, characters), skip, None)


def characters_of_few(source: Corpus) -> int | None:
    """Return the length of a source of fewer than twenty documents; None for a larger one.

    Reads at most twenty documents.
    """
    characters = 0
    for piece in source.pieces():
        if piece.document >= FEW_DOCUMENTS - 1:
            return None
        characters += len(piece.text)
    return characters


def _every_nth(source: Corpus, fraction: float, skip: int) -> Iterator[tuple[Split, TextPiece]]:
    share, of = Fraction(str(fraction)).as_integer_ratio()
    for piece in source.pieces(skip):
        held_out_before = -(-piece.document * share // of)  # rounded up
        held_out_after = -(-(piece.document + 1) * share // of)
        yield ("val" if held_out_after > held_out_before else "train"), piece


def _head_and_tail(source: Corpus, cut: int, total: int) -> Iterator[tuple[Split, TextPiece]]:
    """Yield the text up to the first line break from `cut` on as train, then the rest as val.

    The document that contains the cut becomes two. If no line break comes before the end of the
    text, the cut is where it is: otherwise nothing would be held out.
    """
    position = 0
    first_held_out = True
    for piece in source.pieces():
        place = cut - position
        head, tail = _cut_at_line(piece.text, place)
        if 0 < place < len(piece.text) and not tail and position + len(piece.text) == total:
            head, tail = piece.text[:place], piece.text[place:]
        if head:
            yield "train", replace(piece, text=head, ends=piece.ends and not tail)
        if tail:
            yield "val", replace(piece, text=tail, starts=piece.starts or first_held_out)
            first_held_out = False
        position += len(piece.text)


def _cut_at_line(text: str, place: int) -> tuple[str, str]:
    if place <= 0 or place >= len(text):
        return (text, "") if place > 0 else ("", text)
    line_end = text.find("\n", place) + 1 or place
    return text[:line_end], text[line_end:]
