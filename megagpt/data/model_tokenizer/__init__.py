"""The tokenizer of an open model: its own files, unchanged, and Hugging Face `tokenizers`."""
