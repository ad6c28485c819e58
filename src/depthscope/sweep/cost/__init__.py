"""The cost of a sweep, estimated before anything is trained."""
