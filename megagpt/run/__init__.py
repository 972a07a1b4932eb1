"""The wiring of a training process: start-up, assembly, endings, restarts.

Nothing in ``megagpt`` imports it.
"""
