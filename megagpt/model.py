"""GPT-2 and GPT-3 in plain PyTorch, with the rotary, RMS-norm, SwiGLU and grouped-query variants of
their successors.

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
TIED_WEIGHT = "embedding.tokens.weight"  # what the head multiplies with where embeddings are tied


@dataclass(frozen=True)
class Context:
    """What every block needs beside the hidden states.

    documents confine attention to one document; dropout_seed (batch,) makes the masks of a sample
    and is None in evaluation; cache holds the keys and values of earlier positions while
    generating.
    """

    documents: kernels.DocumentBounds | None = None
    dropout_seed: Tensor | None = None
    cache: "KeyValueCache | None" = None

    @property
    def offset(self) -> int:
        """The position of the first token given to the model."""
        return self.cache.length if self.cache is not None else 0


class KeyValueCache:
    """Keys and values of the positions seen so far, by layer: allocated when a layer first writes,
    filled in place.

    The model that fills it decides batch, heads, dtype and device; ``length`` counts the positions
    in every layer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (batch, heads, new, head_size) of one layer; return all of them."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, position {end} was asked for"
            )
        if layer not in self._layers:
            self._layers[layer] = (self._allocate(k), self._allocate(v))
        keys, values = self._layers[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def _allocate(self, like: Tensor) -> Tensor:
        batch, heads, _, head_size = like.shape
        return like.new_empty(batch, heads, self.capacity, head_size)


class Linear(nn.Module):
    """x W^T + b with W (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """Layer or RMS normalisation; with a residual, of their sum, which is returned too."""

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
    """Dropout whose mask follows from (seed of the sample, site, position, channel), so it is
    the same on any mesh.
    """

    def __init__(self, probability: float, site: int) -> None:
        super().__init__()
        self.probability, self.site = probability, site
        self.sequence_part = 0  # which part of the sequence x is, where it was cut into equal ones

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not self.probability or context.dropout_seed is None:
            return x
        seed = fold_seed(context.dropout_seed, self.site)
        return kernels.dropout(
            x, self.probability, seed=seed, position_offset=self.sequence_part * x.shape[1]
        )


class Attention(nn.Module):
    """Causal self-attention.

    The fused projection is laid out by key-value group (its queries, then k, then v): a run of rows
    is a run of groups.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size, self.rotary = (
            layer,
            config.head_size,
            config.position == "rotary",
        )
        self.queries_per_group = config.num_heads // config.num_kv_heads
        self.dropout, self.site = config.dropout, dropout_site(layer, 0)
        self.head_offset = (
            0  # the first query head here, where the projections hold some groups only
        )
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
        )
        q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        if self.rotary:
            angles = rotary_angles(context.offset, q.shape[2], self.head_size, x.device)
            q, k = rotate(q, *angles), rotate(k, *angles)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        dropout, seed = self._dropout(context)
        y = kernels.attention(
            q,
            k,
            v,
            document_ids=context.documents,
            dropout=dropout,
            dropout_seed=seed,
            head_offset=self.head_offset,
        )
        return self.output(y.transpose(1, 2).flatten(2))

    def _dropout(self, context: Context) -> tuple[float, Tensor | None]:
        if not self.dropout or context.dropout_seed is None:
            return 0.0, None
        return self.dropout, fold_seed(context.dropout_seed, self.site)


class MLP(nn.Module):
    """Two projections round GELU(tanh), or three round SwiGLU (Shazeer 2020), its gate and value
    interleaved by row.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = Linear(
            config.hidden_size, config.mlp_size * (2 if self.gated else 1), config.bias
        )
        self.down = Linear(config.mlp_size, config.hidden_size, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if not self.gated:
            return self.down(F.gelu(x, approximate="tanh"))
        gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """One pre-norm transformer layer: hidden states in, hidden states out."""

    def __init__(self, config: ModelConfig, layer: int, recompute: str) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm, self.attention = Norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = Norm(config), MLP(config)
        self.attention_dropout = Dropout(config.dropout, dropout_site(layer, 1))
        self.mlp_dropout = Dropout(config.dropout, dropout_site(layer, 2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.recompute == "full" and torch.is_grad_enabled():
            return recomputed(self._forward, x, context)
        return self._forward(x, context)

    def _forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.attention_dropout(self.attention(self.attention_norm(x), context), context)
        y, x = self.mlp_norm(y, residual=x)
        # The MLP keeps two tensors of 4 x hidden_size a token, most of a block's activations; it is
        # cheap to run again.
        selective = self.recompute == "selective" and torch.is_grad_enabled()
        y = recomputed(self.mlp, y) if selective else self.mlp(y)
        return x + self.mlp_dropout(y, context)


class Embedding(nn.Module):
    """Token vectors, plus learned positions where the model has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = Table(config.vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.positions: nn.Module | None = (
            Table(config.sequence_length, config.hidden_size) if learned else None
        )
        self.dropout = Dropout(config.dropout, site=0)

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        x = self.tokens(tokens)
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
    """The last norm, then the mean loss against targets, or logits where there are none."""

    def __init__(self, config: ModelConfig, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.norm, self.vocabulary = Norm(config), config.vocabulary
        self.weight = (
            tied
            if tied is not None
            else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.weight)
        return kernels.linear_cross_entropy(x, self.weight, targets, vocabulary=self.vocabulary)


class GPT(nn.Module):
    """A decoder-only language model, or a contiguous run of its layers.

    Layer 0 is the embedding, layers 1 to num_layers the blocks, the last the head; ``layers`` says
    which to build (default: all), and parameters keep the names they have in the whole. They are
    allocated on torch's current default device and left without values: fill them with
    ``initialise_`` (or load them). ``recompute``: activations to compute again in backward, none |
    selective | full.
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
        """The mean loss (a scalar) where targets (batch, length) are given, else logits (batch,
        length, vocabulary).

        ``inputs`` are tokens (batch, length), or the hidden states that the layers before these
        return; without the head, hidden states are returned too. ``document_ids`` (batch,
        key_length) confine attention to equal ids; their ``kernels.document_bounds`` are computed
        here, once for all layers, unless they are given in their place.
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
        """How ranks may share these layers: the path of a module -> column | row | vocabulary.

        Of a column layer's weight each takes a run of rows, so of outputs; of a row layer's a run
        of columns, so of inputs; of the vocabulary's the rows of some tokens.
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
    """Run without keeping activations; backward runs it again.

    Masks are counter-based, so no generator is saved.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def dropout_site(layer: int, which: int) -> int:
    """A number for each place that drops elements; 0 is the embedding's."""
    return 1 + 3 * layer + which


def rotary_angles(
    offset: int, length: int, head_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_size / 2) of rotary positions (Su et al. 2021), in fp32."""
    frequencies = ROTARY_BASE ** (
        -torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    )
    positions = torch.arange(offset, offset + length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_size / 2) of x (..., length, head_size) by their position's
    angle.
    """
    left, right = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The starting fp32 value (on the CPU) of the parameter with this global name, whatever rank
    asks for it.

    Weights are normal with standard deviation init_std, those that write to the residual stream
    smaller by sqrt(2 x layers) (GPT-2, section 2.3); biases are 0, norm weights 1, rows that pad
    the vocabulary 0, and stay so: no loss depends on them. Each parameter draws from its own
    generator.
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
    """Give every parameter its starting value in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))
    return model


def replace_parameters(
    model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]
) -> dict[nn.Parameter, nn.Parameter]:
    """Put ``make(parameter)`` in place of every parameter, a tied one once; returns the new by
    the old ones.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for attribute, template in list(module.named_parameters(recurse=False)):
            if template not in made:
                made[template] = make(template)
            setattr(module, attribute, made[template])
    return made


def global_names(model: GPT) -> dict[nn.Parameter, str]:
    """The name of each parameter in the whole model, where a tied head's weight is the
    embedding's.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    if model.config.tie_embeddings and model.head is not None:
        names[model.head.weight] = TIED_WEIGHT
    return names


def decayed(name: str) -> bool:
    """Weight decay applies to matrices, not to biases and norm weights (GPT-3, appendix B, as
    nanoGPT reads it).
    """
    return not name.endswith((".bias", "norm.weight"))
