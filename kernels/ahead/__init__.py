"""Compile the shipped kernels for GPUs that are not here, and read the machine code.

``python -m kernels.ahead.compiler`` prints the table.
"""
