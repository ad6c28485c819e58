"""Model cards. No torch."""
