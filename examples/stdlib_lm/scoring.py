"""Tokenization of documents and a model's loss on them, shared by training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from corpus import Document
from tokenizers import Tokenizer
from transformers import PreTrainedModel

BOS = "<|bos|>"
EOS = "<|eos|>"
IGNORED = -100


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[list[int]]:
    """Return each document's tokens with an end token behind them, and no begin token in front."""
    eos = tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    return [[*e.ids, eos] for e in encodings]


def heldout_windows(documents: list[list[int]], context: int) -> list[list[int]]:
    """Cut every document into consecutive windows of `context` targets; the last one may be shorter.

    No window spans two documents and no target is in two windows.
    """
    return [doc[i : i + context] for doc in documents for i in range(0, len(doc), context)]


def _batches(
    windows: list[list[int]], bos: int, context: int, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs (the begin token, then all targets but the last) and targets, padded on the right.

    Attention is causal, so padding on the right cannot influence a real position.
    """
    for start in range(0, len(windows), size):
        rows = windows[start : start + size]
        inputs = torch.full((len(rows), context), bos)
        targets = torch.full((len(rows), context), IGNORED)
        for row, window in enumerate(rows):
            inputs[row, 1 : len(window)] = torch.tensor(window[:-1], dtype=torch.long)
            targets[row, : len(window)] = torch.tensor(window, dtype=torch.long)
        yield inputs, targets


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, windows: list[list[int]], bos: int, context: int) -> float:
    """Return the mean negative log-likelihood in nats over every target of every window."""
    total = 0.0
    for inputs, targets in _batches(windows, bos, context, size=8):
        logits = model(input_ids=inputs.to(model.device), use_cache=False).logits.float().cpu()
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
    return total / sum(len(window) for window in windows)
