"""What a stranger may ask and give: the limits, the problems, and the checks of files before anything loads them."""
