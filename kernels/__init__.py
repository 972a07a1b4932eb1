"""Fused operations for GPT training, each with a plain-torch twin of the same signature.

``import kernels`` is cheap: torch and triton are imported at the first use of an operation.
``explain`` names the implementation that a call would run, with the reason. ``launches`` counts the
Triton functions that ran. The variable ``MEGAGPT_KERNELS=triton|torch|interpret`` forces the
choice.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.dispatch import explain as explain
    from kernels.documents import DocumentBounds as DocumentBounds
    from kernels.documents import document_bounds as document_bounds
    from kernels.launcher import launches as launches
    from kernels.reference import attention as attention
    from kernels.reference import dropout as dropout
    from kernels.reference import layer_norm as layer_norm
    from kernels.reference import linear_cross_entropy as linear_cross_entropy
    from kernels.reference import rms_norm as rms_norm
    from kernels.reference import rotary as rotary
    from kernels.reference import swiglu as swiglu

if os.environ.get("MEGAGPT_KERNELS") == "interpret":
    # Triton reads this when it is first imported, to decorate its own library.
    os.environ["TRITON_INTERPRET"] = "1"


_OPERATIONS = (
    "attention",
    "dropout",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "swiglu",
)
_BESIDE_THEM = {  # other public names, each with its module
    "DocumentBounds": "kernels.documents",
    "document_bounds": "kernels.documents",
    "explain": "kernels.dispatch",
    "launches": "kernels.launcher",
}
__all__ = [*_OPERATIONS, *_BESIDE_THEM]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    if name in _BESIDE_THEM:
        found = getattr(importlib.import_module(_BESIDE_THEM[name]), name)
    else:
        from kernels.dispatch import operation

        found = operation(name)
    # Later lookups then skip this function, which takes longer than a small launch.
    globals()[name] = found
    return found
