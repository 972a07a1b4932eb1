"""What a configuration says of token files, because they do not say it themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megagpt.schema.megagpt import MegagptSection


@dataclass(frozen=True)
class Declared:
    """The directory of the tokenizer that made the ids, or how many ids there are.

    `validation_fraction` is the share of the tokens that is held out, from the end.
    """

    tokenizer: Path | None = None
    vocabulary: int | None = None
    validation_fraction: float | None = None

    @classmethod
    def by(cls, config: MegagptSection) -> Declared:
        """Return what a configuration declares; the model's vocabulary is that of the ids."""
        data, model = config.data, config.model
        return cls(
            Path(data.tokenizer) if data.tokenizer else None,
            model.vocabulary or model.vocab_size or model.published_vocabulary,
            data.validation_fraction,
        )


NOTHING = Declared()
