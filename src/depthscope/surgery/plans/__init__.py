"""Which layers to cut, and what that costs: the order of removal, losses measured, gaps repaired."""
