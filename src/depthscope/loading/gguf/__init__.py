"""Reading GGUF files, and checking that the loaded model matches them."""
