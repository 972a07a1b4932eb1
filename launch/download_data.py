#!/usr/bin/env python3
"""Prepare a dataset (docs/data.md).

python launch/download_data.py --dataset stdlib --output data/stdlib
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.download_data import main
from megagpt.utils import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
