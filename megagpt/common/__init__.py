"""Helpers that know nothing of training: options of commands, text, background work.

Standard library only. Anything may import it.
"""
