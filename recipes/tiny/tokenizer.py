"""Train the tiny backbone's tokenizer: a byte-level BPE of 4,096 tokens, digits one by one.

python -m recipes.tiny.tokenizer .cache/tiny/tokenizer
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elasticore.eval.corpus import documents
from elasticore.eval.facts import ADJECTIVES, NOUNS, needles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
EOS, PAD = "<|endoftext|>", "<|pad|>"


def texts() -> Iterator[str]:
    """The training documents, then enough needles that each of their words becomes one token."""
    for kind in ("code", "prose"):
        for document in documents("train", kind):
            yield document.text
    rng = np.random.default_rng(0)
    for _ in range(600 * max(len(ADJECTIVES), len(NOUNS)) // 50):
        yield "".join("".join(fact.question) for fact in needles(rng, "train", 50))


def train(folder: Path) -> PreTrainedTokenizerFast:
    """Train on the corpus and save to `folder` as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    train(Path(sys.argv[1]))
