"""Safety: the limits, the problems, and the checks of untrusted files before they are loaded."""
