"""Showing a report or a run in a terminal, on a page, in figures. No torch."""
