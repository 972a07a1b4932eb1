"""Run compiled kernels on a CPU: the PTX that Triton emits for sm_80 to sm_90, thread by thread.

Triton's interpreter shows that a kernel's source is right. This package shows what the compiler
made of it: it executes the PTX, with warps interleaved at random and with asynchronous work done as
early and as late as the manual allows. It finds races, missing fences, accesses out of bounds and
deadlocks.

    python -m kernels.emulator FILE.ptx
    python -m pytest -p kernels.emulator.plugin tests/kernels/test_norms.py

Section titles in this package are those of NVIDIA's manual "PTX ISA".
"""
