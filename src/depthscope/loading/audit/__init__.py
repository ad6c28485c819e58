"""Checks that a loaded model is the one in its files."""
