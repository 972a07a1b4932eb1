"""Token files of other trainers, read where they lie: nanoGPT, llm.c, Megatron-LM, gpt-neox.

Nothing is copied, and nothing is written beside them.
"""
