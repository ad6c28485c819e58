"""Loading a model from a name or a folder."""
