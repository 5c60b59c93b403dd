"""A quantized linear layer as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.schemes.base import LayerScheme


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized linear layer of a checkpoint.

    Attributes:
        name: its module name in the checkpoint.
        scheme: how it is quantized.
        n, k: output and input features.
        stored: the tensors found for it, by spec name.
    """

    name: str
    scheme: LayerScheme
    n: int
    k: int
    stored: Mapping[str, StoredTensor]
