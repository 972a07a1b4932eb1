"""Export a run to Hugging Face's format and import a published model.

``architectures`` is the one table of names and layouts.
"""
