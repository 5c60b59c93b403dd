"""Quantized weights where a class of SGLang's builds PyTorch's own linear layer: a classifier's head, a vision tower."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import ReplicatedLinear


class PlainLinear(ReplicatedLinear):
    """A linear layer that every rank holds whole, called like :class:`torch.nn.Linear`.

    Args:
        layer: the layer in whose place it stands; its bias is kept if it has one, with its weight loader.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, params_dtype=layer.weight.dtype)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output ``[..., N]`` for ``x`` ``[..., K]``."""
        output: torch.Tensor = self.quant_method.apply(self, x, self.bias)
        return output
