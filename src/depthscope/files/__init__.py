"""Reading files within bounds; writing files and folders completely or not at all."""
