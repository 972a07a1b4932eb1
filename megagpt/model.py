"""A decoder-only transformer in plain PyTorch: GPT-2 and 3, and what later models changed.

Radford et al. 2019 and Brown et al. 2020 (arXiv 2005.14165): pre-norm blocks, learned positions,
GELU(tanh), tied head, residual projections initialised smaller by sqrt(2 x layers). The keys of
``ModelConfig`` make it Llama, Mistral, Qwen, OLMo 2, GPT-NeoX or Gemma 2. Nothing here knows of
ranks, meshes or DeepSpeed. Shapes: tokens (batch, length); hidden states (batch, length,
hidden_size).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.philox import fold_seed
from megagpt.config import ModelConfig
from megagpt.rotary import rotary_angles
from megagpt.utils import IGNORED

TIED_WEIGHT = "embedding.tokens.weight"  # also the head's weight if embeddings are tied
gelu_tanh = partial(F.gelu, approximate="tanh")  # Hendrycks and Gimpel 2016, as in GPT-2
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu_tanh,
    "gelu_exact": F.gelu,
    "squared_relu": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
    "geglu": gelu_tanh,  # of the gate (Shazeer 2020, arXiv 2002.05202)
}


@dataclass(frozen=True)
class Context:
    """What every block needs in addition to the hidden states.

    ``documents`` restricts attention to one document. ``positions`` (batch, length) are those of
    the tokens; None: they count from the first one. ``dropout_seed`` (batch,) determines the
    dropout masks of each sample, or (batch, places) of each place in it (``place_seeds``); None in
    evaluation. ``cache`` holds the keys and values of earlier positions during generation.
    """

    documents: kernels.DocumentBounds | None = None
    dropout_seed: Tensor | None = None
    cache: "KeyValueCache | None" = None
    positions: Tensor | None = None
    _angles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """The position of the first token passed to the model."""
        return self.cache.length if self.cache is not None else 0

    def seed(self, place: int) -> Tensor | None:
        """Return the seed (batch,) of one place that applies dropout, or None."""
        if self.dropout_seed is None:
            return None
        if self.dropout_seed.dim() == 1:
            return fold_seed(self.dropout_seed, place)
        return self._seeds_by_place[place]

    @cached_property
    def _seeds_by_place(self) -> Tensor:
        assert self.dropout_seed is not None
        return self.dropout_seed.T.contiguous()  # (places, batch)

    def angles(
        self, config: ModelConfig, length: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the rotary angles of ``length`` positions, computed once for all layers."""
        if length not in self._angles:
            angles = rotary_angles(config, self.offset, length, device)
            if self.positions is not None:
                # (batch, 1, length, rotated_size / 2), the same for all heads
                angles = (angles[0][self.positions][:, None], angles[1][self.positions][:, None])
            self._angles[length] = angles
        return self._angles[length]

    def token_positions(self, length: int, device: torch.device) -> Tensor:
        """Return the positions of the tokens: (length,), or (batch, length) if they were given."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.offset, self.offset + length, device=device)


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
    """A linear layer: x W^T + b, with W (outputs, inputs), and the update of its adapters."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.lora is None else y + self.lora(x, context)


class Norm(nn.Module):
    """Layer or RMS normalisation; with a residual, normalise the sum and return the sum too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.norm_bias else None
        self.layer_norm = config.norm == "layernorm"
        self.options = norm_options(config)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.layer_norm:
            return kernels.layer_norm(x, self.weight, self.bias, residual=residual, **self.options)
        return kernels.rms_norm(x, self.weight, residual=residual, **self.options)


class NoNorm(nn.Module):
    """In the place of a norm that a block does not have."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return x
        total = x + residual
        return total, total


class HeadNorm(nn.Module):
    """RMS normalisation of queries or keys (batch, heads, length, head_size).

    Of each head, all with the same weight (Qwen 3), or of all heads as one row (OLMo 2).
    """

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.whole = config.qk_norm == "whole"
        self.weight = nn.Parameter(torch.empty(config.head_size * (heads if self.whole else 1)))
        self.options = norm_options(config)

    def forward(self, x: Tensor) -> Tensor:
        if not self.whole:
            return self._rows(x)
        by_token = x.transpose(1, 2)  # (batch, length, heads, head_size)
        return self._rows(by_token.flatten(2)).view(by_token.shape).transpose(1, 2)

    def _rows(self, x: Tensor) -> Any:
        return kernels.rms_norm(x, self.weight, **self.options)


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
        seed = context.seed(self.site) if self.probability else None
        if seed is None:
            return x
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
        self.config = config
        self.layer = layer
        self.window = config.window(layer)
        self.queries_per_group = config.num_heads // config.num_kv_heads
        self.site = dropout_site(layer, 0)
        self.head_offset = 0  # the first query head here, if the projections hold only some groups
        self.qkv = Linear(
            config.hidden_size, config.query_size + 2 * config.key_value_size, config.qkv_bias
        )
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if config.qk_norm != "none":
            self.query_norm = HeadNorm(config, config.num_heads)
            self.key_norm = HeadNorm(config, config.num_kv_heads)
        self.output = Linear(config.query_size, config.hidden_size, config.output_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        groups = (
            self.qkv(x, context)
            .unflatten(-1, (-1, self.queries_per_group + 2, self.config.head_size))
            .permute(0, 2, 3, 1, 4)
        )  # (batch, kv_heads, queries_per_group + 2, length, head_size)
        q = self.query_norm(groups[:, :, :-2].flatten(1, 2))  # (batch, heads, length, head_size)
        k = self.key_norm(groups[:, :, -2])  # (batch, kv_heads, length, head_size)
        v = groups[:, :, -1]  # (batch, kv_heads, length, head_size)
        if self.config.position == "rotary":
            angles = context.angles(self.config, q.shape[2], x.device)
            q = kernels.rotary(q, *angles)
            k = kernels.rotary(k, *angles)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)  # length now covers earlier positions
        dropout, seed = self._dropout(context)
        y = kernels.attention(
            q,
            k,
            v,
            scale=self.config.score_scale,
            softcap=self.config.score_softcap,
            window=self.window,
            document_ids=context.documents,
            dropout=dropout,
            dropout_seed=seed,
            head_offset=self.head_offset,
        )  # (batch, heads, length, head_size)
        return self.output(y.transpose(1, 2).flatten(2), context)  # (batch, length, hidden_size)

    def _dropout(self, context: Context) -> tuple[float, Tensor | None]:
        seed = context.seed(self.site) if self.config.dropout else None
        return (0.0, None) if seed is None else (self.config.dropout, seed)


class MLP(nn.Module):
    """Two projections with an activation between them, or three, of which one is its gate.

    The rows of gate and value alternate in ``up``, so that a contiguous run of rows holds both.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS.get(config.activation)  # None: swiglu, which is fused
        self.gated = config.gated
        self.up = Linear(
            config.hidden_size, config.mlp_size * (2 if self.gated else 1), config.mlp_bias
        )
        self.down = Linear(config.mlp_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.up(x, context)  # (batch, length, mlp_size, or twice that if gated)
        if self.activation is None:
            return self.down(kernels.swiglu(x), context)
        if not self.gated:
            return self.down(self.activation(x), context)
        gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)  # (batch, length, mlp_size) each
        return self.down(self.activation(gate) * value, context)


class Block(nn.Module):
    """One transformer layer: hidden states in, hidden states out.

    Attention and MLP have a norm before them (GPT-2), after them (OLMo 2) or both (Gemma 2). The
    MLP reads the sum that attention wrote to, or both read the same input (GPT-NeoX).
    """

    def __init__(self, config: ModelConfig, layer: int, recompute: str) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.compiled: Callable[[Tensor, Context], Tensor] | None = None  # see compile_blocks
        self.parallel = config.parallel_residual
        before = NoNorm if config.post_norm == "instead" else partial(Norm, config)
        after = NoNorm if config.post_norm == "none" else partial(Norm, config)
        self.attention_norm = before()
        self.attention = Attention(config, layer)
        self.attention_post_norm = after()
        self.mlp_norm = before()
        self.mlp = MLP(config)
        self.mlp_post_norm = after()
        self.attention_dropout = Dropout(config.dropout, dropout_site(layer, 1))
        self.mlp_dropout = Dropout(config.dropout, dropout_site(layer, 2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        run: Callable[[Tensor, Context], Tensor] = self._forward
        if self.compiled is not None and torch.is_grad_enabled():
            if self.config.position == "rotary":  # here, because torch.compile cannot trace it
                context.angles(self.config, x.shape[1], x.device)
            run = self.compiled
        if self.recompute == "full" and torch.is_grad_enabled():
            return recomputed(run, x, context)
        return run(x, context)

    def _forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.attention_post_norm(self.attention(self.attention_norm(x), context))
        y = self.attention_dropout(y, context)
        if self.parallel:
            return x + y + self._mlp(self.mlp_norm(x), context)
        y, x = self.mlp_norm(y, residual=x)  # the normalised sum and the sum
        return x + self._mlp(y, context)

    def _mlp(self, x: Tensor, context: Context) -> Tensor:
        # The MLP keeps two tensors of 4 x hidden_size per token, most of a block's activations, and
        # is cheap to recompute.
        selective = self.recompute == "selective" and torch.is_grad_enabled()
        y = recomputed(self.mlp, x, context) if selective else self.mlp(x, context)
        return self.mlp_dropout(self.mlp_post_norm(y), context)


class Embedding(nn.Module):
    """Token vectors, plus learned positions if the model has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = config.embedding_scale
        self.tokens = Table(config.vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.positions: nn.Module | None = (
            Table(config.sequence_length, config.hidden_size) if learned else None
        )
        self.dropout = Dropout(config.dropout, site=0)

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        x = self.tokens(tokens)  # (batch, length, hidden_size)
        if self.scale != 1:
            x = x * self.scale
        if self.positions is not None:
            x = x + self.positions(context.token_positions(tokens.shape[1], tokens.device))
        return self.dropout(x, context)


class Table(nn.Module):
    """Rows looked up by index."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Head(nn.Module):
    """The final norm and the output projection: mean loss given targets, logits without.

    The z-loss belongs to training: an evaluation's loss is the cross-entropy alone.
    """

    def __init__(self, config: ModelConfig, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.config = config
        self.norm = Norm(config)
        self.weight = (
            tied
            if tied is not None
            else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        x = self.norm(x)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (batch, length, rows of the weight) of normalised states."""
        logits = F.linear(x, self.weight)
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    def loss(self, x: Tensor, targets: Tensor, **shared: Any) -> Tensor:
        """Return the mean loss; ``shared`` describes ranks that each hold some rows."""
        return kernels.linear_cross_entropy(
            x,
            self.weight,
            targets,
            ignore_index=IGNORED,
            vocabulary=self.config.vocabulary,
            softcap=self.config.logit_softcap,
            z_loss=self.config.z_loss if torch.is_grad_enabled() else 0.0,
            **shared,
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
        positions: Tensor | None = None,
        dropout_seed: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the mean loss of the targets (batch, length) that are not ignored, or logits.

        Logits are (batch, length, padded vocabulary). ``inputs`` are tokens (batch, length), or the
        hidden states from the layers before these; without the head, hidden states are returned.
        ``dropout_seed`` is described at ``Context``.
        ``document_ids`` (batch, key_length) restrict attention to equal ids. Their
        ``kernels.document_bounds`` are computed here, once for all layers, unless they are passed
        in their place. ``positions`` (batch, length) replace 0, 1, 2 and so on; each must be below
        ``length``.
        """
        documents = None if document_ids is None else kernels.document_bounds(document_ids)
        context = Context(documents, dropout_seed, cache, positions)
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
        (inputs) of a row layer's, and the rows of some tokens of a vocabulary layer's. A norm of
        all heads has the outputs of its heads.
        """
        roles = {
            "attention.qkv": "column",
            "attention.output": "row",
            "mlp.up": "column",
            "mlp.down": "row",
        }
        if self.config.qk_norm == "whole":
            roles |= {"attention.query_norm": "column", "attention.key_norm": "column"}
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


def compile_blocks(model: GPT, backend: str = "inductor") -> None:
    """Let torch.compile compile each block at its first forward with gradients.

    Evaluation and generation, whose lengths vary, stay as they are. A block is one graph, with our
    operations as custom operators in it.
    """
    import torch._dynamo  # takes a second

    # torch gives up after eight variants of one function, and here each block may be one.
    limit = 8 * (1 + len(model.blocks))
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, limit)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, limit)
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.compiled = torch.compile(
            block._forward, backend=backend, fullgraph=True, dynamic=False
        )


def recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Run ``function`` without keeping activations; backward runs it again.

    Dropout masks are counter-based, so no generator state is saved.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def dropout_site(layer: int, which: int) -> int:
    """Return the number of a place that applies dropout; the embedding's is 0."""
    return 1 + 3 * layer + which


def place_seeds(config: ModelConfig, seeds: Tensor) -> Tensor:
    """Return the seed (batch, places) of each place that applies dropout, from those of samples.

    Computed before the step, on the host, they cost no launches. A place is a ``dropout_site``.
    """
    places = torch.arange(dropout_site(config.num_layers, 0), device=seeds.device)
    return fold_seed(seeds[:, None], places)


def norm_options(config: ModelConfig) -> dict[str, Any]:
    """Return what every norm of a model has in common, as arguments of ``kernels``."""
    return {"eps": config.norm_epsilon, "weight_offset": float(config.norm_weight_offset)}


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Return the initial fp32 value (on the CPU) of the parameter with this global name.

    Every rank gets the same value: each parameter has its own generator, seeded by (seed, name).
    Weights are normal with standard deviation init_std, divided by sqrt(2 x layers) for those that
    write to the residual stream (GPT-2, section 2.3). Biases are 0, norm weights 1 with their
    offset. Rows that pad the vocabulary are 0 and stay 0, because no loss depends on them.
    """
    owner, _, kind = name.rpartition(".")
    if kind == "bias":
        return torch.zeros(shape)
    if owner.endswith("norm"):
        return torch.full(shape, 1.0 - config.norm_weight_offset)
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
