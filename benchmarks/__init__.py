"""Measurements that the documentation quotes: each script prints its table and writes it to
benchmarks/results/.
"""
