"""The commands: each parses its options, calls megagpt and returns an exit code."""
