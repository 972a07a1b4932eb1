"""Attention for compute capability 9.0, written in Gluon."""
