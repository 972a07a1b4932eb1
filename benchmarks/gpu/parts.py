"""The cases of each part, the most informative first. Times and memory are estimates for one H200.

No torch.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.gpu import assembler
from benchmarks.gpu.case import TRITON_LEAST, Case

MODULE = "benchmarks.gpu"
# The files with tests for a GPU, below tests/: collecting all of tests/ would need every package
# that training needs.
KERNEL_TESTS = (
    "kernels/test_hopper_attention", "kernels/test_attention", "kernels/test_norms",
    "kernels/test_cross_entropy", "kernels/test_activations", "kernels/test_rotary",
    "kernels/test_dropout", "kernels/test_self_check", "kernels/test_benchmark",
)  # fmt: skip
MODEL_TESTS = (
    "model/test_fused_model", "planning/test_working_memory", "parallel/test_offload_devices",
    "health/test_flight_recorder", "health/test_watch", "health/test_guard",
    "planning/test_page_locking",
)  # fmt: skip
LARGE_TESTS = "kernels/test_large_tensors"  # 60 GB: alone, and last
OPS = (
    "attention", "layer_norm", "linear_cross_entropy", "rms_norm", "swiglu", "rotary", "dropout",
)  # fmt: skip
RIVALS = ("megagpt", "torch", "sdpa cudnn", "sdpa flash", "flex_attention", "flash-attn")
FUSED: dict[str, Any] = {"capability": TRITON_LEAST}
TRAINING: dict[str, Any] = FUSED | {"packages": ("triton", "deepspeed", "pydantic")}
MODELS = (  # name, model, micro-batch, learning rate, device memory in GiB
    ("124M", {"preset": "gpt2-124m"}, 16, 6e-4, 12.0),
    ("1.5B", {"preset": "gpt2-1.5b"}, 8, 2e-4, 60.0),
)
STEPS = 20


# dtype, head dimension, variant of attention: each compiles about five kernels of a second or two
# (estimate).
CHECKS = (
    *(
        ["bf16", 64, "causal"],
        ["bf16", 128, "causal"],
        ["fp16", 64, "causal"],
        ["fp16", 128, "causal"],
    ),
    *(
        ["bf16", head_dim, variant]
        for variant in ("documents", "window", "softcap", "dropout", "grouped")
        for head_dim in (64, 128)
    ),
)


def first_light(cores: int) -> list[Case]:
    """Return the first part: environment, self-checks, operations, ceilings, one training step.

    It takes under four minutes. There is a self-check for each ptxas.
    """

    def case(name: str, function: str, **rest: Any) -> Case:
        return Case("first-light", name, f"{MODULE}.{function}", **rest)

    checks = self_checks()
    return [
        case("environment", "first_light:environment", compiles=False, expected_s=10),
        *checks[:1],
        case(
            "operations",
            "first_light:operations",
            arguments={"dtypes": ["bf16", "fp16"]},
            expected_s=30,
            **FUSED,
        ),
        case("ceilings", "first_light:ceilings", compiles=False, expected_s=10, device_gib=4),
        case(
            "one training step",
            "training:measure",
            arguments={
                "model": {"vocab_size": 1024, "num_layers": 2, "hidden_size": 256, "num_heads": 4},
                "stage": 1,
                "micro_batch": 4,
                "steps": 6,
            },
            **TRAINING,
        ),
        *checks[1:],
    ]


def self_checks() -> list[Case]:
    """Return one self-check for each ptxas, each with a cache of its own.

    A compiled kernel in a cache does not say which ptxas assembled it.
    """
    return [
        Case(
            "first-light",
            f"self-check, {one.label}",
            f"{MODULE}.first_light:self_check",
            {"checks": [*CHECKS]},
            environment={assembler.VARIABLE: one.path},
            cache=one.label,
            refusal=one.problem and f"unknown ptxas: {one.problem}",
            expected_s=60,
            limit_s=240,
            **FUSED,
        )
        for one in assembler.available()
    ]


def tests(cores: int) -> list[Case]:
    """Return the kernels' tests by file, compute-sanitizer on a small case of each operation.

    The large tensors come last.
    """

    def file(name: str, workers: int = max(1, cores - 4), **rest: Any) -> Case:
        needs: dict[str, Any] = FUSED | {"packages": ("triton", "pytest", "hypothesis")} | rest
        arguments = {"file": f"tests/{name}.py", "workers": workers}
        return Case(
            "tests",
            name,
            f"{MODULE}.suite:run_tests",
            arguments,
            **{"expected_s": 60, "limit_s": 540} | needs,
        )

    training: dict[str, Any] = {
        "packages": ("triton", "pytest", "hypothesis", "deepspeed", "pydantic")
    }
    sanitized = [
        Case(
            "tests",
            f"{tool}, {op}",
            f"{MODULE}.suite:sanitize",
            {"op": op, "tool": tool},
            limit_s=300,
            **FUSED,
        )
        for tool in ("memcheck", "racecheck")
        for op in OPS
    ]
    return [
        *(file(name) for name in KERNEL_TESTS),
        *(file(name, **training) for name in MODEL_TESTS),
        *sanitized,
        file(LARGE_TESTS, workers=1, device_gib=60),
    ]


def targets(cores: int) -> list[Case]:
    """Return the measurements that the targets compare, at sizes where they can be reached."""
    attention = [
        timed(
            "targets",
            "attention",
            ["fwd", "bwd", "both"],
            RIVALS,
            lengths=[length],
            head_dims=[dim],
            expected_s=60,
        )
        for dim in (64, 128)
        for length in (4096, 16384)
    ]
    everyone = ("megagpt", "torch", "liger")
    norms = [
        timed("targets", "layer_norm", ["fwd", "bwd"], everyone, widths=[width], tokens=65536)
        for width in (4096, 768)
    ]
    losses = [
        timed("targets", "linear_cross_entropy", ["both"], everyone, widths=[width])
        for width in (768, 4096)
    ]
    return [*norms, *losses, *attention]


def attention(cores: int) -> list[Case]:
    """Return attention beside cuDNN, flash and FlexAttention: causal, then the other variants."""
    modes = ["fwd", "bwd", "both"]
    expected = 75
    causal = [
        timed(
            "attention",
            "attention",
            modes,
            RIVALS,
            lengths=[length],
            head_dims=[dim],
            expected_s=expected,
        )
        for length in (2048, 8192)
        for dim in (64, 128)
    ]
    # The reference's masks take 8 bytes for each score: a smaller batch.
    sizes: dict[str, Any] = {"lengths": [4096]}
    smaller: dict[str, Any] = {"lengths": [2048], "tokens": 4096}
    variants = [
        timed(
            "attention",
            "attention",
            ["fwd"] if variant == "decode" else modes,
            RIVALS,
            head_dims=[dim],
            variant=variant,
            expected_s=expected,
            **(smaller if variant == "dropout" else sizes),
        )
        for variant in ("documents", "window", "softcap", "dropout", "grouped", "decode", "full")
        for dim in (64, 128)
    ]
    others = [
        timed(
            "attention",
            "attention",
            modes,
            RIVALS,
            lengths=[4096],
            head_dims=[dim],
            expected_s=expected,
        )
        for dim in (80, 96, 256)
    ]
    return [*causal, *variants, *others]


def timed(
    part: str,
    op: str,
    modes: list[str],
    providers: tuple[str, ...],
    expected_s: float = 30,
    **arguments: Any,
) -> Case:
    """Return a case that times one operation at the given sizes."""
    told = [
        f"{name} {', '.join(map(str, x)) if isinstance(x, list) else x}"
        for name, x in arguments.items()
    ]
    given = {"op": op, "modes": modes, "providers": list(providers), **arguments}
    needs: dict[str, Any] = {"expected_s": expected_s, "limit_s": 300, "device_gib": 8, **FUSED}
    return Case(part, f"{op}, {', '.join(told)}", f"{MODULE}.speed:measure", given, **needs)


def training(cores: int) -> list[Case]:
    """Return the host's time first, then training of both models.

    ZeRO 1, 3 and 0 with our kernels and torch's, a plain loop, a trace.
    """
    host = Case(
        *("training", "microseconds of the host", f"{MODULE}.host_time:measure", {"repeats": 200}),
        expected_s=40,
        **FUSED,
    )
    cases = [host]
    for name, model, micro_batch, rate, gib in MODELS:
        shared = {"model": model, "micro_batch": micro_batch, "steps": STEPS, "learning_rate": rate}
        cases += [
            _trained(f"{name}, ZeRO {stage}, {who}", "measure", shared | {"stage": stage}, who, gib)
            for stage in (1, 3, 0)
            for who in ("ours", "torch")
        ]
        cases += [
            _trained(
                f"{name}, plain compiled loop, {who}", "plain", shared | {"stage": 1}, who, gib
            )
            for who in ("ours", "torch")
        ]
        cases += [
            _trained(
                f"{name}, trace, ZeRO 1, {who}",
                "trace",
                shared | {"stage": 1, "steps": 5},
                who,
                gib,
            )
            for who in ("ours", "torch")
        ]
    return cases


def _trained(name: str, function: str, arguments: dict[str, Any], who: str, gib: float) -> Case:
    environment = {"MEGAGPT_KERNELS": "torch"} if who == "torch" else {}
    needs: dict[str, Any] = {
        "expected_s": 45 if gib < 20 else 80,
        "limit_s": 300,
        "device_gib": gib,
    }
    call = f"{MODULE}.training:{function}"
    return Case("training", name, call, arguments, environment=environment, **needs, **TRAINING)


def offload(cores: int) -> list[Case]:
    """Return 6.7B with Adam in host memory, cut to the layers that fit."""
    shared: dict[str, Any] = {
        "model": {"preset": "gpt3-6.7b"},
        "micro_batch": 4,
        "steps": 3,
        "recompute": "full",
    }
    shared |= {"learning_rate": 1.2e-4}
    shared |= {"reduce_bucket_size": 200_000_000, "sub_group_size": 200_000_000}
    return [
        Case(
            "offload",
            f"6.7B or what fits, {'pinned' if pinned else 'not pinned'}",
            f"{MODULE}.offload:measure",
            shared | {"pin_memory": pinned},
            expected_s=200,
            limit_s=570,
            device_gib=20,
            host_gib=20,
            **TRAINING,
        )
        for pinned in (False, True)
    ]


def long(cores: int) -> list[Case]:
    """Return long sequences, also in training, then every other operation at every width."""
    providers = ("megagpt", "sdpa cudnn", "sdpa flash")
    sequences = [
        timed(
            "long",
            "attention",
            ["fwd", "both"],
            providers,
            lengths=[length],
            head_dims=[128],
            tokens=length,
            expected_s=60,
        )
        for length in (32768, 65536, 131072)
    ]
    model = {"preset": "gpt2-124m", "sequence_length": 32768, "position": "rotary"}
    trained = Case(
        "long",
        "124M at 32,768 tokens, ZeRO 1",
        f"{MODULE}.training:measure",
        {"model": model, "micro_batch": 1, "steps": 8, "stage": 1},
        expected_s=60,
        limit_s=300,
        device_gib=40,
        **TRAINING,
    )
    widths = (768, 1600, 4096, 8192, 12288)
    everyone = ("megagpt", "torch", "torch.compile", "liger")
    rows = [
        timed("long", op, ["fwd", "both"], everyone, widths=[width])
        for op in OPS
        if op not in ("attention", "rotary")
        for width in widths
    ]
    rotary = timed(
        "long",
        "rotary",
        ["fwd", "both"],
        ("megagpt", "torch", "torch.compile"),
        lengths=[2048, 16384],
    )
    return [*sequences, trained, *rows, rotary]


PARTS: dict[str, Callable[[int], list[Case]]] = {
    "first-light": first_light,
    "tests": tests,
    "targets": targets,
    "attention": attention,
    "training": training,
    "offload": offload,
    "long": long,
}
