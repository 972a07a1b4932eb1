"""The proof of equality: train a few steps under many strategies and compare with one plain
process.

``launch/parity.py`` and the tests share it.
"""
