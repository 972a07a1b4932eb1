"""Fused operations for GPT training, each with a plain-torch twin of the same signature.

``import kernels`` is cheap: torch and triton are imported when an operation is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.reference import attention, dropout, layer_norm, linear_cross_entropy, rms_norm

__all__ = ["attention", "dropout", "layer_norm", "linear_cross_entropy", "rms_norm"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    from kernels import reference

    return getattr(reference, name)
