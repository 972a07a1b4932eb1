"""megagpt: a pipeline- and tensor-parallel GPT trainer on DeepSpeed."""

__version__ = "0.1.0"
