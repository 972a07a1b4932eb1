"""The definition of done: every strategy trains as one plain PyTorch process does."""
