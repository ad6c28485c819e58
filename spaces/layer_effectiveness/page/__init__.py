"""What a visitor sees and what a program calls, and the server that answers both."""
