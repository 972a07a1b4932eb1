"""Measurements that the documentation quotes.

Each script prints its table and writes it to benchmarks/results/.
"""
