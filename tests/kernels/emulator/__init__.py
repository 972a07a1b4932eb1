"""Tests of the emulator, and of compiled kernels that run on it."""
