"""What a sweep came to: tables, figures, words, a page. No torch."""
