"""GPT-2 and GPT-3 in plain PyTorch, with rotary, RMS-norm, SwiGLU and grouped-query variants.

Radford et al. 2019 and Brown et al. 2020 (arXiv 2005.14165): pre-norm blocks, learned positions,
GELU(tanh), tied head, residual projections initialised smaller by sqrt(2 x layers). Nothing here
knows of ranks, meshes or DeepSpeed. Shapes: tokens (batch, length); hidden states (batch, length,
hidden_size).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.philox import fold_seed
from megagpt.config import ModelConfig

NORM_EPSILON = 1e-5  # GPT-2's
ROTARY_BASE = 10_000.0  # Su et al. 2021
IGNORED = -100  # a target that has no loss
TIED_WEIGHT = "embedding.tokens.weight"  # also the head's weight if embeddings are tied


@dataclass(frozen=True)
class Context:
    """What every block needs in addition to the hidden states.

    ``documents`` restricts attention to one document. ``dropout_seed`` (batch,) determines the
    dropout masks of each sample; None in evaluation. ``cache`` holds the keys and values of earlier
    positions during generation.
    """

    documents: kernels.DocumentBounds | None = None
    dropout_seed: Tensor | None = None
    cache: "KeyValueCache | None" = None

    @property
    def offset(self) -> int:
        """The position of the first token passed to the model."""
        return self.cache.length if self.cache is not None else 0


class KeyValueCache:
    """Keys and values of earlier positions, per layer; allocated on a layer's first write.

    The first write decides batch, heads, dtype and device. ``length`` is the number of cached
    positions, the same in every layer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's k and v (batch, heads, new, head_size); return all keys and values.

        Raise ValueError where the capacity is exceeded.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"KeyValueCache: full (holds {self.capacity} positions, need {end}); "
                "make it with a larger capacity"
            )
        if layer not in self._layers:
            self._layers[layer] = (self._allocate(k), self._allocate(v))
        keys, values = self._layers[layer]  # (batch, heads, capacity, head_size) each
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def _allocate(self, like: Tensor) -> Tensor:
        batch, heads, _, head_size = like.shape
        return like.new_empty(batch, heads, self.capacity, head_size)


class Linear(nn.Module):
    """A linear layer: x W^T + b, with W (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """Layer or RMS normalisation; with a residual, normalise the sum and return the sum too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.layer_norm = config.norm == "layernorm"
        self.bias = (
            nn.Parameter(torch.empty(config.hidden_size))
            if self.layer_norm and config.bias
            else None
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.layer_norm:
            return kernels.layer_norm(
                x, self.weight, self.bias, eps=NORM_EPSILON, residual=residual
            )
        return kernels.rms_norm(x, self.weight, eps=NORM_EPSILON, residual=residual)


class Dropout(nn.Module):
    """Dropout whose mask depends only on (sample seed, site, position, channel).

    The mask is therefore the same on any mesh.
    """

    def __init__(self, probability: float, site: int) -> None:
        super().__init__()
        self.probability = probability
        self.site = site
        self.sequence_part = 0  # the index of x among equal parts of the sequence

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not self.probability or context.dropout_seed is None:
            return x
        seed = fold_seed(context.dropout_seed, self.site)
        return kernels.dropout(
            x, self.probability, seed=seed, position_offset=self.sequence_part * x.shape[1]
        )


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads.

    The rows of the fused projection are ordered by key-value group: the group's queries, then its
    key, then its value. A contiguous run of rows is therefore a run of groups, which tensor
    parallelism needs.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.rotary = config.position == "rotary"
        self.queries_per_group = config.num_heads // config.num_kv_heads
        self.dropout = config.dropout
        self.site = dropout_site(layer, 0)
        self.head_offset = 0  # the first query head here, if the projections hold only some groups
        self.qkv = Linear(
            config.hidden_size,
            (config.num_heads + 2 * config.num_kv_heads) * config.head_size,
            config.bias,
        )
        self.output = Linear(config.num_heads * config.head_size, config.hidden_size, config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        groups = (
            self.qkv(x)
            .unflatten(-1, (-1, self.queries_per_group + 2, self.head_size))
            .permute(0, 2, 3, 1, 4)
        )  # (batch, kv_heads, queries_per_group + 2, length, head_size)
        q = groups[:, :, :-2].flatten(1, 2)  # (batch, heads, length, head_size)
        k = groups[:, :, -2]  # (batch, kv_heads, length, head_size)
        v = groups[:, :, -1]  # (batch, kv_heads, length, head_size)
        if self.rotary:
            angles = rotary_angles(context.offset, q.shape[2], self.head_size, x.device)
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)  # length now covers earlier positions
        dropout, seed = self._dropout(context)
        y = kernels.attention(
            q,
            k,
            v,
            document_ids=context.documents,
            dropout=dropout,
            dropout_seed=seed,
            head_offset=self.head_offset,
        )  # (batch, heads, length, head_size)
        return self.output(y.transpose(1, 2).flatten(2))  # (batch, length, hidden_size)

    def _dropout(self, context: Context) -> tuple[float, Tensor | None]:
        if not self.dropout or context.dropout_seed is None:
            return 0.0, None
        return self.dropout, fold_seed(context.dropout_seed, self.site)


class MLP(nn.Module):
    """Two projections with GELU(tanh) between them, or SwiGLU (Shazeer 2020).

    In SwiGLU the rows of gate and value alternate in ``up``, so that a contiguous run of rows holds
    both.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = Linear(
            config.hidden_size, config.mlp_size * (2 if self.gated else 1), config.bias
        )
        self.down = Linear(config.mlp_size, config.hidden_size, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)  # (batch, length, mlp_size, or twice that if gated)
        if not self.gated:
            return self.down(F.gelu(x, approximate="tanh"))
        gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)  # (batch, length, mlp_size) each
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """One pre-norm transformer layer: hidden states in, hidden states out."""

    def __init__(self, config: ModelConfig, layer: int, recompute: str) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = Norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)
        self.attention_dropout = Dropout(config.dropout, dropout_site(layer, 1))
        self.mlp_dropout = Dropout(config.dropout, dropout_site(layer, 2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.recompute == "full" and torch.is_grad_enabled():
            return recomputed(self._forward, x, context)
        return self._forward(x, context)

    def _forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.attention_dropout(self.attention(self.attention_norm(x), context), context)
        y, x = self.mlp_norm(y, residual=x)  # the normalised sum and the sum
        # The MLP keeps two tensors of 4 x hidden_size per token, most of a block's activations, and
        # is cheap to recompute.
        selective = self.recompute == "selective" and torch.is_grad_enabled()
        y = recomputed(self.mlp, y) if selective else self.mlp(y)
        return x + self.mlp_dropout(y, context)


class Embedding(nn.Module):
    """Token vectors, plus learned positions if the model has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = Table(config.vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.positions: nn.Module | None = (
            Table(config.sequence_length, config.hidden_size) if learned else None
        )
        self.dropout = Dropout(config.dropout, site=0)

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        x = self.tokens(tokens)  # (batch, length, hidden_size)
        if self.positions is not None:
            x = x + self.positions(
                torch.arange(context.offset, context.offset + tokens.shape[1], device=tokens.device)
            )
        return self.dropout(x, context)


class Table(nn.Module):
    """Rows looked up by index."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Head(nn.Module):
    """The final norm and the output projection: mean loss given targets, logits without."""

    def __init__(self, config: ModelConfig, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.norm = Norm(config)
        self.vocabulary = config.vocabulary
        self.weight = (
            tied
            if tied is not None
            else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.weight)
        return kernels.linear_cross_entropy(
            x, self.weight, targets, ignore_index=IGNORED, vocabulary=self.vocabulary
        )


class GPT(nn.Module):
    """A decoder-only language model, or a contiguous run of its layers.

    Layer 0 is the embedding, layers 1 to num_layers are the blocks, the last is the head.
    ``layers`` says which to build (default: all); parameters keep the names they have in the whole
    model. Parameters are allocated on torch's current default device and are not initialised: call
    ``initialise_`` or load them. ``recompute`` selects the activations to recompute in backward:
    none | selective | full.
    """

    def __init__(
        self, config: ModelConfig, recompute: str = "none", layers: range | None = None
    ) -> None:
        super().__init__()
        self.config = config
        layers = range(config.num_layers + 2) if layers is None else layers
        self.embedding = Embedding(config) if 0 in layers else None
        blocks = {
            str(layer - 1): Block(config, layer - 1, recompute)
            for layer in layers
            if 1 <= layer <= config.num_layers
        }
        self.blocks = nn.ModuleDict(blocks)
        tied = (
            self.embedding.tokens.weight
            if self.embedding is not None and config.tie_embeddings
            else None
        )
        self.head = Head(config, tied) if config.num_layers + 1 in layers else None

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | kernels.DocumentBounds | None = None,
        dropout_seed: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the mean loss of the targets (batch, length) that are not ignored, or logits.

        Logits are (batch, length, padded vocabulary). ``inputs`` are tokens (batch, length), or the
        hidden states from the layers before these; without the head, hidden states are returned.
        ``document_ids`` (batch, key_length) restrict attention to equal ids. Their
        ``kernels.document_bounds`` are computed here, once for all layers, unless they are passed
        in their place.
        """
        documents = None if document_ids is None else kernels.document_bounds(document_ids)
        context = Context(documents, dropout_seed, cache)
        x = inputs if self.embedding is None else self.embedding(inputs, context)
        for block in self.blocks.values():
            x = block(x, context)
        if self.head is None:
            return x
        if cache is not None:
            cache.length += inputs.shape[1]
        return self.head(x, targets)

    def tensor_plan(self) -> dict[str, str]:
        """Return how ranks may share these layers: module path -> column | row | vocabulary.

        Each rank takes a run of rows (outputs) of a column layer's weight, a run of columns
        (inputs) of a row layer's, and the rows of some tokens of a vocabulary layer's.
        """
        roles = {
            "attention.qkv": "column",
            "attention.output": "row",
            "mlp.up": "column",
            "mlp.down": "row",
        }
        plan = {
            f"blocks.{block}.{layer}": role
            for block in self.blocks
            for layer, role in roles.items()
        }
        if self.embedding is not None:
            plan["embedding.tokens"] = "vocabulary"
        if self.head is not None:
            plan["head"] = "vocabulary"
        return plan


def recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Run ``function`` without keeping activations; backward runs it again.

    Dropout masks are counter-based, so no generator state is saved.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def dropout_site(layer: int, which: int) -> int:
    """Return the number of a place that applies dropout; the embedding's is 0."""
    return 1 + 3 * layer + which


def rotary_angles(
    offset: int, length: int, head_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return fp32 cosines and sines (length, head_size / 2) of rotary positions.

    Su et al. 2021 (arXiv 2104.09864).
    """
    frequencies = ROTARY_BASE ** (
        -torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    )
    positions = torch.arange(offset, offset + length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)  # (length, head_size / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_size / 2) of x (..., length, head_size) by their angles."""
    # (..., length, head_size / 2) each
    left, right = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Return the initial fp32 value (on the CPU) of the parameter with this global name.

    Every rank gets the same value: each parameter has its own generator, seeded by (seed, name).
    Weights are normal with standard deviation init_std, divided by sqrt(2 x layers) for those that
    write to the residual stream (GPT-2, section 2.3). Biases are 0, norm weights 1. Rows that pad
    the vocabulary are 0 and stay 0, because no loss depends on them.
    """
    owner, _, kind = name.rpartition(".")
    if kind == "bias":
        return torch.zeros(shape)
    if owner.endswith("norm"):
        return torch.ones(shape)
    residual = owner.endswith((".attention.output", ".mlp.down"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    value = torch.empty(shape).normal_(0.0, std, generator=generator)
    if name in (TIED_WEIGHT, "head.weight"):
        value[config.vocabulary :] = 0.0
    return value


@torch.no_grad()
def initialise_(model: GPT, seed: int) -> GPT:
    """Fill every parameter in place with its initial value."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))
    return model


def replace_parameters(
    model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]
) -> dict[nn.Parameter, nn.Parameter]:
    """Replace every parameter by ``make(parameter)``, a tied one once; return old -> new."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for attribute, template in list(module.named_parameters(recurse=False)):
            if template not in made:
                made[template] = make(template)
            setattr(module, attribute, made[template])
    return made


def global_names(model: GPT) -> dict[nn.Parameter, str]:
    """Return the name of each parameter in the whole model.

    A tied head's weight has the embedding's name.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    if model.config.tie_embeddings and model.head is not None:
        names[model.head.weight] = TIED_WEIGHT
    return names


def decayed(name: str) -> bool:
    """Return whether weight decay applies: to matrices, not to biases and norm weights.

    GPT-3, appendix B, as nanoGPT reads it.
    """
    return not name.endswith((".bias", "norm.weight"))
