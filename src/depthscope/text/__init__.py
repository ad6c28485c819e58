"""The text for measurements: its sources, and how it is cut into blocks of tokens."""
