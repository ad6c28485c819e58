"""The folder of a training run. No torch."""
