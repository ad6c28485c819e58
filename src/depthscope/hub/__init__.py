"""Publishing on the Hugging Face Hub: model cards, their figures, and the files of a model's repository.

This package imports nothing: import each part from its own module, so that it loads only what it needs.
"""
