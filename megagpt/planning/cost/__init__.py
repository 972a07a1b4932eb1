"""Formulas for memory, communication, FLOPs and time, and the devices' data sheets.

Tests compare each with what real ranks hold and send. No torch.
"""
