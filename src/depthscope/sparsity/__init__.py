"""The sparsity at work in a language model: small weights, unattended positions, experts at rest.

Plain functions over modules and tensors; `scores/sparsity.py` makes them scores of an analysis, and
`callbacks/sparsity.py` follows them through a training.
"""
