"""The `megagpt.model` section: what a GPT is made of, presets, number of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import model_validator

from megagpt.schema.arithmetic import nearest_divisors, round_up
from megagpt.schema.fields import Section, execution, identity, later_identity, refuse, section
from megagpt.schema.presets import OPEN_MODELS, OPEN_VOCABULARIES
from megagpt.schema.rope import DynamicScaling, LongRopeScaling, RopeScaling

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
    "llama3.2-1b",
    "llama3-8b",
    "llama3-70b",
    "mistral-7b",
    "qwen3-0.6b",
    "qwen3-8b",
    "qwen3-32b",
    "smollm2-135m",
    "olmo2-7b",
    "pythia-1b",
    "gemma2-2b",
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
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(
        zip(("num_layers", "hidden_size", "num_heads", "sequence_length"), shape, strict=True)
    )
    for name, shape in _SHAPES.items()
} | OPEN_MODELS
GATED = ("swiglu", "geglu")  # activations of a gate, which multiplies a second projection


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
    num_heads: int = identity(..., "query heads per attention layer", ge=1)
    num_kv_heads: int = identity(
        lambda keys: keys["num_heads"],
        "key and value heads; must divide num_heads; default: num_heads",
        ge=1,
    )
    head_size: int = later_identity(
        lambda keys: keys["hidden_size"] // keys["num_heads"],
        "width of one head; default: hidden_size / num_heads, which must then divide",
        ge=1,
    )
    sequence_length: int = identity(1024, "tokens of one training sequence", ge=1)
    position: Literal["learned", "rotary"] = identity(
        "learned", "position encoding: a learned table or rotary"
    )
    rope_base: float = later_identity(10_000.0, "base of the rotary frequencies", gt=1)
    rope_fraction: float = later_identity(
        1.0, "share of a head's channels that are rotated, the first ones", gt=0, le=1
    )
    rope_scaling: RopeScaling | None = section(None, "rotary positions for longer contexts")
    norm: Literal["layernorm", "rmsnorm"] = identity("layernorm", "kind of normalisation")
    norm_epsilon: float = later_identity(
        1e-5, "added to the variance or mean square that a norm divides by", gt=0
    )
    norm_weight_offset: Literal[0, 1] = later_identity(
        0, "added to a norm's weight; 1: weights start at 0 and decide the difference (Gemma)"
    )
    post_norm: Literal["none", "instead", "both"] = later_identity(
        "none",
        "norm of what attention and MLP return: instead of the norm before them (OLMo 2), or both "
        "(Gemma 2)",
    )
    qk_norm: Literal["none", "per_head", "whole"] = later_identity(
        "none",
        "RMS norm of queries and keys before rotation: of each head (Qwen 3) or of all heads "
        "together (OLMo 2)",
    )
    parallel_residual: bool = later_identity(
        False, "attention and MLP read the same input and are added together (GPT-NeoX)"
    )
    activation: Literal["gelu", "gelu_exact", "squared_relu", "swiglu", "geglu"] = identity(
        "gelu",
        "MLP's function: gelu in its tanh form, gelu_exact, squared_relu; with a gate swiglu "
        "(SiLU) or geglu (gelu in its tanh form)",
    )
    mlp_size: int = later_identity(
        lambda keys: _usual_mlp_size(keys["hidden_size"], keys["activation"]),
        "width of the MLP; default: 4 x hidden_size, with a gate 8/3 x hidden_size rounded up to a "
        "multiple of 128",
        ge=1,
    )
    bias: bool = identity(
        True, "bias vectors in the linear layers (never the head) and in layernorm"
    )
    qkv_bias: bool = later_identity(
        lambda keys: keys["bias"], "bias vectors of queries, keys and values; default: bias"
    )
    output_bias: bool = later_identity(
        lambda keys: keys["bias"], "bias vector of attention's output; default: bias"
    )
    mlp_bias: bool = later_identity(
        lambda keys: keys["bias"], "bias vectors of the MLP; default: bias"
    )
    norm_bias: bool = later_identity(
        lambda keys: keys["bias"] and keys["norm"] == "layernorm",
        "bias vectors of layernorm, rmsnorm has none; default: bias",
    )
    score_scale: float | None = later_identity(
        None, "factor of the attention scores; default: 1 / sqrt(head_size)", gt=0
    )
    score_softcap: float | None = later_identity(
        None, "limit c of the attention scores: c tanh(score / c)", gt=0
    )
    sliding_window: int | None = later_identity(
        None, "most recent tokens that a token sees, itself included; default: all", ge=1
    )
    sliding_window_pattern: tuple[Literal["sliding", "full"], ...] = later_identity(
        ("sliding",),
        "which layers have the window, repeated from the first layer to the last",
        strict=False,
        min_length=1,
    )
    embedding_scale: float = later_identity(1.0, "factor of the token embedding", gt=0)
    logit_softcap: float | None = later_identity(
        None, "limit c of the logits: c tanh(logit / c)", gt=0
    )
    z_loss: float = later_identity(
        0.0, "factor of the squared log-sum-exp that is added to the training loss", ge=0
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
    def _check_keys_together(self) -> ModelSection:
        problems = []
        if self.hidden_size % self.num_heads and "head_size" not in self.model_fields_set:
            problems.append(
                ("num_heads", _does_not_divide(self.num_heads, "hidden_size", self.hidden_size))
            )
        else:
            problems += self._rotary_problems()
        if self.num_heads % self.num_kv_heads:
            problems.append(
                ("num_kv_heads", _does_not_divide(self.num_kv_heads, "num_heads", self.num_heads))
            )
        if self.norm_bias and self.norm == "rmsnorm":
            problems.append(("norm_bias", 'has no effect with norm "rmsnorm"; remove it'))
        if self.sliding_window is None and "full" in self.sliding_window_pattern:
            problems.append(
                ("sliding_window_pattern", "has no effect without sliding_window; remove it")
            )
        refuse(problems)
        return self

    def _rotary_problems(self) -> Iterator[tuple[str, str]]:
        if self.position == "learned":
            for key in ("rope_base", "rope_fraction", "rope_scaling"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield key, 'has no effect with position "learned", only with "rotary"'
            return
        if self.rotated_size % 2 or not self.rotated_size:
            found = f"found {self.rotated_size}"
            if self.rope_fraction == 1:
                yield "position", f"rotary needs an even head size ({found}); change num_heads"
            else:
                yield "rope_fraction", f"must rotate an even number of a head's channels ({found})"
        elif isinstance(self.rope_scaling, DynamicScaling) and self.rotated_size == 2:
            yield "rope_scaling.type", "dynamic needs more than one pair of rotated channels"
        elif isinstance(self.rope_scaling, LongRopeScaling):
            for key in ("short_factor", "long_factor"):
                length = len(getattr(self.rope_scaling, key))
                if length != self.rotated_size // 2:
                    yield (
                        f"rope_scaling.{key}",
                        f"one factor for each pair of rotated channels (found {length}, need "
                        f"{self.rotated_size // 2})",
                    )

    @property
    def rotated_size(self) -> int:
        """Channels of a head that are rotated; 0 with learned positions."""
        return int(self.head_size * self.rope_fraction) if self.position == "rotary" else 0

    @property
    def reread_after(self) -> int | None:
        """The length of a text after which all its keys are rotated otherwise (longrope)."""
        scaling = self.rope_scaling
        return scaling.original_length if isinstance(scaling, LongRopeScaling) else None

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate, and so three matrices."""
        return self.activation in GATED

    def window(self, layer: int) -> int | None:
        """Return the most recent tokens that a token sees in a layer; None: all of a sequence."""
        slides = self.sliding_window_pattern[layer % len(self.sliding_window_pattern)] == "sliding"
        if self.sliding_window is None or not slides:
            return None
        return self.sliding_window if self.sliding_window < self.sequence_length else None

    @property
    def published_vocabulary(self) -> int | None:
        """The vocabulary that the preset was published with, for planning without the data."""
        return OPEN_VOCABULARIES.get(self.preset, GPT2_VOCABULARY) if self.preset else None


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
    def query_size(self) -> int:
        """Width of all query heads together, which is also that of attention's result."""
        return self.num_heads * self.head_size

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together, which is also that of the values."""
        return self.num_kv_heads * self.head_size

    @property
    def mlp_matmul_parameters(self) -> int:
        """Weights of one MLP that multiply activations."""
        return (3 if self.gated else 2) * self.hidden_size * self.mlp_size

    @property
    def block_matmul_parameters(self) -> int:
        """Weights of one block that multiply activations: four attention matrices and the MLP's."""
        attention = 2 * self.hidden_size * (self.query_size + self.key_value_size)
        return attention + self.mlp_matmul_parameters

    @property
    def block_parameters(self) -> int:
        """All trained parameters of one block."""
        norms = 4 if self.post_norm == "both" else 2
        return (
            self.block_matmul_parameters
            + self._block_biases
            + norms * self.norm_parameters
            + self._qk_norm_parameters
        )

    @property
    def _block_biases(self) -> int:
        qkv = self.query_size + 2 * self.key_value_size
        mlp_up = self.mlp_size * (2 if self.gated else 1)
        return (
            self.qkv_bias * qkv
            + self.output_bias * self.hidden_size
            + self.mlp_bias * (mlp_up + self.hidden_size)
        )

    @property
    def _qk_norm_parameters(self) -> int:
        whole = self.query_size + self.key_value_size
        return {"none": 0, "per_head": 2 * self.head_size, "whole": whole}[self.qk_norm]

    @property
    def norm_parameters(self) -> int:
        """All trained parameters of one norm of the residual stream's width."""
        return self.hidden_size * (2 if self.norm_bias else 1)


def _usual_mlp_size(hidden_size: int, activation: str) -> int:
    return round_up(-(-8 * hidden_size // 3), 128) if activation in GATED else 4 * hidden_size


def _does_not_divide(value: int, whole_key: str, whole: int) -> str:
    return f"{value} does not divide {whole_key} {whole}: use {nearest_divisors(value, whole)}"
