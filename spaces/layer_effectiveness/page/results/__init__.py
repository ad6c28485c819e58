"""From reports to what the page shows of them."""
