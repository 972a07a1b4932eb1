"""Is a configuration legal, does it fit, how fast would it be: answered before anything starts.

``cost`` has the formulas. No torch.
"""
