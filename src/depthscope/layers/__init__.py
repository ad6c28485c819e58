"""The layers of any language model: found, watched, and stood in for."""
