"""Names of Megatron-DeepSpeed and gpt-neox, by one name for each tensor, and how ranks share them.

Layers of a pipeline are numbered with the embedding and what lies between, so blocks are known by
their input norm. Sources: megatron/model/gpt2_model.py and tools/ckpts/convert_neox_to_hf.py of
gpt-neox, megatron/model/gpt_model.py of Megatron-DeepSpeed.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.huggingface.architectures import Architecture
from megagpt.huggingface.tensors import (
    GATE_AND_VALUE,
    ROWS_OF_TOKENS,
    SAME,
    STACKED_GATE_AND_VALUE,
    STACKED_QUERY_KEY_VALUE,
    Relation,
)
from megagpt.utils import UserError

TOKENS = "word_embeddings.weight"
POSITIONS = "position_embeddings.weight"
HEAD = "head.weight"
HEADS = ("final_linear.weight", "output_layer.weight", "lm_head.weight")
BUFFERS = re.compile(r".*(inv_freq|_extra_state|attention\.(bias|masked_bias))")
NUMBERED = re.compile(r"(\d+)\.(.+)")
OF_ENCODER = re.compile(r"(?:.*\.)?(?:encoder|transformer)\.(?:layers\.(\d+)\.)?(.+)")
# Gpt-neox's names since 2024, and those of its RMS norm.
RENAMED = (
    ("self_attention.", "attention."),
    ("mlp.linear1.", "mlp.dense_h_to_4h."),
    ("mlp.linear2.", "mlp.dense_4h_to_h."),
)
COLUMNS = re.compile(
    r".*(query_key_value|dense_h_to_4h|mlp\.w1|mlp\.w3)\.(weight|bias)|word_embeddings\.weight|head\.weight"
)
ROWS = re.compile(r".*(attention\.dense|dense_4h_to_h|mlp\.w2)\.weight")
ROW_BIASES = re.compile(r".*(attention\.dense|dense_4h_to_h|mlp\.w2)\.bias")


def is_megatron(names: Iterable[str]) -> bool:
    """Return whether tensors have Megatron's names; others are those of transformers."""
    return any(name.endswith(TOKENS) for name in names)


def is_gpt_neox(names: Iterable[str]) -> bool:
    """Return whether they are gpt-neox's: Megatron calls its attention `self_attention`."""
    return not any("self_attention." in name for name in names)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Return the one name of each tensor -> the name that it has; buffers are left out."""
    kept = [name for name in names if not BUFFERS.fullmatch(name)]
    numbered = {name: _numbered(name) for name in kept}
    starts = sorted({n for n, rest in numbered.values() if rest.startswith("input_layernorm.")})
    blocks = {number: block for block, number in enumerate(starts)}
    found: dict[str, str] = {}
    for name, (number, rest) in numbered.items():
        ours = _one_name(number, rest, blocks)
        if ours == TOKENS and TOKENS in found:
            ours = HEAD  # of a pipeline without tied embeddings
        if ours in found:
            raise UserError(f"{name} and {found[ours]}: both are {ours}")
        found[ours] = name
    return found


def _numbered(name: str) -> tuple[int, str]:
    """Return the number of the layer, -1 without one, and the name within it."""
    plain = re.sub(r"^(module\.|sequential\.|tied_modules\.\w+\.)+", "", name)
    if match := NUMBERED.fullmatch(plain):
        return int(match[1]), match[2]
    if (match := OF_ENCODER.fullmatch(plain)) is not None:
        return (int(match[1]) if match[1] else -1), match[2]
    return -1, plain


def _one_name(number: int, rest: str, blocks: dict[int, int]) -> str:
    for before, after in RENAMED:
        rest = rest.replace(before, after)
    if rest.endswith(".scale"):
        rest = rest.removesuffix("scale") + "weight"
    if number in blocks:
        return f"layers.{blocks[number]}.{rest}"
    for table in (TOKENS, POSITIONS):
        if rest.endswith(table):
            return table
    if rest.endswith(HEADS):
        return HEAD
    kind = rest.rpartition(".")[2]
    if rest in ("weight", "bias", "scale") or re.search(r"(^|\.)(norm|final_layernorm)\.", rest):
        return f"final_norm.{'weight' if kind == 'scale' else kind}"
    return rest


def _value_above_gate(theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
    value, gate = theirs[0].chunk(2)
    return GATE_AND_VALUE.join([gate, value], model)


STACKED_VALUE_AND_GATE = Relation(
    _value_above_gate,
    lambda ours, model: [torch.cat(list(reversed(GATE_AND_VALUE.split(ours, model))))],
)


def architecture_of(names: Iterable[str], model: ModelConfig, *, gpt_neox: bool) -> Architecture:
    """Return how their tensors, by their one names, become ours."""
    known = set(names)
    up: tuple[list[str], Relation] = (["layers.*.mlp.dense_h_to_4h"], SAME)
    down = "layers.*.mlp.dense_4h_to_h"
    if "layers.0.mlp.w1.weight" in known:
        up = (["layers.*.mlp.w1", "layers.*.mlp.w3"], GATE_AND_VALUE)
        down = "layers.*.mlp.w2"
    elif model.gated:
        up = (up[0], STACKED_VALUE_AND_GATE if gpt_neox else STACKED_GATE_AND_VALUE)
    grouped = gpt_neox and model.num_kv_heads < model.num_heads
    return Architecture(
        name="gpt-neox" if gpt_neox else "Megatron-DeepSpeed",
        model_type="",
        prefix="",
        needs={},
        keys=(),
        modules={
            "embedding.tokens": (["word_embeddings"], ROWS_OF_TOKENS),
            "embedding.positions": (["position_embeddings"], SAME),
            "blocks.*.attention_norm": (["layers.*.input_layernorm"], SAME),
            # A head's query, key and value follow one another, as in ours.
            "blocks.*.attention.qkv": (
                ["layers.*.attention.query_key_value"],
                STACKED_QUERY_KEY_VALUE if grouped else SAME,
            ),
            "blocks.*.attention.output": (["layers.*.attention.dense"], SAME),
            "blocks.*.mlp_norm": (["layers.*.post_attention_layernorm"], SAME),
            "blocks.*.mlp.up": up,
            "blocks.*.mlp.down": ([down], SAME),
            "head.norm": (["final_norm"], SAME),
            "head": (["head"], ROWS_OF_TOKENS),
        },
    )


def merge(name: str, ranks: Sequence[Tensor], model: ModelConfig, *, gpt_neox: bool) -> Tensor:
    """Return the whole tensor of what the tensor ranks hold."""
    if len(ranks) == 1:
        return ranks[0]
    if COLUMNS.fullmatch(name):
        if "dense_h_to_4h" in name and model.gated:
            return _cat_parts([rank.chunk(2) for rank in ranks])
        if "query_key_value" in name and gpt_neox and model.num_kv_heads < model.num_heads:
            sizes = [model.query_size, model.key_value_size, model.key_value_size]
            each = [size // len(ranks) for size in sizes]
            return _cat_parts([rank.split(each) for rank in ranks])
        return torch.cat(list(ranks), dim=0)
    if ROWS.fullmatch(name):
        return torch.cat(list(ranks), dim=1)
    if ROW_BIASES.fullmatch(name) and gpt_neox and model.parallel_residual:
        # Each rank adds its own before the sum over ranks (convert_neox_to_hf.py).
        return torch.stack([rank.float() for rank in ranks]).sum(dim=0)
    # Every rank has the same; gpt-neox's norms may differ by rounding, and its tool averages them.
    return torch.stack([rank.float() for rank in ranks]).mean(dim=0)


def _cat_parts(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the first parts of all ranks, then the second ones, and so on."""
    return torch.cat([rank[place] for place in range(len(parts[0])) for rank in parts])
