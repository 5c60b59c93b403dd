"""The products of a model's layers by their times in a tuning file, unquantized ones included."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.base import LinearRequest
from sglang_modelopt_ext.backends.experts.base import ExpertRequest
from sglang_modelopt_ext.backends.select import served_scheme
from sglang_modelopt_ext.backends.timings import UNQUANTIZED, LayerKey, TuningFile, key_of, score
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import math_of


@dataclass(frozen=True)
class Product:
    """A product whose time is wanted: a (fused) linear layer, or one of the two products of a layer's experts.

    Attributes:
        name: the name of the layer.
        scheme: how it is quantized; None for an unquantized one.
        n, k: output and input features, of one expert where it is of experts.
        shards: the stored layers that it is made of.
        experts, top_k: the experts of the layer and of a token; 0 for a linear layer.
    """

    name: str
    scheme: LayerScheme | None
    n: int
    k: int
    shards: int = 1
    experts: int = 0
    top_k: int = 0

    def key(self, device: Device, dtype: torch.dtype) -> LayerKey:
        """Return the key of its times on ``device`` in a model of ``dtype``."""
        if self.scheme is None:
            name = str(dtype).removeprefix("torch.")
            return LayerKey(UNQUANTIZED, None, False, 0, "", name, self.n, self.k, self.experts, self.top_k)
        request = (served_scheme(self.scheme, device), device, self.n, self.k, math_of(self.scheme), dtype)
        if self.experts:
            return key_of(ExpertRequest(*request, experts=self.experts, top_k=self.top_k))
        return key_of(LinearRequest(*request))


class Times:
    """The times of a tuning file for one number of tokens.

    Args:
        content: the file.
        tokens: one of its numbers of tokens.
    """

    def __init__(self, content: TuningFile, tokens: int) -> None:
        at = content.tokens.index(tokens)
        self._us = {
            result.layer: min((score(times), times[at]) for times in result.us.values())[1]
            for result in content.results
            if result.us
        }

    def of(self, key: LayerKey) -> float | None:
        """Return the microseconds of a layer by the kernel that a server with this file chooses; None without one."""
        return self._us.get(key)
