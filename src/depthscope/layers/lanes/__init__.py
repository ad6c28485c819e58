"""Many experiments in one pass over the layers."""
