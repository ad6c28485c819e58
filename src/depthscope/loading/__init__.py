"""From a name or a folder to the model that is in it."""
