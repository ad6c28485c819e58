"""Analyses: what one is, how long it takes, whose turn it is, and the process that does it."""
