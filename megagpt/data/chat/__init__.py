"""Conversations as training data: records, chat templates, which tokens are targets, packing.

`records.py` reads a row, `template.py` writes a conversation as one text, `answers.py` says which
characters of it are the assistant's, `targets.py` which tokens, `packing.py` which conversations
share a sample.
"""
