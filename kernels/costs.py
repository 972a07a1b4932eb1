"""FLOPs and memory traffic of every operation, for MFU, the benchmark and the report.

No torch. ``flops`` counts the multiplications and additions of matrix products (2 for each
multiply-add), as is usual, and not the element-wise work. ``bytes`` is the least possible: each
input read once, each output written once. A cost is that of the forward; with ``backward`` it is
that of the backward alone. A training step costs the sum of both.
"""

from dataclasses import dataclass

OPERATIONS = (
    "attention",
    "layer_norm",
    "rms_norm",
    "linear_cross_entropy",
    "swiglu",
    "rotary",
    "dropout",
)

# The head and its loss take the logits a chunk of rows at a time: 256 MiB of them are long enough
# for full-speed products, and a tenth of what 8k rows of GPT-2 would take.
LOGITS_CHUNK_BYTES = 256 * 2**20
LEAST_CHUNK_ROWS = 128
# Ranks of a group meet once a chunk: they must agree, whatever their share of the vocabulary.
GROUP_CHUNK_ROWS = 2048


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes moved to or from memory; costs can be added."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def matmul(rows: int, inner: int, columns: int, *, itemsize: int, backward: bool = False) -> Cost:
    """Return the cost of (rows, inner) @ (inner, columns); backward is two such products."""
    flops = 2 * rows * inner * columns
    moved = itemsize * (rows * inner + inner * columns + rows * columns)
    return Cost(2 * flops, 2 * moved) if backward else Cost(flops, moved)


def attention(
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    *,
    key_length: int | None = None,
    key_value_heads: int | None = None,
    causal: bool = True,
    window: int | None = None,
    itemsize: int,
    backward: bool = False,
) -> Cost:
    """Return the cost of two products over the visible scores; backward has five.

    One of the five computes the scores again. The convention is that of the FlashAttention papers:
    4 * batch * heads * length * key_length * head_dim forward and 2.5 times that backward; half of
    it for causal attention with equal lengths. If there are fewer queries than keys, they are the
    last positions and see nearly all keys.

    With a ``window``, each query counts that many keys at most, and keys before the first query's
    window are not read.
    """
    key_length = length if key_length is None else key_length
    key_value_heads = heads if key_value_heads is None else key_value_heads
    seen = min(length, key_length)
    keys_read = key_length
    twice_pairs = seen * (2 * key_length - seen) if causal else 2 * length * key_length
    if window is not None and window < key_length:  # less the triangle of keys before the windows
        twice_pairs -= (key_length - window) ** 2 - max(0, key_length - seen - window) ** 2
        keys_read = min(key_length, seen + window - 1)
    flops = 2 * batch * heads * twice_pairs * head_dim
    queries = batch * heads * length * head_dim
    per_key = 2 * batch * key_value_heads * head_dim  # elements of K and V
    statistics = 4 * batch * heads * length
    if backward:  # reads q, k, v, out, dout; writes dq, dk, dv
        moved = 4 * queries + per_key * (keys_read + key_length)
        return Cost(flops * 5 // 2, itemsize * moved + statistics)
    return Cost(flops, itemsize * (2 * queries + per_key * keys_read) + statistics)


def layer_norm(
    rows: int,
    columns: int,
    *,
    residual: bool = False,
    itemsize: int,
    backward: bool = False,
    parameter_itemsize: int | None = None,
    residual_itemsize: int | None = None,
) -> Cost:
    """Return the cost of reading x and writing y; backward reads dy and x, and writes dx.

    A residual adds a read of x's size, and in the forward a write.

    Parameters and residual may be wider than x; the sum and its gradient are then as wide as the
    residual. Backward reads the sum in place of x, and writes one more gradient of the residual's
    size.

    Our backward moves this many bytes up to 12,288 columns. Beyond, it reads dy and x twice, once
    for the averages over rows and once for the rest: 5 times x's size instead of 3, so it reaches
    at most 3/5 of a copy's rate.
    """
    itemsizes = (
        itemsize,
        parameter_itemsize or itemsize,
        (residual_itemsize or itemsize) if residual else 0,
    )
    return _norm(rows, columns, itemsizes, backward, parameters=2, statistics=2)


def rms_norm(
    rows: int,
    columns: int,
    *,
    residual: bool = False,
    itemsize: int,
    backward: bool = False,
    parameter_itemsize: int | None = None,
    residual_itemsize: int | None = None,
) -> Cost:
    """Return the cost of ``layer_norm`` without mean and bias."""
    itemsizes = (
        itemsize,
        parameter_itemsize or itemsize,
        (residual_itemsize or itemsize) if residual else 0,
    )
    return _norm(rows, columns, itemsizes, backward, parameters=1, statistics=1)


def _norm(
    rows: int,
    columns: int,
    itemsizes: tuple[int, int, int],
    backward: bool,
    parameters: int,
    statistics: int,
) -> Cost:
    """Return the cost of a norm; itemsizes are of x, parameters and residual (0: none)."""
    own, parameter, residual = itemsizes
    # dy and dx; what was normalised; the sum's gradient; the residual's, if it is not dx itself
    if backward:
        row = 2 * own + (residual or own) + residual + (residual if residual != own else 0)
    else:  # x and y; the residual and the sum
        row = 2 * own + 2 * residual
    # Backward reads the weight and writes a gradient for every parameter.
    parameter_passes = 1 + parameters if backward else parameters
    return Cost(0, columns * (row * rows + parameter * parameter_passes) + 4 * statistics * rows)


def linear_cross_entropy(
    rows: int, hidden_size: int, vocabulary: int, *, itemsize: int, backward: bool = False
) -> Cost:
    """Return the cost of one product; backward has two.

    ``bytes`` covers hidden, weight and targets only: the logits need not be stored.
    """
    flops = 2 * rows * hidden_size * vocabulary
    operands = itemsize * hidden_size * (rows + vocabulary)
    if backward:
        return Cost(2 * flops, 2 * operands)
    return Cost(flops, operands + 8 * rows + 4)


def loss_chunk_rows(row_bytes: float, *, grouped: bool) -> int:
    """Return the most rows of logits that are there at once, one taking `row_bytes` on a rank.

    `grouped`: the vocabulary is split over a group of ranks.
    """
    if grouped:
        return GROUP_CHUNK_ROWS
    return max(LEAST_CHUNK_ROWS, int(LOGITS_CHUNK_BYTES // max(1, row_bytes)))


def swiglu(rows: int, columns: int, *, itemsize: int, backward: bool = False) -> Cost:
    """Return the cost of reading gate and value and writing one; backward reads 3 and writes 2."""
    return Cost(0, itemsize * rows * columns * (5 if backward else 3))


def rotary(rows: int, head_dim: int, length: int, *, itemsize: int, backward: bool = False) -> Cost:
    """Return the cost of reading and writing the rows, and reading the table of angles.

    The table is (length, head_dim) in fp32: cosines and sines.
    """
    return Cost(0, itemsize * 2 * rows * head_dim + 4 * length * head_dim)


def dropout(elements: int, *, itemsize: int, backward: bool = False) -> Cost:
    """Return the cost of reading and writing; backward computes the mask again."""
    return Cost(0, itemsize * 2 * elements)
