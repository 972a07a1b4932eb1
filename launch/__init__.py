"""The commands: parse the options, call, return an exit code."""
