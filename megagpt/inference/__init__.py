"""Use a trained model: load it without an engine, generate text, evaluate.

Nothing in here needs DeepSpeed.
"""
