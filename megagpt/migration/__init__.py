"""The way over from other trainers: their configurations and their checkpoints become ours."""
