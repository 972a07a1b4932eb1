"""A fence that triton 3.6 omits between copying a tile into shared memory and multiplying it.

``cp.async`` writes shared memory through the generic proxy. The matrix products of compute
capability 9.0 and 10.0 (``wgmma``, ``tcgen05.mma``) read it through the asynchronous proxy. Between
the two the PTX memory model requires ``fence.proxy.async``, or a product may read old contents.
Triton 3.7 emits it after the barrier that follows the wait for the copies; 3.6 does not
(triton-lang/triton#9610). This module inserts it there for attention.
"""

import functools
import re
from typing import Any

import triton

_FENCE = "\tfence.proxy.async.shared::cta;"
_WAIT = re.compile(r"\s*cp\.async\.wait_(group|all)\b")
_BARRIER = re.compile(r"\s*bar(rier)?\.sync\b")
_PRODUCT = re.compile(r"\s*(@!?%p\d+\s+)?(wgmma\.fence|wgmma\.mma_async|tcgen05\.mma)\b")
_MENDED_KERNELS = "attention_"  # prefix of the kernels with matrix products


def missing_fences(ptx: str) -> list[int]:
    """Return the lines (from 0) after which a proxy fence is missing, in the listing's order.

    There is one for each wait for copies that a product follows with no fence between. It is the
    line of the first barrier after the wait, or of the wait if there is none.
    """
    missing: list[int] = []
    waited: int | None = None  # the line after which a fence would go
    behind_barrier = False
    for number, line in enumerate(ptx.splitlines()):
        if _WAIT.match(line):
            waited, behind_barrier = number, False
        elif waited is None:
            continue
        elif "fence.proxy.async" in line:
            waited = None
        elif _PRODUCT.match(line):
            missing.append(waited)
            waited = None
        elif _BARRIER.match(line) and not behind_barrier:
            waited, behind_barrier = number, True
    return missing


def with_fences(ptx: str) -> str:
    """Return the PTX with the missing fences."""
    lines = ptx.splitlines()
    for number in reversed(missing_fences(ptx)):
        lines.insert(number + 1, _FENCE)
    return "\n".join(lines) + "\n"


def needed() -> bool:
    """Return whether this triton omits fences."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (major, minor) < (3, 7)


@functools.cache
def mend() -> None:
    """Make triton 3.6 compile attention with the fence; do nothing under 3.7 and newer.

    The key of triton's cache changes too, so that neither compiler loads what the other compiled.
    """
    if not needed():
        return
    from triton.backends.nvidia.compiler import CUDABackend

    make_ptx, make_hash = CUDABackend.make_ptx, CUDABackend.hash

    def make_fenced_ptx(self: Any, src: Any, metadata: dict[str, Any], *settings: Any) -> str:
        ptx: str = make_ptx(self, src, metadata, *settings)
        return with_fences(ptx) if metadata["name"].startswith(_MENDED_KERNELS) else ptx

    CUDABackend.make_ptx = make_fenced_ptx
    CUDABackend.hash = lambda self: f"{make_hash(self)}-proxy-fence"
