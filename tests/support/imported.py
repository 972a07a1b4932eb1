"""Import what every rank of a pool needs (3 s of CPU), once for all of them.

The server that forks the ranks imports this module first; it starts no thread.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it as it is imported

import megagpt.parallel.engine
import megagpt.parallel.pipeline
import megagpt.train  # noqa: F401
