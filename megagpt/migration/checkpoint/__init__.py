"""Weights of DeepSpeed, Megatron-DeepSpeed and gpt-neox become the start of a run.

Their files are pickles. They are read by `torch.load(weights_only=True)`, which makes tensors and
plain values and nothing else.
"""
