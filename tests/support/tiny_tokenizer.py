"""A byte-level BPE tokenizer small enough to train in a test."""

from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

SENTENCES = ["The layers of a model pass on a stream.", "Each adds a little to it, and some add nothing at all."]


def save_tokenizer(folder: Path) -> None:
    """Train on two sentences (300 tokens at most) and save as transformers does."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=300, special_tokens=["<s>", "</s>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
