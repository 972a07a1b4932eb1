"""Attention inputs with results that are exact in 16 bits, for every variant Triton compiles.

A query gives equal weight to a power of two of keys and none to the others, so weights are exact.
The keys are a node of the binary tree over positions: all keys whose index begins with the same
bits. Queries choose nodes of all sizes, from one key to all of them. Products therefore run over
many blocks of keys with operands that are not zero. Every score gradient that is not zero is an
integer over a power of two, with few bits.

With a soft cap, the scores of half of the queries saturate: the keys of a node have two scores,
which only the cap makes equal, and the score gradients are 0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import reference

# Several blocks of queries, and more blocks of keys than any ring of tiles holds; a power of two.
LENGTH = 1024
DROPOUT = 0.5  # the kept elements are doubled, which is exact
# A chosen key scores higher than others by at least 2; times this, exp2 of the others is 0.
_SCALE = 64.0
_CHANNELS = 16  # of an output gradient that are not zero: their sums have few bits
# With dropout, outputs are fractions, and score gradients have the bits of both factors.
_CHANNELS_BESIDE_DROPOUT = 1
_LEVELS_BESIDE_DROPOUT = 6
# Times scale, a score of -2 becomes tanh(-1/2) of this: exp2 of that is 0, too.
_SOFTCAP = 4 * _SCALE
# Of queries with saturated scores: tanh((80 - 1) / 4) is 1, also in fp64. A key that is not chosen
# loses twice 64, and its tanh is -1.
_SATURATED = 80
_SATURATED_SIGN = 64


class Variant(NamedTuple):
    """What attention is compiled for: equal variants run the same machine code.

    Triton distinguishes three classes of lengths and of the group: 1, 16 (a multiple of 16) and 0
    (any other). ``aligned``: rows are multiples of 16 elements apart and channels are adjacent.
    ``gradients`` is False if only the forward will run.
    """

    head_dim: int
    length: int = 16
    key_length: int = 16
    group: int = 1
    aligned: bool = True
    causal: bool = True
    documents: bool = False
    window: bool = False
    softcap: bool = False
    dropout: bool | int = False
    deterministic: bool = False
    gradients: bool = True

    def __str__(self) -> str:
        """Return the head dimension and what differs from most calls."""
        flags = {
            "not causal": not self.causal,
            "documents": self.documents,
            "window": self.window,
            "soft cap": self.softcap,
            "dropout": self.dropout,
            "deterministic": self.deterministic,
            "grouped heads": self.group != 1,
            "one query": self.length == 1,
            "lengths that are no multiples of 16": 0 in (self.length, self.key_length),
            "unaligned rows": not self.aligned,
            "forward only": not self.gradients,
        }
        return ", ".join([f"head_dim {self.head_dim}", *(name for name, on in flags.items() if on)])


def variant_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    dropout: float = 0.0,
    deterministic: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Any, ...]:
    """Return the ``Variant`` of a call of ``kernels.attention``, as a plain tuple.

    torch.compile can trace a tuple.
    """
    # One query without gradients is a step of generation. Several may be computed again with
    # gradients inside a backward (reentrant checkpointing), where the self-check cannot run.
    wants_gradients = torch.is_grad_enabled() or (
        q.shape[2] > 1 and not torch.is_inference_mode_enabled()
    )
    aligned = all(
        x.stride(3) == 1 and all(x.stride(i) % 16 == 0 for i in range(3)) for x in (q, k, v)
    )
    return (
        _constant(q.shape[3]),
        _class(q.shape[2]),
        _class(k.shape[2]),
        _class(q.shape[1] // k.shape[1]),
        aligned,
        causal,
        document_ids is not None,
        reference.binding_window(window, k) is not None,
        softcap is not None,
        1 if dropout > 0 else 0,  # a branch, since torch.compile may hold a symbol for the number
        wants_gradients and (deterministic or torch.are_deterministic_algorithms_enabled()),
        wants_gradients,
    )


def _class(size: int) -> int:
    """Return the class to which Triton specialises an integer argument."""
    return 1 if size == 1 else 16 if size % 16 == 0 else 0


def _constant(head_dim: int) -> int:
    """Return the number itself, which may be a symbol under torch.compile, as a constant.

    The comparison of each bit makes torch.compile fix its value.
    """
    if not torch.compiler.is_compiling():
        return head_dim
    return sum(1 << bit for bit in range(9) if head_dim // 2**bit % 2 == 1)  # it is at most 256


class ExactCase(NamedTuple):
    """Integers in fp64, each (1, heads, length, head_dim), and the options of the call."""

    q: Tensor
    k: Tensor
    v: Tensor
    out_gradient: Tensor
    options: dict[str, Any]
    unit: float  # every exact result is a multiple of this


def exact_case(variant: Variant, device: torch.device) -> ExactCase:
    """Return inputs for a variant, the same on every call.

    A head of n channels distinguishes 2^(n - 1) keys: fewer than LENGTH if n is below 11, and
    hardly any below 4.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, device="cpu")

    head_dim = variant.head_dim
    span = min(LENGTH, 1 << (head_dim - 1))  # as many keys as there are codes of head_dim - 1 bits
    key_length = span if variant.key_length == 16 or span <= 16 else span - 5
    length = {1: 1, 16: max(1, key_length - key_length % 16), 0: key_length // 2 + 1}[
        variant.length
    ]
    group = {1: 1, 16: 16, 0: 3}[variant.group]
    # More heads if there is one query: each query tests one node.
    key_heads = 16 if length == 1 else 1 if group == 16 else 2
    heads = group * key_heads

    position = torch.arange(key_length, device="cpu")
    query = position[key_length - length :]
    documents = _Documents(span, key_length) if variant.documents else None
    window = 3 * span // 8 + 3 if variant.window else None  # no multiple of a block
    level, node = _choose(
        variant, query, key_length, span, documents, window, integers(0, 2**40, 3, heads, length)
    )
    saturated = integers(0, 1, heads, length) == 1 if variant.softcap else None
    q, k = _codes(level, node, saturated, position, span, head_dim, key_heads, integers)

    v = integers(-1, 1, 1, key_heads, key_length, head_dim)
    if not variant.dropout:  # neighbours average 1, and so does every node of more than one key
        odd = v[:, :, 1::2]
        odd.copy_(2 - v[:, :, : 2 * odd.shape[2] : 2])
    channels = _CHANNELS_BESIDE_DROPOUT if variant.dropout else _CHANNELS
    chosen = (
        torch.rand(1, heads, length, head_dim, generator=generator, device="cpu").argsort(-1)
        < channels
    )
    out_gradient = (2 * integers(0, 1, 1, heads, length, head_dim) - 1) * chosen

    options: dict[str, Any] = {"causal": variant.causal, "scale": _SCALE}
    if documents is not None:
        options["document_ids"] = documents.of(position)[None].to(device)
    if window is not None:
        options["window"] = window
    if variant.softcap:
        options["softcap"] = _SOFTCAP
    if variant.dropout:
        options |= {"dropout": DROPOUT, "dropout_seed": torch.tensor([2**40 + 5], device=device)}
    q, k, v, out_gradient = (x.to(device, torch.float64) for x in (q, k, v, out_gradient))
    return ExactCase(q, k, v, out_gradient, options, 1 / span)


class _Documents:
    """Regions of a quarter of the keys, each with two documents.

    The documents alternate by pairs of positions.
    """

    def __init__(self, span: int, key_length: int) -> None:
        self.width = max(4, span // 4)
        self.key_length = key_length
        self.offset = self.width // 5 * 2  # regions do not begin where blocks of keys do

    def of(self, position: Tensor) -> Tensor:
        return (position + self.offset) // self.width * 2 + (position >> 1) % 2

    def bounds(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and last position of the region."""
        start = (position + self.offset) // self.width * self.width - self.offset
        return start.clamp(min=0), (start + self.width - 1).clamp(max=self.key_length - 1)


def _choose(
    variant: Variant,
    query: Tensor,
    key_length: int,
    span: int,
    documents: _Documents | None,
    window: int | None,
    random: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return level and index of each query's node, both (heads, length).

    The keys of a node are index * 2^level and those after it, 2^level in all. The query sees all of
    them or, with two documents, every other pair, which is half of them. One node in four is the
    last visible one. One in four lies half beyond the last visible key, so that it needs a mask,
    and with a window one in four half before the first.
    """
    levels = span.bit_length() - 1
    if variant.dropout:
        levels = min(levels, _LEVELS_BESIDE_DROPOUT)
    start, end = torch.zeros_like(query), torch.full_like(query, key_length - 1)
    if documents is not None:
        start, end = documents.bounds(query)
    if variant.causal:
        end = query
    if window is not None:
        start = torch.maximum(start, query - window + 1)
    wanted = random[0] % (levels + 1)
    level, node = torch.zeros_like(wanted), query.expand_as(wanted)
    for size in range(levels + 1):
        if documents is not None and size < 2:  # level 0 is the query's own key
            continue
        first, last = -(-start >> size), ((end + 1) >> size) - 1
        fits = (last >= first) & (wanted >= size)
        level = torch.where(fits, size, level)
        drawn = torch.where(
            random[2] % 4 == 0, last, first + random[1] % (last - first + 1).clamp(min=1)
        )
        node = torch.where(fits, drawn, node)
    # The last 2^half visible keys are half a node.
    half = ((end + 1) & -(end + 1)).double().log2().long()
    beginning = end + 1 - (1 << half)
    fits = (half < span.bit_length() - 1) & (half <= levels) & (beginning >= start)
    if documents is not None:
        fits &= half >= 2
    fits = fits & (random[2] % 4 == 1)
    level = torch.where(fits, half + 1, level)
    node = torch.where(fits, beginning >> (half + 1), node)
    if window is None:
        return level, node
    # The first 2^half visible keys are half a node.
    half = (start & -start).clamp(min=1).double().log2().long()
    fits = (start > 0) & (half < span.bit_length() - 1) & (half <= levels)
    fits &= start + (1 << half) <= end + 1
    if documents is not None:
        fits &= half >= 2
    fits = fits & (random[2] % 4 == 2)
    return torch.where(fits, half + 1, level), torch.where(fits, start >> (half + 1), node)


def _codes(
    level: Tensor,
    node: Tensor,
    saturated: Tensor | None,
    position: Tensor,
    span: int,
    head_dim: int,
    key_heads: int,
    integers: Any,
) -> tuple[Tensor, Tensor]:
    """Return q and k, whose product is 0 for the keys of a node and at most -2 for all others.

    The channels of a key hold the bits of its position as signs, and a 1; those of a query hold the
    leading bits of its node, and minus their number. In every other channel one of the two is
    random and the other zero. For ``saturated`` queries (heads, length) the product is 79 or 81 for
    the keys of a node (80 if it is one key), by the first bit below the node's, and at most -47 for
    all others.
    """
    heads, length = level.shape
    bits = span.bit_length() - 1
    columns = integers(0, 2**40, head_dim).argsort()
    code, bias, rest = columns[:bits], columns[bits], columns[bits + 1 :]
    q = torch.zeros(1, heads, length, head_dim, dtype=torch.int64, device="cpu")
    k = torch.zeros(1, key_heads, len(position), head_dim, dtype=torch.int64, device="cpu")
    shift = torch.arange(bits, device="cpu")
    k[..., code] = 2 * (position[:, None] >> shift & 1) - 1
    k[..., bias] = 1
    beginning = node << level
    signs = 2 * (beginning[..., None] >> shift & 1) - 1  # (heads, length, bits)
    leading = shift >= level[..., None]
    q[0, :, :, code] = torch.where(leading, signs, 0)
    q[..., bias] = level - bits
    if saturated is not None:
        next_bit = (shift == level[..., None] - 1).long()
        strong = torch.where(leading, _SATURATED_SIGN * signs, next_bit)
        q[0, :, :, code] = torch.where(saturated[..., None], strong, q[0, :, :, code])
        strong_bias = _SATURATED + _SATURATED_SIGN * (level - bits)
        q[..., bias] = torch.where(saturated, strong_bias, q[..., bias])
    q[..., rest[::2]] = integers(-1, 1, 1, heads, length, len(rest[::2]))
    k[..., rest[1::2]] = integers(-1, 1, 1, key_heads, len(position), len(rest[1::2]))
    return q, k
