"""One optimizer step on a mesh: tensor and pipeline parallelism around a DeepSpeed engine.

``compat`` is the only file that touches the internals of DeepSpeed and torch.
"""
