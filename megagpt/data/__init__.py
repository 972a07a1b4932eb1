"""From text to samples: corpora, tokenizers, shards on disk, the order in which they are read.

``megagpt.download_data`` writes a dataset, ``megagpt.dataset`` reads one. No torch.
"""
