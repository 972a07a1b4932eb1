"""The published architectures that our model can be: one table, read in both directions.

`needs` and `keys` of an architecture relate its config.json to `megagpt.model`, `modules` its
tensors to ours. transformers is not needed: what its models compute is known here, and tested
(tests/model/test_model_parity.py, tests/huggingface/test_families.py).
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from megagpt.config import ModelConfig
from megagpt.huggingface.keys import (
    Document,
    Fixed,
    Key,
    KeyRelation,
    LayerWindows,
    Rotary,
    ScoreScale,
    UnlikeOursError,
)
from megagpt.huggingface.tensors import (
    GATE_AND_VALUE,
    QUERY_KEY_VALUE,
    ROWS_OF_TOKENS,
    SAME,
    STACKED_GATE_AND_VALUE,
    STACKED_QUERY_KEY_VALUE,
    TURNED,
    TURNED_QUERY_KEY_VALUE,
    Relation,
)
from megagpt.model import GPT
from megagpt.schema.errors import shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# Keys of ours that do not change a trained model's result: a run has its own.
OF_TRAINING = ("dropout", "init_std", "z_loss")
# The tensors of each place of biases, by the ends of our names.
BIASES = {
    "qkv_bias": ("attention.qkv.bias",),
    "output_bias": ("attention.output.bias",),
    "mlp_bias": ("mlp.up.bias", "mlp.down.bias"),
    "norm_bias": ("norm.bias",),
}

Modules = dict[str, tuple[list[str], Relation]]


class Part(NamedTuple):
    """One of our tensors, and the names and shapes of those that it becomes.

    ``stored`` is false for a bias that our model does not have and theirs holds as zero.
    """

    name: str
    shape: torch.Size
    stored: bool
    relation: Relation
    theirs: Mapping[str, torch.Size]


@dataclass(frozen=True)
class Architecture:
    """One class of transformers.

    ``needs`` are our keys that all its models have; a function derives one from the others.
    ``free_biases`` are places of biases that its files always hold, zero if our model has none.
    ``renamed`` are other names of its tensors in files. ``ignored`` are keys that change no result.
    """

    name: str
    model_type: str
    prefix: str  # of all names except the head's; files of a model without a head omit it
    needs: Mapping[str, Any]
    keys: tuple[KeyRelation, ...]
    modules: Modules
    free_biases: tuple[str, ...] = ()
    renamed: Mapping[str, str] | None = None
    ignored: tuple[str, ...] = ()
    buffers: str = r"(?!)"  # tensors in files that are not parameters

    @property
    def headless_name(self) -> str:
        """Its class without a head, as files of such a model name it: GPT2Model."""
        return f"{re.sub('LMHeadModel$|ForCausalLM$', '', self.name)}Model"

    def read(self, theirs: Document) -> dict[str, Any]:
        """Return our keys of a config.json; what is left out has our default, or is of training.

        Raise UnlikeOursError with everything that the model has and ours has not.
        """
        problems: list[str] = []
        ours = dict(self.needs)
        for relation in self.keys:
            try:
                ours |= relation.read(theirs)
            except UnlikeOursError as error:
                problems += error.problems
        if problems:
            raise UnlikeOursError(problems)
        found = {key: value(ours) if callable(value) else value for key, value in ours.items()}
        return {key: value for key, value in found.items() if key not in OF_TRAINING}

    def misfits(self, model: ModelConfig) -> list[str]:
        """Return what it has and the model has not; empty if it can hold the model.

        It can if the config.json that it writes is read as the same model.
        """
        return self.differences(self.config(model), model)

    def differences(self, theirs: Document, model: ModelConfig) -> list[str]:
        """Return in what a config.json's model differs from ours: key, its value, (not ours)."""
        free: tuple[str, ...] = ("preset", "vocab_size", "sequence_length", "bias", *OF_TRAINING)
        free += self.free_biases
        kept = {key: getattr(model, key) for key in free if key not in ("preset", "bias")}
        try:
            found = ModelConfig.model_validate(kept | self.read(theirs))
        except (UnlikeOursError, ValidationError) as error:
            return [str(error).splitlines()[0]]
        if found.norm != model.norm:  # of a layernorm only
            free += ("norm_bias",)
        return [
            f"{key} {_shown(found, key)} (not {_shown(model, key)})"
            for key in type(model).model_fields
            if key not in free and _shown(found, key) != _shown(model, key)
        ]

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """Return its config.json for a model that fits."""
        written: dict[str, Any] = {"architectures": [self.name], "model_type": self.model_type}
        for relation in self.keys:
            written |= relation.write(model)
        return written

    def with_positions(self, theirs: Document, model: ModelConfig) -> dict[str, Any]:
        """Return a config.json with a model's rotary positions and a context that holds it."""
        changed = dict(theirs)
        for rotary in self.keys:
            if isinstance(rotary, Rotary):
                written = rotary.write(model)
                lengths = theirs.get("max_position_embeddings"), written["max_position_embeddings"]
                if written.get("rope_scaling", {}).get("rope_type") not in ("dynamic", "longrope"):
                    written["max_position_embeddings"] = max(*filter(None, lengths), 1)
                changed = {k: v for k, v in theirs.items() if k not in rotary.names} | written
        return changed

    def parts(self, model: ModelConfig) -> Iterator[Part]:
        """Yield everything that it stores of a model, in the model's order."""
        ours = set(_shapes(model))
        biased = tuple(end for place in self.free_biases for end in BIASES[place])
        for name, shape in _shapes(_with_biases(model)).items():
            if name in ours or (biased and name.endswith(biased)):
                names, relation = self._their_names(name)
                theirs = relation.split(torch.empty(shape, device="meta"), model)
                shapes = {their: tensor.shape for their, tensor in zip(names, theirs, strict=True)}
                yield Part(name, shape, name in ours, relation, shapes)

    def stored_name(self, name: str, stored: Container[str]) -> str:
        """Return which of a tensor's names files use: the usual one, or one without the prefix."""
        other = [name.removeprefix(self.prefix), (self.renamed or {}).get(name, name)]
        return next((n for n in (name, *other) if n in stored), name)

    def head_and_embedding(self) -> tuple[str, str]:
        """Return the names of the two weights that are one if embeddings are tied."""
        (head,), _ = self.modules["head"]
        (embedding,), _ = self.modules["embedding.tokens"]
        return f"{head}.weight", f"{embedding}.weight"

    def _their_names(self, name: str) -> tuple[list[str], Relation]:
        module, _, kind = name.rpartition(".")
        layer = re.match(r"blocks\.(\d+)\.", module)
        paths, relation = self.modules[re.sub(r"^blocks\.\d+\.", "blocks.*.", module)]
        return [
            f"{path}.{kind}".replace("*", layer[1] if layer else "") for path in paths
        ], relation


def _shown(model: ModelConfig, key: str) -> str:
    """Return a value so that equal ones are equal text; a pattern at its whole length."""
    value = getattr(model, key)
    if key == "sliding_window_pattern":
        value = [value[i % len(value)] for i in range(model.num_layers)]
        return "all sliding" if "full" not in value else " ".join(value)
    return "null" if value is None else str(value)


def _shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Return our parameters' shapes; a tied head's weight is the embedding's only."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(model).named_parameters()}


def _with_biases(model: ModelConfig) -> ModelConfig:
    """Return the model with every bias that its norm can have."""
    linear = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True)
    return model.model_copy(update={**linear, "norm_bias": model.norm == "layernorm"})


# ---------------------------------------------------------------------------------------- the table

_PLAIN = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"} | {
    "gelu_fast": "gelu",  # the same function, with the constant rounded
    "relu2": "squared_relu",
}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
# The first of equals is written.
_GPT2_ACTIVATIONS = {"gelu_new": "gelu"} | _PLAIN
_STARCODER2_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu"} | _PLAIN
_GEMMA_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu"} | _GATED


def _shape(epsilon: str, usual_epsilon: float) -> tuple[Key, ...]:
    """Return the keys that all rotary families share."""
    return (
        Key("vocab_size", "vocabulary"),
        Key("hidden_size", "hidden_size"),
        Key("intermediate_size", "mlp_size"),
        Key("num_hidden_layers", "num_layers"),
        Key("num_attention_heads", "num_heads"),
        Key("initializer_range", "init_std", 0.02),
        Key("attention_dropout", "dropout", 0.0),
        Key(epsilon, "norm_epsilon", usual_epsilon),
    )


def _tied(usually: bool) -> Key:
    return Key("tie_word_embeddings", "tie_embeddings", usually)


_HEAD_SIZE = Key("head_dim", "head_size", None)
_GROUPS = Key("num_key_value_heads", "num_kv_heads", None)
_ATTENTION_BIAS = Key("attention_bias", "qkv_bias", False, also=("output_bias",))
_NO_BIAS = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), False)
_ROTARY = {"position": "rotary", "norm": "rmsnorm", **_NO_BIAS}
_SWIGLU = Key("hidden_act", "activation", "silu", values=_GATED)


def _root_of_width(ours: dict[str, Any]) -> float:
    """Return Gemma's factor of the embedding; of no use if the width is no number."""
    width = ours["hidden_size"]
    return float(width**0.5) if isinstance(width, int) and width > 0 else 1.0


def _layers(theirs: Document) -> range:
    """Return the layers of a config.json; none if it does not state their number."""
    layers = theirs.get("num_hidden_layers")
    return range(layers) if isinstance(layers, int) else range(0)


def _from_a_layer_on(theirs: Document) -> list[str]:
    """Return Qwen's layer types: a window in all layers but the first ones."""
    first = theirs.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise UnlikeOursError([f"max_window_layers {shown(first)}: expected an integer"])
    return ["sliding_attention" if i >= first else "full_attention" for i in _layers(theirs)]


def _every_other_layer(theirs: Document) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in _layers(theirs)]


def _of_layer(*theirs: str, relation: Relation = SAME) -> tuple[list[str], Relation]:
    return [f"model.layers.*.{module}" for module in theirs], relation


_MODEL: Modules = {
    "embedding.tokens": (["model.embed_tokens"], ROWS_OF_TOKENS),
    "head.norm": (["model.norm"], SAME),
    "head": (["lm_head"], ROWS_OF_TOKENS),
}
_ATTENTION: Modules = {
    "blocks.*.attention.qkv": _of_layer(
        *(f"self_attn.{which}_proj" for which in "qkv"), relation=QUERY_KEY_VALUE
    ),
    "blocks.*.attention.output": _of_layer("self_attn.o_proj"),
}
_QK_NORM: Modules = {
    "blocks.*.attention.query_norm": _of_layer("self_attn.q_norm"),
    "blocks.*.attention.key_norm": _of_layer("self_attn.k_norm"),
}
_PRE_NORM: Modules = {
    "blocks.*.attention_norm": _of_layer("input_layernorm"),
    "blocks.*.mlp_norm": _of_layer("post_attention_layernorm"),
}
_POST_NORM: Modules = {
    "blocks.*.attention_post_norm": _of_layer("post_attention_layernorm"),
    "blocks.*.mlp_post_norm": _of_layer("post_feedforward_layernorm"),
}
_GATED_MLP: Modules = {
    "blocks.*.mlp.up": _of_layer("mlp.gate_proj", "mlp.up_proj", relation=GATE_AND_VALUE),
    "blocks.*.mlp.down": _of_layer("mlp.down_proj"),
}
_LLAMA_MODULES = _MODEL | _PRE_NORM | _ATTENTION | _GATED_MLP
_OLD_BUFFERS = r".*\.rotary_emb\.inv_freq"  # in files of transformers before 4.31

GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    needs={"position": "learned", "norm": "layernorm"},
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("n_positions", "sequence_length"),
        Key("n_embd", "hidden_size"),
        Key("n_layer", "num_layers"),
        Key("n_head", "num_heads"),
        Key("n_inner", "mlp_size", None),
        Key("activation_function", "activation", "gelu_new", values=_GPT2_ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("initializer_range", "init_std", 0.02),
        Key("attn_pdrop", "dropout", 0.1),
        Key("embd_pdrop", "dropout", 0.1),
        Key("resid_pdrop", "dropout", 0.1),
        _tied(True),
        Fixed("scale_attn_weights", (True,), True),
        Fixed("scale_attn_by_inverse_layer_idx", (False,), False),
        # True computes the same attention in another order.
        Fixed("reorder_and_upcast_attn", (False, True), False),
        Fixed("add_cross_attention", (False,), False),
    ),
    modules={
        "embedding.tokens": (["transformer.wte"], ROWS_OF_TOKENS),
        "embedding.positions": (["transformer.wpe"], SAME),
        "blocks.*.attention_norm": (["transformer.h.*.ln_1"], SAME),
        "blocks.*.attention.qkv": (["transformer.h.*.attn.c_attn"], TURNED_QUERY_KEY_VALUE),
        "blocks.*.attention.output": (["transformer.h.*.attn.c_proj"], TURNED),
        "blocks.*.mlp_norm": (["transformer.h.*.ln_2"], SAME),
        "blocks.*.mlp.up": (["transformer.h.*.mlp.c_fc"], TURNED),
        "blocks.*.mlp.down": (["transformer.h.*.mlp.c_proj"], TURNED),
        "head.norm": (["transformer.ln_f"], SAME),
        "head": (["lm_head"], ROWS_OF_TOKENS),
    },
    free_biases=("qkv_bias", "output_bias", "mlp_bias", "norm_bias"),
    # Keys of old files.
    ignored=("n_ctx", "predict_special_tokens"),
    buffers=r"(.*\.)?attn\.(bias|masked_bias)",
)
# Llama 2, 3, 3.1 and 3.2; also TinyLlama, SmolLM2, Yi, DeepSeek-LLM.
LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    needs=_ROTARY,
    keys=(
        *_shape("rms_norm_eps", 1e-6),
        _GROUPS,
        _HEAD_SIZE,
        _SWIGLU,
        Rotary(),
        _ATTENTION_BIAS,
        Key("mlp_bias", "mlp_bias", False),
        _tied(False),
    ),
    modules=_LLAMA_MODULES,
    ignored=("pretraining_tp", "is_llama_config"),
    buffers=_OLD_BUFFERS,
)
STARCODER2 = Architecture(
    name="Starcoder2ForCausalLM",
    model_type="starcoder2",
    prefix="model.",
    needs={**_ROTARY, "norm": "layernorm"},
    keys=(
        *_shape("norm_epsilon", 1e-5),
        Key("num_key_value_heads", "num_kv_heads"),
        _HEAD_SIZE,
        Key("hidden_act", "activation", "gelu_pytorch_tanh", values=_STARCODER2_ACTIVATIONS),
        Rotary(),
        Key("sliding_window", "sliding_window", None),
        Key("embedding_dropout", "dropout", 0.0),
        Key("residual_dropout", "dropout", 0.0),
        Key("use_bias", "qkv_bias", True, also=("output_bias", "mlp_bias")),
        _tied(True),
    ),
    modules=_MODEL
    | _PRE_NORM
    | _ATTENTION
    | {
        "blocks.*.mlp.up": _of_layer("mlp.c_fc"),
        "blocks.*.mlp.down": _of_layer("mlp.c_proj"),
    },
    free_biases=("norm_bias",),
    # Left over from the GPTBigCode model; transformers' Starcoder2 reads none of them.
    ignored=(
        "activation_function",
        "attention_softmax_in_fp32",
        "layer_norm_epsilon",
        "mlp_type",
        "norm_type",
        "scale_attention_softmax_in_fp32",
        "scale_attn_weights",
    ),
)
MISTRAL = Architecture(
    name="MistralForCausalLM",
    model_type="mistral",
    prefix="model.",
    needs=_ROTARY,
    keys=(
        *_shape("rms_norm_eps", 1e-6),
        Key("num_key_value_heads", "num_kv_heads", 8, nullable=True),
        _HEAD_SIZE,
        _SWIGLU,
        Rotary(),
        Key("sliding_window", "sliding_window", 4096, nullable=True),
        _tied(False),
    ),
    modules=_LLAMA_MODULES,
    buffers=_OLD_BUFFERS,
)
QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    prefix="model.",
    needs={**_ROTARY, "qkv_bias": True},
    keys=(
        *_shape("rms_norm_eps", 1e-6),
        Key("num_key_value_heads", "num_kv_heads", 32, nullable=True),
        _HEAD_SIZE,
        _SWIGLU,
        Rotary(),
        LayerWindows(_from_a_layer_on, switch="use_sliding_window"),
        _tied(False),
    ),
    modules=_LLAMA_MODULES,
)
QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    prefix="model.",
    needs={**_ROTARY, "qk_norm": "per_head"},
    keys=(
        *_shape("rms_norm_eps", 1e-6),
        Key("num_key_value_heads", "num_kv_heads", 32, nullable=True),
        Key("head_dim", "head_size", 128),
        _SWIGLU,
        Rotary(),
        LayerWindows(_from_a_layer_on, switch="use_sliding_window"),
        _ATTENTION_BIAS,
        _tied(False),
    ),
    modules=_LLAMA_MODULES | _QK_NORM,
)
OLMO2 = Architecture(
    name="Olmo2ForCausalLM",
    model_type="olmo2",
    prefix="model.",
    needs={**_ROTARY, "qk_norm": "whole", "post_norm": "instead"},
    keys=(
        *_shape("rms_norm_eps", 1e-5),
        _GROUPS,
        _HEAD_SIZE,
        _SWIGLU,
        Rotary(),
        _ATTENTION_BIAS,
        _tied(False),
    ),
    modules=_MODEL | _POST_NORM | _ATTENTION | _QK_NORM | _GATED_MLP,
)
# GPT-NeoX-20B and Pythia; a head's query, key and value follow one another in theirs, as in ours.
GPT_NEOX = Architecture(
    name="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    prefix="gpt_neox.",
    needs={"position": "rotary", "norm": "layernorm"},
    keys=(
        *_shape("layer_norm_eps", 1e-5),
        Key("hidden_act", "activation", "gelu", values=_PLAIN),
        Rotary(base="rotary_emb_base", fraction=("rotary_pct", 0.25)),
        Key("use_parallel_residual", "parallel_residual", True),
        Key("attention_bias", "qkv_bias", True, also=("output_bias",)),
        Key("hidden_dropout", "dropout", 0.0),
        _tied(False),
    ),
    modules={
        "embedding.tokens": (["gpt_neox.embed_in"], ROWS_OF_TOKENS),
        "head.norm": (["gpt_neox.final_layer_norm"], SAME),
        "head": (["embed_out"], ROWS_OF_TOKENS),
    }
    | {
        f"blocks.*.{ours}": ([f"gpt_neox.layers.*.{theirs}"], SAME)
        for ours, theirs in {
            "attention_norm": "input_layernorm",
            "attention.qkv": "attention.query_key_value",
            "attention.output": "attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        }.items()
    },
    free_biases=("mlp_bias", "norm_bias"),
    renamed={"embed_out.weight": "lm_head.weight"},
    ignored=("is_decoder",),
    buffers=r"(.*\.)?attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
PHI3 = Architecture(
    name="Phi3ForCausalLM",
    model_type="phi3",
    prefix="model.",
    needs=_ROTARY,
    keys=(
        *_shape("rms_norm_eps", 1e-5),
        _GROUPS,
        _SWIGLU,
        Rotary(
            fraction=("partial_rotary_factor", 1.0),
            synonyms={"su": "longrope", "yarn": "longrope"},
        ),
        Key("sliding_window", "sliding_window", None),
        Key("embd_pdrop", "dropout", 0.0),
        Key("resid_pdrop", "dropout", 0.0),
        _tied(False),
    ),
    modules=_MODEL
    | _PRE_NORM
    | {
        "blocks.*.attention.qkv": _of_layer("self_attn.qkv_proj", relation=STACKED_QUERY_KEY_VALUE),
        "blocks.*.attention.output": _of_layer("self_attn.o_proj"),
        "blocks.*.mlp.up": _of_layer("mlp.gate_up_proj", relation=STACKED_GATE_AND_VALUE),
        "blocks.*.mlp.down": _of_layer("mlp.down_proj"),
    },
)
GEMMA2 = Architecture(
    name="Gemma2ForCausalLM",
    model_type="gemma2",
    prefix="model.",
    needs={
        **_ROTARY,
        "norm_weight_offset": 1,
        "post_norm": "both",
        "embedding_scale": _root_of_width,
    },
    keys=(
        *_shape("rms_norm_eps", 1e-6),
        Key("num_key_value_heads", "num_kv_heads", 4),
        Key("head_dim", "head_size", 256),
        Key("hidden_activation", "activation", "gelu_pytorch_tanh", values=_GEMMA_ACTIVATIONS),
        Rotary(),
        LayerWindows(_every_other_layer),
        ScoreScale(),
        Key("attn_logit_softcapping", "score_softcap", 50.0, nullable=True),
        Key("final_logit_softcapping", "logit_softcap", 30.0, nullable=True),
        _ATTENTION_BIAS,
        _tied(True),
        Fixed("use_bidirectional_attention", (None, False), None),
    ),
    modules=_LLAMA_MODULES
    | _POST_NORM
    | {"blocks.*.mlp_norm": _of_layer("pre_feedforward_layernorm")},
    ignored=("hidden_act", "cache_implementation"),  # the class reads hidden_activation
)
# A model that several can hold is exported as the first.
ARCHITECTURES = (
    GPT2,
    LLAMA,
    STARCODER2,
    MISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    GPT_NEOX,
    PHI3,
    GEMMA2,
)
