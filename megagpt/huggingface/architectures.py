"""The published architectures that our model can be: one table, read in both directions.

`keys` of an architecture relate its config.json to `megagpt.model`, `modules` its tensors to ours.
transformers is not needed: what its models compute is known here, and tested
(tests/model/test_model_parity.py, tests/huggingface/test_export.py).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.model import GPT
from megagpt.schema.fields import changed_later_keys, default_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
OF_TRAINING = ("dropout", "init_std", "z_loss")  # do not change a trained model's result


class Relation(NamedTuple):
    """``join`` makes our tensor from theirs, ``split`` theirs from ours, for weights and biases."""

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]


def _grouped(projections: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Return rows of q, k and v in our order: a group's queries, then its k, then its v."""
    per_group = [rows.unflatten(0, (model.num_kv_heads, -1)) for rows in projections]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def _ungrouped(fused: Tensor, model: ModelConfig) -> list[Tensor]:
    """Return q, k and v from rows in our order."""
    queries = model.num_heads // model.num_kv_heads * model.head_size
    per_group = fused.unflatten(0, (model.num_kv_heads, -1)).split(
        [queries, model.head_size, model.head_size], dim=1
    )
    return [rows.flatten(0, 1) for rows in per_group]


def _padded(rows: Tensor, model: ModelConfig) -> Tensor:
    """Return rows with those that pad our vocabulary: zero, because they are never trained."""
    return F.pad(rows, (0, 0, 0, model.vocab_size - model.vocabulary))


SAME = Relation(lambda theirs, _: theirs[0], lambda ours, _: [ours])
ROWS_OF_TOKENS = Relation(
    lambda theirs, model: _padded(theirs[0], model), lambda ours, model: [ours[: model.vocabulary]]
)
QUERY_KEY_VALUE = Relation(_grouped, _ungrouped)
# The rows of SwiGLU's gate and value alternate.
GATE_AND_VALUE = Relation(
    lambda theirs, _: torch.stack(tuple(theirs), dim=1).flatten(0, 1),
    lambda ours, _: ours.unflatten(0, (-1, 2)).unbind(1),
)
# GPT-2's projections are stored (inputs, outputs); a bias has one dim, which stays.
TURNED = Relation(lambda theirs, _: theirs[0].movedim(-1, 0), lambda ours, _: [ours.movedim(0, -1)])
TURNED_QUERY_KEY_VALUE = Relation(
    lambda theirs, model: _grouped(theirs[0].movedim(-1, 0).chunk(3), model),
    lambda ours, model: [torch.cat(_ungrouped(ours, model)).movedim(0, -1)],
)


class Key(NamedTuple):
    """A key of their config.json that holds ``ours``, an attribute of ModelConfig.

    ``default`` is its value if it is absent. Without a default the key must be present; None means
    that it follows from other keys, in theirs as in ours.
    """

    theirs: str
    ours: str
    default: Any = ...


class Fixed(NamedTuple):
    """A key of their config.json with the values under which it computes what our model does.

    The first value is written. ``default`` is transformers' value if the key is absent.
    """

    theirs: str
    values: tuple[Any, ...]
    default: Any


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

    ``needs`` are the values that our keys must have. ``biased`` are endings of our names that have
    biases there whatever our ``bias`` says (zero if ours has none). ``ignored`` are keys that
    change no result.
    """

    name: str
    model_type: str
    prefix: str  # of all names except the head's; files of a model without a head omit it
    needs: Mapping[str, str]
    keys: tuple[Key, ...]
    fixed: tuple[Fixed, ...]
    modules: Mapping[str, tuple[Sequence[str], Relation]]
    biased: tuple[str, ...] = ()
    grouped_heads: bool = True
    ignored: tuple[str, ...] = ()
    buffers: str = r"(?!)"  # tensors in files that are not parameters

    @property
    def headless_name(self) -> str:
        """Its class without a head, as files of such a model name it: GPT2Model."""
        return f"{re.sub('LMHeadModel$|ForCausalLM$', '', self.name)}Model"

    def misfits(self, model: ModelConfig) -> list[str]:
        """Return what it needs and what the model has instead; empty if it can hold the model."""
        found = [
            f"{key} {wanted} (not {getattr(model, key)})"
            for key, wanted in self.needs.items()
            if getattr(model, key) != wanted
        ]
        covered = {*OF_TRAINING, *(key.ours for key in self.keys)}
        found += [
            f"{key} {default_of(model, key)} (not {getattr(model, key)})"
            for key in changed_later_keys(model)
            if key not in covered
        ]
        if model.rope_scaling is not None:
            found.append(f"no rope_scaling (not {model.rope_scaling.type})")
        if not self.grouped_heads and model.num_kv_heads != model.num_heads:
            found.append(f"num_kv_heads {model.num_heads} (not {model.num_kv_heads})")
        return found

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """Return its config.json for a model that fits."""
        written = {"architectures": [self.name], "model_type": self.model_type}
        fixed = {key.theirs: key.values[0] for key in self.fixed}
        return written | fixed | {key.theirs: getattr(model, key.ours) for key in self.keys}

    def parts(self, model: ModelConfig) -> Iterator[Part]:
        """Yield everything that it stores of a model, in the model's order."""
        ours = set(_shapes(model))
        for name, shape in _shapes(_with_biases(model)).items():
            if name in ours or name.endswith(self.biased):
                names, relation = self._their_names(name)
                theirs = relation.split(torch.empty(shape, device="meta"), model)
                shapes = {their: tensor.shape for their, tensor in zip(names, theirs, strict=True)}
                yield Part(name, shape, name in ours, relation, shapes)

    def _their_names(self, name: str) -> tuple[list[str], Relation]:
        module, _, kind = name.rpartition(".")
        layer = re.match(r"blocks\.(\d+)\.", module)
        paths, relation = self.modules[re.sub(r"^blocks\.\d+\.", "blocks.*.", module)]
        return [
            f"{path}.{kind}".replace("*", layer[1] if layer else "") for path in paths
        ], relation


def _shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Return our parameters' shapes; a tied head's weight is the embedding's only."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(model).named_parameters()}


def _with_biases(model: ModelConfig) -> ModelConfig:
    """Return the model with every bias that its norm can have."""
    linear = {f"{place}_bias": True for place in ("qkv", "output", "mlp")}
    return model.model_copy(update={**linear, "norm_bias": model.norm == "layernorm"})


_ROTARY_KEYS = (
    Key("vocab_size", "vocabulary"),
    Key("hidden_size", "hidden_size"),
    Key("intermediate_size", "mlp_size"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("head_dim", "head_size", None),
    Key("max_position_embeddings", "sequence_length"),
    Key("initializer_range", "init_std"),
    Key("attention_dropout", "dropout"),
)
_ROTARY_BASE = Fixed("rope_theta", (10_000.0,), 10_000.0)
_ROTARY_MODULES: dict[str, tuple[Sequence[str], Relation]] = {
    "embedding.tokens": (["model.embed_tokens"], ROWS_OF_TOKENS),
    "blocks.*.attention_norm": (["model.layers.*.input_layernorm"], SAME),
    "blocks.*.attention.qkv": (
        [f"model.layers.*.self_attn.{which}_proj" for which in "qkv"],
        QUERY_KEY_VALUE,
    ),
    "blocks.*.attention.output": (["model.layers.*.self_attn.o_proj"], SAME),
    "blocks.*.mlp_norm": (["model.layers.*.post_attention_layernorm"], SAME),
    "head.norm": (["model.norm"], SAME),
    "head": (["lm_head"], ROWS_OF_TOKENS),
}

GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    needs={"position": "learned", "norm": "layernorm", "activation": "gelu"},
    keys=(
        Key("vocab_size", "vocabulary"),
        Key("n_positions", "sequence_length"),
        Key("n_embd", "hidden_size"),
        Key("n_layer", "num_layers"),
        Key("n_head", "num_heads"),
        Key("n_inner", "mlp_size", None),
        Key("initializer_range", "init_std"),
        Key("attn_pdrop", "dropout"),
        Key("embd_pdrop", "dropout"),
        Key("resid_pdrop", "dropout"),
        Key("tie_word_embeddings", "tie_embeddings", True),
    ),
    fixed=(
        Fixed("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
        Fixed("layer_norm_epsilon", (1e-5,), 1e-5),
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
    biased=(".bias",),
    grouped_heads=False,
    # Keys of old files.
    ignored=("n_ctx", "predict_special_tokens"),
    buffers=r"(.*\.)?attn\.(bias|masked_bias)",
)
LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    needs={"position": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    keys=(
        *_ROTARY_KEYS,
        Key("num_key_value_heads", "num_kv_heads", None),
        Key("attention_bias", "bias", False),
        Key("mlp_bias", "bias", False),
        Key("tie_word_embeddings", "tie_embeddings", False),
    ),
    fixed=(
        Fixed("hidden_act", ("silu",), "silu"),
        Fixed("rms_norm_eps", (1e-5,), 1e-6),
        _ROTARY_BASE,
    ),
    modules=_ROTARY_MODULES
    | {
        "blocks.*.mlp.up": (
            ["model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"],
            GATE_AND_VALUE,
        ),
        "blocks.*.mlp.down": (["model.layers.*.mlp.down_proj"], SAME),
    },
    ignored=("pretraining_tp",),
    buffers=r".*\.rotary_emb\.inv_freq",
)
STARCODER2 = Architecture(
    name="Starcoder2ForCausalLM",
    model_type="starcoder2",
    prefix="model.",
    needs={"position": "rotary", "norm": "layernorm", "activation": "gelu"},
    keys=(
        *_ROTARY_KEYS,
        Key("num_key_value_heads", "num_kv_heads"),
        Key("embedding_dropout", "dropout"),
        Key("residual_dropout", "dropout"),
        Key("use_bias", "bias", True),
        Key("tie_word_embeddings", "tie_embeddings", True),
    ),
    fixed=(
        Fixed("hidden_act", ("gelu_pytorch_tanh", "gelu_new"), "gelu_pytorch_tanh"),
        Fixed("norm_epsilon", (1e-5,), 1e-5),
        Fixed("sliding_window", (None,), None),
        _ROTARY_BASE,
    ),
    modules=_ROTARY_MODULES
    | {
        "blocks.*.mlp.up": (["model.layers.*.mlp.c_fc"], SAME),
        "blocks.*.mlp.down": (["model.layers.*.mlp.c_proj"], SAME),
    },
    biased=("norm.bias",),
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
ARCHITECTURES = (GPT2, LLAMA, STARCODER2)
