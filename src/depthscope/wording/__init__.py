"""Text for people: numbers, names and other programs' messages."""
