"""The operations as Triton kernels: one file for each operation, with its launches.

``kernels.dispatch`` chooses between these and the plain twins in ``kernels.reference``.
"""
