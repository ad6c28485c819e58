"""Text to measure on: where it comes from, and how it is cut into blocks of tokens."""
