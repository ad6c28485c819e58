"""The folder that a training leaves behind. No torch."""
