"""The proof of equality: train a few steps under many strategies, compare with one process.

``launch/parity.py`` and the tests share it.
"""
