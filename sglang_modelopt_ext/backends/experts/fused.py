"""Ways to keep the weights of a layer's experts for a kernel that computes the whole layer: both products, what lies between them,
and the weighted sum. Kernels of other packages are made so; this package's own multiply once (``moe.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from sglang_modelopt_ext.backends.base import PreparedT, ShardWeight
from sglang_modelopt_ext.backends.experts.base import ExpertRequest


@dataclass(frozen=True)
class FusedRequest:
    """What such a backend may base its answer on.

    Attributes:
        gate_up, down: the two products.
        weights_input: whether the router's weights are multiplied to what an expert reads.
    """

    gate_up: ExpertRequest
    down: ExpertRequest
    weights_input: bool = False


@dataclass(frozen=True)
class StoredExperts:
    """What is stored for one product of all experts of this rank.

    Attributes:
        weights: for each expert its shards (gate and up, or down).
        input_scale: float32 ``[E, shards]``: how the shards round their input; None where no scale is stored.
    """

    weights: Sequence[Sequence[ShardWeight]]
    input_scale: torch.Tensor | None

    def one_input_scale(self) -> torch.Tensor:
        """Float32 ``[E]``. Raises ValueError when none is stored, or where the shards of an expert have several."""
        if self.input_scale is None:
            raise ValueError("needs an input_scale")
        if not bool((self.input_scale == self.input_scale[:, :1]).all()):
            raise ValueError("rounds the input of gate and up once, and they have an input_scale each")
        return self.input_scale[:, 0].contiguous()


class FusedExperts(ABC, Generic[PreparedT]):
    """A way to keep the weights of both products of all experts of this rank, and the kernel that reads them."""

    name: str

    @abstractmethod
    def supports(self, request: FusedRequest) -> str | None:
        """None, or the reason why not."""

    @abstractmethod
    def prepare(self, gate_up: StoredExperts, down: StoredExperts) -> PreparedT:
        """Return what is kept. Raises ValueError when the backend cannot hold the weights or their scales."""

    @abstractmethod
    def run(self, prepared: PreparedT, x: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``sum_j weights[t, j] * down(silu(gate(x[t])) * up(x[t]))`` over the experts ``numbers[t, j]``.

        Must not copy to the host or allocate by what ``numbers`` says.

        Args:
            prepared: see :meth:`prepare`.
            x: float16 or bf16 ``[T, K]``, not rounded yet.
            numbers: int32 ``[T, top_k]``; nothing is added for :data:`NO_EXPERT`.
            weights: float32 ``[T, top_k]``.

        Returns:
            ``[T, K]`` in the type of ``x``, rounded to it after gate and up, after their product, after each expert and at the end.
        """
