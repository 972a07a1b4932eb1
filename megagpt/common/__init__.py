"""Helpers that know nothing of training: options of commands, text, background work.

Standard library only. Every module may import them.
"""
