"""What was measured of a model, as one file: written, read, compared and put into sentences. No torch."""
