"""Benchmark cases: for each operation, shapes of GPT training, random data, and costs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels import costs
from kernels.costs import Cost


@dataclass(frozen=True)
class Sizes:
    """Sizes that the cases combine: lengths, head dimensions, widths of rows, tokens in a batch."""

    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    widths: tuple[int, ...]
    tokens: int
    vocabulary: int
    attention_width: int  # heads * head_dim, as in the FlashAttention papers
    variant: str = "causal"  # of attention: one of VARIANTS


GPU_SIZES = Sizes(
    (1024, 2048, 4096, 8192, 16384), (64, 128), (768, 1600, 4096, 8192, 12288), 16384, 50304, 2048
)
CPU_SIZES = Sizes((128, 256), (64,), (256, 768), 512, 2048, 128)
CHECK_SIZES = Sizes((33,), (16,), (40,), 33, 70, 32)  # one second in the interpreter


VARIANTS = ("causal", "full", "documents", "window", "softcap", "dropout", "grouped", "decode")
_DOCUMENTS = 8  # of a sequence, on average
_DROPOUT = 0.1
_GROUP = 4  # query heads that share a head of keys
_WINDOW = 4  # the length over the window, between Gemma 2's 8192 / 4096 and Mistral's 32768 / 4096
_SOFTCAP = 50.0  # Gemma 2's, of scores
_LOGIT_SOFTCAP = 30.0  # Gemma 2's


@dataclass(frozen=True)
class Case:
    """One shape of one operation: arguments by name, options, cost.

    Floating-point arguments get gradients.
    """

    op: str
    shape: str
    size: int  # the x axis of its plot
    tensors: dict[str, Tensor]
    forward: Cost
    backward: Cost
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        """Return what limits it on a GPU: matrix products ("gemm") or memory ("copy")."""
        return "gemm" if self.forward.flops else "copy"

    def cost(self, mode: str) -> Cost:
        """Return the cost of forward, backward or both."""
        return {"fwd": self.forward, "bwd": self.backward, "both": self.forward + self.backward}[
            mode
        ]


def cases(op: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases of an operation, one at a time: the largest fill much of a GPU."""
    yield from _MAKERS[op](op, sizes, dtype, device)


def _random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return normal numbers.

    Zeros would draw less power, so a GPU would run them at a higher clock than real data.
    """
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def _attention(op: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for head_dim in sizes.head_dims:
        for length in sizes.lengths:
            batch, heads = max(1, sizes.tokens // length), max(1, sizes.attention_width // head_dim)
            grouped, decode = sizes.variant == "grouped", sizes.variant == "decode"
            queries = 1 if decode else length
            key_heads = max(1, heads // _GROUP) if grouped else heads
            options: dict[str, Any] = {"causal": sizes.variant != "full"}
            seen = 1.0
            if sizes.variant == "documents":
                options["document_ids"] = _document_ids(batch, length, device)
                seen = _visible_share(options["document_ids"])
            if sizes.variant == "dropout":
                options |= {"dropout": _DROPOUT, "dropout_seed": torch.arange(batch, device=device)}
            if sizes.variant == "window":
                options["window"] = max(1, length // _WINDOW)
            if sizes.variant == "softcap":
                options["softcap"] = _SOFTCAP
            size: dict[str, Any] = {
                "batch": batch,
                "heads": heads,
                "length": queries,
                "head_dim": head_dim,
                "key_length": length,
                "key_value_heads": key_heads,
                "causal": options["causal"],
                "window": options.get("window"),
                "itemsize": dtype.itemsize,
            }
            shapes = {"q": (heads, queries), "k": (key_heads, length), "v": (key_heads, length)}
            yield Case(
                op,
                f"batch {batch}, heads {heads}, length {length}, head_dim {head_dim}, "
                f"{sizes.variant}",
                length,
                {
                    name: _random(batch, *of, head_dim, dtype=dtype, device=device)
                    for name, of in shapes.items()
                },
                _scaled(costs.attention(**size), seen),
                _scaled(costs.attention(**size, backward=True), seen),
                options,
            )


def _document_ids(batch: int, length: int, device: str) -> Tensor:
    """Return ids (batch, length) of packed documents of random lengths, ascending."""
    generator = torch.Generator().manual_seed(0)
    begins = torch.rand(batch, length, generator=generator) < _DOCUMENTS / length
    return begins.cumsum(dim=1).int().to(device)


def _visible_share(document_ids: Tensor) -> float:
    """Return the share of causal query-key pairs whose positions are in one document."""
    length = document_ids.shape[1]
    counts = [torch.unique(row, return_counts=True)[1].double() for row in document_ids.cpu()]
    pairs = sum(float((count * (count + 1)).sum()) for count in counts)
    return pairs / (len(counts) * length * (length + 1))


def _scaled(cost: Cost, share: float) -> Cost:
    return Cost(round(cost.flops * share), cost.bytes)


def _norm(op: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    cost = getattr(costs, op)
    parameters = ("weight", "bias") if op == "layer_norm" else ("weight",)
    kinds = [(False, 0.0), (True, 0.0)]  # with a residual or not, weight_offset
    if op == "rms_norm":
        kinds.append((True, 1.0))  # Gemma's
    for width in sizes.widths:
        for residual, offset in kinds:
            rows = {"x": sizes.tokens, **({"residual": sizes.tokens} if residual else {})}
            tensors = {
                name: _random(count, width, dtype=dtype, device=device)
                for name, count in rows.items()
            }
            tensors |= {name: _random(width, dtype=dtype, device=device) for name in parameters}
            yield Case(
                op,
                f"rows {sizes.tokens}, width {width}{', residual' if residual else ''}"
                f"{', weight_offset' if offset else ''}",
                width,
                tensors,
                cost(sizes.tokens, width, residual=residual, itemsize=dtype.itemsize),
                cost(
                    sizes.tokens, width, residual=residual, itemsize=dtype.itemsize, backward=True
                ),
                {"weight_offset": offset} if offset else {},
            )


def _linear_cross_entropy(op: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    capped = {"softcap": _LOGIT_SOFTCAP}
    for width, options in [*((width, {}) for width in sizes.widths), (sizes.widths[0], capped)]:
        size = (sizes.tokens, width, sizes.vocabulary)
        yield Case(
            op,
            f"rows {sizes.tokens}, width {width}, vocabulary {sizes.vocabulary}"
            f"{', softcap' if options else ''}",
            width,
            {
                "hidden": _random(sizes.tokens, width, dtype=dtype, device=device),
                "weight": _random(sizes.vocabulary, width, dtype=dtype, device=device)
                * width**-0.5,
                "targets": torch.randint(sizes.vocabulary, (sizes.tokens,), device=device),
            },
            costs.linear_cross_entropy(*size, itemsize=dtype.itemsize),
            costs.linear_cross_entropy(*size, itemsize=dtype.itemsize, backward=True),
            options,
        )


def _swiglu(op: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for width in sizes.widths:
        channels = 4 * width  # of the feed-forward layer
        yield Case(
            op,
            f"rows {sizes.tokens}, channels {channels}",
            channels,
            {"x": _random(sizes.tokens, 2 * channels, dtype=dtype, device=device)},
            costs.swiglu(sizes.tokens, channels, itemsize=dtype.itemsize),
            costs.swiglu(sizes.tokens, channels, itemsize=dtype.itemsize, backward=True),
        )


def _rotary(op: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for head_dim in sizes.head_dims:
        for length in sizes.lengths:
            batch, heads = max(1, sizes.tokens // length), max(1, sizes.attention_width // head_dim)
            angles = torch.outer(
                torch.arange(length), 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
            ).to(device)
            cost = costs.rotary(batch * heads * length, head_dim, length, itemsize=dtype.itemsize)
            yield Case(
                op,
                f"batch {batch}, heads {heads}, length {length}, head_dim {head_dim}",
                length,
                {"x": _random(batch, heads, length, head_dim, dtype=dtype, device=device)},
                cost,
                cost,
                {"cosine": angles.cos(), "sine": angles.sin()},
            )


def _dropout(op: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for width in sizes.widths:
        cost = costs.dropout(sizes.tokens * width, itemsize=dtype.itemsize)
        yield Case(
            op,
            f"rows {sizes.tokens}, width {width}",
            width,
            {"x": _random(1, sizes.tokens, width, dtype=dtype, device=device)},
            cost,
            cost,
            {"probability": 0.1, "seed": torch.tensor([5], device=device)},
        )


_MAKERS = {
    "attention": _attention,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "dropout": _dropout,
}
