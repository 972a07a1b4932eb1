"""Answers before a run starts: is a configuration legal, does it fit, how fast is it.

``cost`` has the formulas. No module here imports torch.
"""
