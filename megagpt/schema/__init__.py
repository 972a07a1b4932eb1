"""The sections of the JSON file: fields, defaults, checks, messages.

`megagpt.config` reads a file with them. No module here imports torch.
"""
