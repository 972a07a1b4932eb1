"""What watches over a run: guards, drifting replicas, stragglers, hangs, crash pages.

docs/reliability.md lists the faults that are found.
"""
