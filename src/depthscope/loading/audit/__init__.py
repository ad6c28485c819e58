"""Whether a loaded model is all that its file says."""
