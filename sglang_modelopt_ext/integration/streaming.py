"""Weights of a streaming loader (``--load-format runai_streamer``), which reads into memory that it uses again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def in_memory_of_their_own(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, with copies of those that a streaming loader reads into memory it uses again.

    Classes that collect tensors before they load one, and fused layers whose shards come apart, keep them for longer than a step.
    """
    from sglang.srt.model_loader.weight_utils import RUNAI_STREAMER_TENSOR_ATTR

    for name, tensor in weights:
        yield name, tensor.clone() if getattr(tensor, RUNAI_STREAMER_TENSOR_ATTR, False) else tensor
