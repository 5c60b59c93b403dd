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
        name: the module's name in the checkpoint.
        scheme: its weight and activation formats.
        n, k: output and input features.
        stored: its tensors' headers, by the names of their specs (``weight``, ``weight_scale``, ...).
    """

    name: str
    scheme: LayerScheme
    n: int
    k: int
    stored: Mapping[str, StoredTensor]
