"""Measure what Python costs for each fused operation: ours against a bare autograd.Function.

    python -m benchmarks.host_cost

Nothing of ours is launched, so only the host's time remains. The bare function takes, saves and
returns as many tensors of the same shapes and does nothing else. Ours is the public function, with
its checks, its choice of an implementation and the few operations of torch beside our kernels. The
third contender calls torch's custom operator each time, as torch.compile sees it. They take short
turns in one process. A figure is the processor time of the fastest turn, since other programs only
slow a turn. Without a GPU, Triton's interpreter is chosen, and not run either.
"""

import functools
import gc
import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser, whole_number

ALLOWED_US = {"forward": 20.0, "backward": 15.0}  # above the bare function
MODULES = (
    "kernels.fused.activations",
    "kernels.fused.attention",
    "kernels.fused.cross_entropy",
    "kernels.fused.dropout",
    "kernels.fused.norms",
    "kernels.fused.rotary",
)
Call = Callable[[], Any]


def operations(device: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]:
    """Return the public function, the tensors with gradients and the other arguments of each."""
    import torch

    import kernels

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    head = {name: random(2, 4, 16, 64) for name in "qkv"}
    rows = {"x": random(2, 16, 64), "weight": random(64)}
    angles = random(16, 32)
    seed = torch.tensor([1, 2], device=device)
    return {
        "attention": (kernels.attention, head, {"scale": 0.125}),
        "layer_norm": (kernels.layer_norm, rows | {"bias": random(64)}, {}),
        "layer_norm, residual": (
            kernels.layer_norm,
            rows | {"bias": random(64), "residual": random(2, 16, 64)},
            {},
        ),
        "rms_norm": (kernels.rms_norm, rows, {"eps": 1e-6}),
        "swiglu": (kernels.swiglu, {"x": random(2, 16, 128)}, {}),
        "rotary": (kernels.rotary, {"x": random(2, 4, 16, 64)}, {"cosine": angles, "sine": angles}),
        "dropout": (kernels.dropout, {"x": random(2, 16, 64)}, {"probability": 0.1, "seed": seed}),
    }


def bare(function: Callable[..., Any], leaves: list[Any]) -> Callable[..., Any]:
    """Return a function of as many tensors as ``function`` takes, keeps and returns."""
    import torch

    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    results = result if isinstance(result, tuple) else (result,)
    shapes = [(x.shape, x.dtype) for x in results]
    inputs = {id(leaf): leaf for leaf in leaves}
    others = [torch.empty_like(x) for x in kept if id(x) not in inputs]

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> Any:
            ctx.save_for_backward(*tensors[: len(kept) - len(others)], *others)
            made = tuple(tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in shapes)
            return made if len(made) > 1 else made[0]

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            ctx.saved_tensors  # noqa: B018  # unpacks them
            made = tuple(torch.empty_like(leaf) for leaf in leaves)
            return made if len(made) > 1 else made[0]

    return lambda: Bare.apply(*leaves)


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Let every operation end where it would launch a kernel."""

    def launch(*arguments: Any, **options: Any) -> None:
        pass

    with ExitStack() as stack:
        for name in MODULES:
            stack.enter_context(patch.object(importlib.import_module(name), "launch", launch))
        yield


@contextmanager
def custom_operators() -> Iterator[None]:
    """Call torch's custom operators also where nothing watches."""
    from kernels import operators

    with patch.object(operators, "ordinary", lambda values: False):
        yield


def microseconds(phase: str, call: Call, leaves: list[Any], repeats: int) -> float:
    """Return the time of one forward, or of one backward of graphs made before."""
    import torch

    if phase == "forward":
        began = time.process_time()
        for _ in range(repeats):
            call()
        return 1e6 * (time.process_time() - began) / repeats
    made = [call() for _ in range(repeats)]
    results = [x if isinstance(x, tuple) else (x,) for x in made]
    gradients = [torch.ones_like(x) for x in results[0]]
    began = time.process_time()
    for outputs in results:
        torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    return 1e6 * (time.process_time() - began) / repeats


def measure(rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Return the table's rows: each operation, forward and backward."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with nothing_launched():
        for name, (function, tensors, options) in operations(device).items():
            leaves = [x.requires_grad_() for x in tensors.values()]

            ours = functools.partial(function, **tensors, **options)
            contenders: dict[str, Call] = {"bare": bare(ours, leaves), "ours": ours}
            contenders["custom_operator"] = ours
            for phase, allowed_us in ALLOWED_US.items():
                fastest = turns(phase, contenders, leaves, rounds, repeats)
                rows.append(
                    {
                        "operation": name,
                        "pass": phase,
                        **{f"{who}_us": f"{time_us:.1f}" for who, time_us in fastest.items()},
                        "above_bare_us": f"{fastest['ours'] - fastest['bare']:.1f}",
                        "allowed_us": f"{allowed_us:.0f}",
                    }
                )
    return rows


def turns(
    phase: str, contenders: dict[str, Call], leaves: list[Any], rounds: int, repeats: int
) -> dict[str, float]:
    """Return the microseconds of each contender's fastest turn."""
    fastest = dict.fromkeys(contenders, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for who, call in contenders.items():
                with ExitStack() as stack:
                    if who == "custom_operator":  # and so are its gradients
                        stack.enter_context(custom_operators())
                    spent = microseconds(phase, call, leaves, repeats)
                fastest[who] = min(fastest[who], spent)
    finally:
        gc.enable()
    return fastest


def main() -> None:
    parser = command_parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole_number(1), default=40)
    parser.add_argument("--repeats", type=whole_number(1), default=50, help="calls of one turn")
    arguments = parser.parse_args()
    # Before anything imports triton. Where there is no GPU, only this chooses our kernels.
    import torch

    if not torch.cuda.is_available():
        os.environ["MEGAGPT_KERNELS"] = "interpret"
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    write_table("host_cost", "benchmarks.host_cost", measure(arguments.rounds, arguments.repeats))


if __name__ == "__main__":
    main()
