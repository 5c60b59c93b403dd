"""A comparison of the small model with an interpolated bigram model on the held-out files.

Both score the same targets: every token of every held-out document and the end token behind it. The model
reads each document in non-overlapping windows of the training context (512 targets, the last one shorter);
every window's input begins with the begin token, so its first target is predicted with no context. The
bigram model always sees the true previous token (the begin token at the start of a document), also across
window borders, which favours it slightly.

    python examples/stdlib_lm/evaluate.py
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from corpus import collect, digest, read_heldout, split
from numpy.typing import NDArray
from scoring import BOS, encode, heldout_windows, mean_loss
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
TUNING_STRIDE = 20
EM_ROUNDS = 50


def pairs(documents: list[list[int]], bos: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return every (previous token, token) pair; the begin token comes before each document."""
    previous = [token for document in documents for token in (bos, *document[:-1])]
    return np.array(previous, dtype=np.int64), np.array(list(chain.from_iterable(documents)), dtype=np.int64)


class InterpolatedBigram:
    """Jelinek-Mercer mixture of a bigram, a unigram and a uniform distribution."""

    def __init__(self, documents: list[list[int]], bos: int, vocabulary: int) -> None:
        """Count all but every 20th training document and tune the mixture weights by EM on those."""
        self._bos = bos
        self._vocabulary = vocabulary
        counted = [d for i, d in enumerate(documents) if i % TUNING_STRIDE]
        previous, following = pairs(counted, bos)
        self._pair_counts = np.bincount(previous * vocabulary + following, minlength=vocabulary**2)
        self._context_counts = np.bincount(previous, minlength=vocabulary)
        self._unigram = np.bincount(following, minlength=vocabulary) / len(following)
        components = self._components(*pairs(documents[::TUNING_STRIDE], bos))
        self.weights: NDArray[np.float64] = np.full(3, 1 / 3)
        for _ in range(EM_ROUNDS):
            shares = components * self.weights
            self.weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)

    def _components(self, previous: NDArray[np.int64], following: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return each target's probability under the bigram, the unigram and the uniform distribution."""
        pair_counts = self._pair_counts[previous * self._vocabulary + following]
        bigram = pair_counts / np.maximum(1, self._context_counts[previous])
        uniform = np.full(len(following), 1 / self._vocabulary)
        return np.stack([bigram, self._unigram[following], uniform], axis=1)

    def mean_loss(self, documents: list[list[int]]) -> float:
        """Return the mean negative log-likelihood in nats over every token of the documents."""
        probabilities = self._components(*pairs(documents, self._bos)) @ self.weights
        return float(-np.log(probabilities).mean())


def parse_args() -> argparse.Namespace:
    """Parse the command line; the defaults score the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.txt")
    parser.add_argument("--log", type=Path, default=HERE / "training_log.json")
    parser.add_argument("--stdlib", type=Path, default=None, help="the training corpus (default: this interpreter's)")
    parser.add_argument("--skip-bigram", action="store_true", help="needs no training corpus")
    return parser.parse_args()


def main() -> None:
    """Print both models' held-out loss and perplexity, and their ratio."""
    args = parse_args()
    record = json.loads(args.log.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    bos = tokenizer.token_to_id(BOS)
    heldout = encode(tokenizer, read_heldout(args.heldout))
    print(f"held-out: {len(heldout)} documents, {sum(map(len, heldout))} tokens")

    # The file holds bf16 weights; loading them as fp32 changes no value and keeps the arithmetic exact.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    context = record["context"]
    loss = mean_loss(model, heldout_windows(heldout, context), bos, context)
    print(f"model:  mean loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    if args.skip_bigram:
        return

    train = split(collect(args.stdlib)).train
    if digest(train) != record["train_sha256"]:
        raise SystemExit(
            "This standard library is not the training corpus; the model card names the Python version it "
            "came from. Point --stdlib at that version's, or pass --skip-bigram."
        )
    bigram = InterpolatedBigram(encode(tokenizer, train), bos, tokenizer.get_vocab_size())
    bigram_loss = bigram.mean_loss(heldout)
    weights = ", ".join(f"{w:.4f}" for w in bigram.weights)
    print(f"bigram: mean loss {bigram_loss:.4f}, perplexity {math.exp(bigram_loss):.3f}")
    print(f"bigram weights (bigram, unigram, uniform): {weights}")
    print(f"perplexity ratio, model to bigram: {math.exp(loss - bigram_loss):.4f}")


if __name__ == "__main__":
    main()
