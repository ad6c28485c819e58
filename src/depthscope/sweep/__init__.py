"""Depth sweeps: a grid of models from one YAML file, trained with transformers' Trainer, measured and compared."""
