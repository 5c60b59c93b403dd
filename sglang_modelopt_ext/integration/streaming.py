"""Weights of a streaming loader (``--load-format runai_streamer``), which reads into memory that it uses again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def in_memory_of_their_own(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, with copies of those that a loader reads into memory it uses again or frees behind a file.

    Classes that collect tensors before they load one, and fused layers whose shards come apart, keep them for longer than a step.
    ``runai_streamer`` marks its tensors; ``fastsafetensors`` alone yields some that lie on a GPU.
    """
    from sglang.srt.model_loader.weight_utils import RUNAI_STREAMER_TENSOR_ATTR

    for name, tensor in weights:
        is_borrowed = tensor.is_cuda or getattr(tensor, RUNAI_STREAMER_TENSOR_ATTR, False)
        yield name, tensor.clone() if is_borrowed else tensor
