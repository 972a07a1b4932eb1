"""How many bytes of tensors a process holds while a block runs: every storage that an op makes,
until it is freed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within this context, ``peak_bytes`` of storages made in it and alive at the same time, looked
    at after each op.

    Storages on the meta device hold nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def bytes(self) -> int:
        """Of what is alive now."""
        self._alive = {
            key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()
        }
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage(), known)
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return result

    def _see(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        """Remember a new storage; what an op was given and returns was there before."""
        if storage._cdata not in known:
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
