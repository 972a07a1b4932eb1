"""Bad input to a fused operation is refused by name, whichever implementation would run, before
any launch.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

import kernels
from kernels import DocumentBounds


def moved(arguments: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Tensors to the device, unless they are elsewhere on purpose."""

    def move(x: Any) -> Any:
        if isinstance(x, DocumentBounds):
            return DocumentBounds(move(x.positions))
        return x.to(device) if isinstance(x, Tensor) and not x.is_meta else x

    return {name: move(x) for name, x in arguments.items()}


def refused(op: str, message: str, arguments: Mapping[str, Any]) -> None:
    """``kernels.<op>`` and ``kernels.explain`` raise this; nothing was launched, not even a
    self-check.
    """
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(kernels, op)(**arguments)
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        kernels.explain(op, **arguments)
    assert kernels.launches() == {}
