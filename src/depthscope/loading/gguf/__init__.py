"""GGUF files: read, and accounted for."""
