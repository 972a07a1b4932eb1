"""The fastest layouts of a model on given hosts: every mesh, ZeRO stage, offload and schedule.

`space.py` says what is searched, `best.py` how. No torch.
"""
