"""Whole files and folders, read within bounds and written complete or not at all."""
