"""What a terminal shows while work is done."""
