"""The results of a sweep: tables, figures, sentences, a page. No torch."""
