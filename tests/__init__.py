"""The tests, in the folders of what they test; what they share is in ``support``."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
