"""Counts what this rank really sends: calls and elements by axis of the mesh, at the lowest
level that Python sees.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import ProcessGroup

from megagpt.distributed import Mesh

# Everything in torch.distributed and deepspeed.comm ends in one of these methods of a process
# group.
OPERATIONS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather_single": "all_gather",
    "_allgather_base": "all_gather",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "send": "send",
}

Traffic = dict[tuple[str, str], tuple[int, int]]  # (axis, operation) -> calls, elements


@contextmanager
def counted(mesh: Mesh) -> Iterator[Traffic]:
    """Fill the yielded dict when the block ends.

    The elements are the larger side's: whole, not a rank's share.
    """
    axes = {
        group.group_name: axis
        for axis, group in (
            ("pipeline", mesh.pipeline_group),
            ("data", mesh.data_group),
            ("tensor", mesh.tensor_group),
            ("model", mesh.model_group),
        )
    }
    calls: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    traffic: Traffic = {}

    def counting(method: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def call(group: ProcessGroup, *arguments: Any, **options: Any) -> Any:
            # Only pipelines send, an interleaved one through groups of two
            # (`engine.neighbour_groups`).
            key = (
                "pipeline" if operation == "send" else axes.get(group.group_name, "other"),
                operation,
            )
            calls[key] += 1
            elements[key] += max(map(tensor_elements, arguments[:2]), default=0)
            return method(group, *arguments, **options)

        return call

    with ExitStack() as stack:
        for name, operation in OPERATIONS.items():
            method = getattr(ProcessGroup, name, None)
            if method is not None:
                stack.enter_context(patch.object(ProcessGroup, name, counting(method, operation)))
        yield traffic
    traffic |= {key: (calls[key], elements[key]) for key in calls}


def tensor_elements(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel()
    return sum(map(tensor_elements, argument)) if isinstance(argument, list | tuple) else 0
