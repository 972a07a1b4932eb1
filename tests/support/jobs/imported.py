"""Import what every rank of a pool needs (3 s of CPU), once for all of them.

The server that forks the ranks imports this module first; it starts no thread. What is imported is
frozen: every engine is collected with ``gc.collect``, twice, which takes 0.35 s over a million
objects that nobody will ever release.
"""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it as it is imported

import megagpt.parallel.engine
import megagpt.parallel.pipeline
import megagpt.train  # noqa: F401
from megagpt.parallel import compat

compat.suppress_compilation_of_muon()
gc.freeze()
