"""The fence between copies and products that triton 3.6 leaves out: found, inserted, and keyed
in triton's cache.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.verification import proxy_fence
from kernels.verification.proxy_fence import missing_fences, with_fences

triton = pytest.importorskip("triton")
LOOP = """\
$L__BB0_2:
\tcp.async.wait_group \t2;
\tbar.sync \t0;
{fence}\twgmma.fence.sync.aligned;
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%r1}}, %rd1, %rd2, 0, 1, 1, 0, 0;
\twgmma.wait_group.sync.aligned \t0;
\twgmma.fence.sync.aligned;
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%r2}}, %rd1, %rd2, 0, 1, 1, 0, 0;
\tbar.sync \t0;
\tcp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10;
\t@%p1 bra \t$L__BB0_2;
\tcp.async.wait_group \t0;
\tbar.sync \t0;
"""
FENCE = "\tfence.proxy.async.shared::cta;\n"


def test_one_for_each_wait_that_a_product_follows() -> None:
    """Behind the barrier, where triton 3.7 has it; and none twice."""
    assert missing_fences(LOOP.format(fence="")) == [2]
    assert with_fences(LOOP.format(fence="")) == LOOP.format(fence=FENCE)
    assert missing_fences(LOOP.format(fence=FENCE)) == []
    assert with_fences(LOOP.format(fence=FENCE)) == LOOP.format(fence=FENCE)


def test_products_of_blackwell_too() -> None:
    text = (
        "\tcp.async.wait_group 0;\n\tbar.sync 0;\n\t@%p17 tcgen05.mma.cta_group::1.kind::f16 [ "
        "%r1 + 0 ], %rd1;\n"
    )
    assert missing_fences(text) == [1]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

before = CUDABackend(GPUTarget("cuda", 90, 32)).hash()
from kernels.ahead import compiler as compile_ahead
from kernels.verification import proxy_fence

wanted = ("attention_forward_64_bf16", 90)
entry = next(e for e in compile_ahead.shipped() if (e.name, e.capability) == wanted)
after = CUDABackend(GPUTarget("cuda", 90, 32)).hash()
print(before != after, compile_ahead.compile_for(entry).missing_fences)
proxy_fence.with_fences = lambda ptx: ptx
print(compile_ahead.compile_for(entry).missing_fences)
"""


def test_triton_compiles_attention_with_it_and_another_cache_key(tmp_path: Path) -> None:
    """Under 3.6 by the insertion alone; 3.7 has it by itself."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    left_out = proxy_fence.needed()
    assert left_out == triton.__version__.startswith("3.6")
    assert done.stdout.split() == [str(left_out), "0", "2" if left_out else "0"], done.stderr
