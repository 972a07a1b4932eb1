"""Formulas for memory, communication, FLOPs and time, and the devices' data sheets.

Tests compare each formula with what real ranks hold and send. No module here imports torch.
"""
