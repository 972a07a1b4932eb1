"""The parts of ``python -m kernels.benchmark``: cases, providers, timing, report."""
