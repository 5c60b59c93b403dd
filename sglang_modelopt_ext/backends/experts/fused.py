"""Backends of a whole layer of experts: both products, the activation between them, and the weighted sum, in one call.

Such kernels are those of other packages. This package's own compute one product each (:mod:`.grouped`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from sglang_modelopt_ext.backends.base import PreparedT, ShardWeight
from sglang_modelopt_ext.backends.experts.base import ExpertRequest
from sglang_modelopt_kernels.moe.activation import SWIGLU, Activation


@dataclass(frozen=True)
class FusedRequest:
    """A whole layer of experts, as backends are asked whether they support it.

    Attributes:
        gate_up, down: the two products.
        weights_input: whether the input of an expert is multiplied by the router's weight, instead of its output.
        activation: the function between the products, and whether these add a bias.
    """

    gate_up: ExpertRequest
    down: ExpertRequest
    weights_input: bool = False
    activation: Activation = SWIGLU


@dataclass(frozen=True)
class StoredExperts:
    """The stored tensors of one product, for all experts of this rank.

    Attributes:
        weights: for each expert its shards (gate and up, or down).
        input_scale: the static scales of the input, float32 ``[E, shards]``; None where no scale is stored.
    """

    weights: Sequence[Sequence[ShardWeight]]
    input_scale: torch.Tensor | None

    def one_input_scale(self) -> torch.Tensor:
        """Return the input scale of each expert, float32 ``[E]``. Raises ValueError where none is stored or its shards' differ."""
        if self.input_scale is None:
            raise ValueError("needs an input_scale")
        if not bool((self.input_scale == self.input_scale[:, :1]).all()):
            raise ValueError("rounds the input of gate and up once, and they have an input_scale each")
        return self.input_scale[:, 0].contiguous()


class FusedExperts(ABC, Generic[PreparedT]):
    """A backend of a whole layer: it keeps the weights of both products of all experts of this rank, and computes the layer."""

    name: str
    activations: tuple[Activation, ...] = (SWIGLU,)
    """The activations that it computes; a request with another one is rejected."""

    def objection(self, request: FusedRequest) -> str | None:
        """Return why this backend cannot serve ``request``, or None."""
        if request.activation not in self.activations:
            return f"computes {' or '.join(map(str, self.activations))}, not {request.activation}"
        return self.supports(request)

    @abstractmethod
    def supports(self, request: FusedRequest) -> str | None:
        """Return why this backend cannot serve ``request``, whose activation it computes, or None."""

    @abstractmethod
    def prepare(self, gate_up: StoredExperts, down: StoredExperts) -> PreparedT:
        """Return what is kept. Raises ValueError where the backend cannot hold the weights or their scales."""

    @abstractmethod
    def run(self, prepared: PreparedT, x: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute ``sum_j weights[t, j] * down(activation(first(x[t])))`` over the experts ``numbers[t, j]``.

        Neither the host nor the sizes of allocations may depend on the values of ``numbers``.

        Args:
            prepared: the result of :meth:`prepare`.
            x: float16 or bf16 ``[T, K]``, not quantized.
            numbers: int32 ``[T, top_k]``, the index of each expert; :data:`NO_EXPERT` adds nothing.
            weights: float32 ``[T, top_k]``.

        Returns:
            ``[T, K]`` in the type of ``x``, rounded to it after gate and up, after their product, after each expert and at the end.
        """
