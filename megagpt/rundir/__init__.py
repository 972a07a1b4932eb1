"""What lies in a run directory: its configuration, its data, requests to stop, how it ended.

No torch.
"""
