"""The operations as Triton kernels: one file for each operation, its launches beside its kernels.

``kernels.dispatch`` chooses among these and the plain twins in ``kernels.reference``.
"""
