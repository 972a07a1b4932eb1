"""What tests share: real ranks, configurations, the equality matrix, commands in processes."""
