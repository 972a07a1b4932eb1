"""A configuration of DeepSpeed, gpt-neox, nanoGPT or Megatron-DeepSpeed becomes ours. No torch."""
