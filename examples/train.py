"""Train a small DepthLM on Python's own source and log its layers: two lines more than a plain Trainer script.

python examples/train.py --out run && depthscope show run --html run.html
"""

import argparse

from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from depthscope import DepthLMConfig, DepthLMForCausalLM, load_blocks
from depthscope.callbacks import EffectivenessCallback, VarianceCallback


def train_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on this file."""
    trained = ByteLevelBPETokenizer()
    trained.train([__file__], vocab_size=size, special_tokens=["<|end|>"])
    end = "<|end|>"
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token=end, eos_token=end, pad_token=end)


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="run")
    parser.add_argument("--preset", default="dense-2m")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    tokenizer = train_tokenizer(2048)
    blocks = load_blocks(None, tokenizer, num_blocks=8 + 4 * options.steps, block_size=128).input_ids
    model = DepthLMForCausalLM(DepthLMConfig.from_preset(options.preset, vocab_size=2048))
    trainer = Trainer(
        model,
        TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            logging_steps=max(1, options.steps // 10),
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"input_ids": blocks[8:], "labels": blocks[8:]}).with_format("torch"),
        callbacks=[
            VarianceCallback(),
            EffectivenessCallback(blocks[:8], scores="skip,causal", every=max(1, options.steps // 2)),
        ],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
