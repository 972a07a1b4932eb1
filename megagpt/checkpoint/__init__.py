"""Save, commit, check and load a run, on any mesh.

docs/checkpoints.md describes the files.
"""
