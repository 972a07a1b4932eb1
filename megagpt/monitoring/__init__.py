"""What a run shows: metrics, the live table, samples, trackers, logs, the HTML report.

A fault in here never ends a run.
"""
