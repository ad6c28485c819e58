"""Publishing on the Hugging Face Hub: model cards, their figures, and what a repository of a checkpoint holds.

Nothing is imported here: each part is imported from its own module, so that one does not load what another needs.
"""
