"""What a terminal shows during the work."""
