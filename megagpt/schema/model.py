"""The `megagpt.model` section: the shape of a GPT, published presets, number of parameters."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import model_validator

from megagpt.schema.arithmetic import nearest_divisors, round_up
from megagpt.schema.fields import Section, execution, identity, refuse

PresetName = Literal[
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "gpt2-124m",
    "gpt2-355m",
    "gpt2-774m",
    "gpt2-1.5b",
    "gpt3-125m",
    "gpt3-350m",
    "gpt3-760m",
    "gpt3-1.3b",
    "gpt3-2.7b",
    "gpt3-6.7b",
    "gpt3-13b",
    "gpt3-175b",
]
GPT2_VOCABULARY = 50257  # the byte-level BPE of GPT-2, which GPT-3 uses too

# GPT-2: Radford et al. 2019, table 2; numbers of heads from the released weights; also by the names
# of their release. GPT-3: table 2.1 of arXiv 2005.14165. Two of its rows are inconsistent (hidden
# size != heads x head size), so these have the closest consistent shape: the 1.3B row says 24 heads
# of 128 for a hidden size of 2048 (we use 16 heads), the 13B row says 5140 for 40 heads of 128 (we
# use 5120).
_SHAPES: dict[str, tuple[int, int, int, int]] = {  # layers, hidden size, heads, sequence length
    "gpt2": (12, 768, 12, 1024),
    "gpt2-medium": (24, 1024, 16, 1024),
    "gpt2-large": (36, 1280, 20, 1024),
    "gpt2-xl": (48, 1600, 25, 1024),
    "gpt2-124m": (12, 768, 12, 1024),
    "gpt2-355m": (24, 1024, 16, 1024),
    "gpt2-774m": (36, 1280, 20, 1024),
    "gpt2-1.5b": (48, 1600, 25, 1024),
    "gpt3-125m": (12, 768, 12, 2048),
    "gpt3-350m": (24, 1024, 16, 2048),
    "gpt3-760m": (24, 1536, 16, 2048),
    "gpt3-1.3b": (24, 2048, 16, 2048),
    "gpt3-2.7b": (32, 2560, 32, 2048),
    "gpt3-6.7b": (32, 4096, 32, 2048),
    "gpt3-13b": (40, 5120, 40, 2048),
    "gpt3-175b": (96, 12288, 96, 2048),
}
PRESETS: dict[str, dict[str, int]] = {
    name: dict(
        zip(
            ("num_layers", "hidden_size", "num_heads", "sequence_length"),
            _SHAPES[name],
            strict=True,
        )
    )
    for name in get_args(PresetName)
}


class ModelSection(Section):
    """The model as written in the file; keys beside a preset override it."""

    preset: PresetName | None = execution(None, "published shape; keys given with it override it")
    vocab_size: int | None = identity(
        None,
        "rows of the embedding, rounded up to a multiple of 128; default: the data's vocabulary",
        ge=1,
    )
    vocabulary: int | None = identity(
        None,
        "tokens that exist; further rows are untrained padding; default: the data's vocabulary, "
        "or vocab_size",
        ge=1,
    )
    num_layers: int = identity(..., "number of transformer blocks", ge=1)
    hidden_size: int = identity(..., "width of the residual stream", ge=1)
    num_heads: int = identity(..., "query heads per attention layer; must divide hidden_size", ge=1)
    num_kv_heads: int = identity(
        lambda keys: keys["num_heads"],
        "key and value heads; must divide num_heads; default: num_heads",
        ge=1,
    )
    sequence_length: int = identity(1024, "tokens of one training sequence", ge=1)
    position: Literal["learned", "rotary"] = identity(
        "learned", "position encoding: a learned table or rotary"
    )
    norm: Literal["layernorm", "rmsnorm"] = identity(
        "layernorm", "normalisation before each sub-layer"
    )
    activation: Literal["gelu", "swiglu"] = identity(
        "gelu",
        "MLP: gelu is 4 x hidden_size wide, swiglu 8/3 x hidden_size rounded up to a multiple of "
        "128",
    )
    bias: bool = identity(
        True, "bias vectors in the linear layers (never the head) and in layernorm"
    )
    dropout: float = identity(0.0, "probability of dropping an activation in training", ge=0, lt=1)
    tie_embeddings: bool = identity(True, "the head shares the token embedding's weight")
    init_std: float = identity(0.02, "standard deviation of the initial weights", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, document: Any) -> Any:
        preset = document.get("preset") if isinstance(document, dict) else None
        return {**PRESETS.get(preset, {}), **document} if isinstance(preset, str) else document

    @model_validator(mode="after")
    def _check_heads(self) -> ModelSection:
        problems = []
        if self.hidden_size % self.num_heads:
            problems.append(
                ("num_heads", _does_not_divide(self.num_heads, "hidden_size", self.hidden_size))
            )
        elif self.position == "rotary" and self.head_size % 2:
            problems.append(
                (
                    "position",
                    f"rotary needs an even head size (found {self.head_size}); change num_heads",
                )
            )
        if self.num_heads % self.num_kv_heads:
            problems.append(
                ("num_kv_heads", _does_not_divide(self.num_kv_heads, "num_heads", self.num_heads))
            )
        refuse(problems)
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        if self.activation == "gelu":
            return 4 * self.hidden_size
        return round_up(-(-8 * self.hidden_size // 3), 128)

    @property
    def published_vocabulary(self) -> int | None:
        """The vocabulary that the preset was published with, for planning without the data."""
        return GPT2_VOCABULARY if self.preset else None


class ModelConfig(ModelSection):
    """The model with every value known; `vocab_size` is the number of rows of the embedding."""

    vocab_size: int = identity(
        ..., "rows of the embedding; in a resolved run a multiple of 128", ge=1
    )
    vocabulary: int = identity(
        lambda keys: keys["vocab_size"], "tokens that exist; further rows are padding", ge=1
    )

    @property
    def num_parameters(self) -> int:
        """Trained parameters, each counted once; a tied head counts with the embedding."""
        tables = self.vocab_size * (1 if self.tie_embeddings else 2)
        positions = self.sequence_length if self.position == "learned" else 0
        return (
            (tables + positions) * self.hidden_size
            + self.num_layers * self.block_parameters
            + self.norm_parameters
        )

    @property
    def block_matmul_parameters(self) -> int:
        """Weights of one block that multiply activations: four attention matrices and the MLP's."""
        key_value_size = self.num_kv_heads * self.head_size
        attention = 2 * self.hidden_size * self.hidden_size + 2 * self.hidden_size * key_value_size
        mlp_matrices = 2 if self.activation == "gelu" else 3
        return attention + mlp_matrices * self.hidden_size * self.mlp_size

    @property
    def block_parameters(self) -> int:
        """All trained parameters of one block."""
        return self.block_matmul_parameters + self._block_biases + 2 * self.norm_parameters

    @property
    def _block_biases(self) -> int:
        if not self.bias:
            return 0
        qkv = self.hidden_size + 2 * self.num_kv_heads * self.head_size
        mlp_up = self.mlp_size * (1 if self.activation == "gelu" else 2)
        return qkv + self.hidden_size + mlp_up + self.hidden_size

    @property
    def norm_parameters(self) -> int:
        """All trained parameters of one norm."""
        return self.hidden_size * (2 if self.norm == "layernorm" and self.bias else 1)


def _does_not_divide(value: int, whole_key: str, whole: int) -> str:
    return f"{value} does not divide {whole_key} {whole}: use {nearest_divisors(value, whole)}"
