"""What people read: numbers, names and other programs' messages in words."""
