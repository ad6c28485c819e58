"""The page for visitors, the endpoints for programs, and the server of both."""
