"""What a sweep will take, before anything is trained."""
