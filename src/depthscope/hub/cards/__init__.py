"""Model cards. This package does not import torch."""
