"""Backends of one product of a layer's experts: how the weights are kept, and the product that reads them.

A mixture of experts multiplies every token by the weights of the few experts it was routed to. All experts of a product have the
same N and K. A layer has two products: gate and up together (or one each, where their activations are rounded differently), and
down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import torch

from sglang_modelopt_ext.backends.base import LinearRequest, ShardWeight, WeightT, merge_decoded
from sglang_modelopt_ext.backends.linear.dense import DenseWeight
from sglang_modelopt_ext.backends.tokens import SPREAD
from sglang_modelopt_kernels.gemm.reference import dense_linear, prepare_dense

NO_EXPERT = -1
"""The expert of a row that no expert of this rank serves; its output is zero."""


@dataclass(frozen=True, kw_only=True)
class ExpertRequest(LinearRequest):
    """One product of a layer's experts, as backends are asked whether they support it.

    ``n`` and ``k`` of :class:`LinearRequest` are those of one expert.

    Attributes:
        experts: the number of experts that this rank holds.
        top_k: the number of experts that a token goes to, on all ranks.
    """

    experts: int
    top_k: int


@dataclass(frozen=True)
class Routing:
    """The expert of each row. Its size depends on the number of tokens alone, so that CUDA graphs can hold it.

    Rows are the pairs of a token and one of its ``top_k`` choices: row ``r`` is choice ``r % top_k`` of token ``r // top_k``.

    Attributes:
        experts: int32 ``[R]``, ``R = tokens * top_k``: this rank's index of the expert, or :data:`NO_EXPERT`.
        top_k: rows for each token.
        derived: a cache of what a backend computes from it (sorted rows, offsets), by keys of its own: one object is made for each
            pass through a layer and given to all of its products.
    """

    experts: torch.Tensor
    top_k: int
    derived: dict[object, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows, ``R``."""
        return self.experts.shape[0]


class ExpertBackend(ABC, Generic[WeightT]):
    """A backend of one product: it keeps the weights of all experts of this rank, and multiplies by them."""

    name: str
    repeats = True
    """Whether repeated launches give the same bits, which the check before serving then requires."""
    kernels: tuple[str, ...] = ()
    """The Triton functions of this package that its product launches; none where PyTorch or another package multiplies."""
    interpreted = True
    """Whether tests run its kernels on a CPU, in Triton's interpreter."""

    @abstractmethod
    def supports(self, request: ExpertRequest) -> str | None:
        """Return why this backend cannot serve ``request``, or None."""

    @abstractmethod
    def operand(self, request: ExpertRequest) -> torch.dtype:
        """Return the type in which :meth:`matmul` reads activations; it holds the rounded values exactly."""

    @abstractmethod
    def prepare(self, experts: Sequence[Sequence[ShardWeight]]) -> WeightT:
        """Return what is kept: tensors ``[E, ...]``, one of them ``out_scale`` float32 ``[E, N]``, and static metadata.

        Args:
            experts: for each expert its shards, one below the other (gate above up).

        Raises:
            ValueError: the backend cannot hold them.
        """

    def check_tokens(self, weight: WeightT, request: ExpertRequest, top_k: int) -> tuple[int, ...]:
        """Return numbers of tokens, of ``top_k`` choices each, that take every path of :meth:`matmul` for ``weight``."""
        del weight, request, top_k
        return SPREAD

    def arrange(self, weight: WeightT, operand: torch.dtype, routing: Routing) -> None:
        """Derive from ``routing`` what :meth:`matmul` will need for values of type ``operand``, before these are rounded."""
        del weight, operand, routing

    @abstractmethod
    def matmul(
        self,
        weight: WeightT,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        routing: Routing,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply every row by the transposed weight of its expert, with float32 sums that are rounded once.

        On a GPU, neither the host nor the sizes of allocations may depend on the values of ``routing``.

        Args:
            weight: see :meth:`prepare`.
            values: activations in the type of :meth:`operand`, ``[R, K]``, or ``[R / top_k, K]`` where all choices of a
                token read the same: row ``r`` then reads ``values[r // top_k]``.
            row_scale: float32 ``[R, 1]`` that output rows are multiplied by, or of adjacent rows one, ``[R / top_k, 1]`` or
                ``[1, 1]``; None for ones.
            routing: the expert of each row.
            out_dtype: the type of the result.

        Returns:
            ``[R, N]``: row ``r`` is ``row_scale[r] * out_scale[e] * (values[..] @ unit[e].T)`` for ``e = routing.experts[r]``,
            and zero where that is :data:`NO_EXPERT`.
        """


class ReferenceExperts(ExpertBackend[DenseWeight]):
    """The reference path on a CPU: weights decoded to float32 once, and one matrix product for each expert that has rows."""

    name = "experts_reference"

    def supports(self, request: ExpertRequest) -> str | None:
        """Support any layer on a CPU. It reads the routing on the host, which a CUDA graph cannot record."""
        return None if request.target.kind == "cpu" else "is for cpu"

    def operand(self, request: ExpertRequest) -> torch.dtype:
        """Return float32."""
        del request
        return torch.float32

    def prepare(self, experts: Sequence[Sequence[ShardWeight]]) -> DenseWeight:
        """Return ``unit`` float32 ``[E, N, K]`` and ``out_scale`` float32 ``[E, N]``."""
        parts = [prepare_dense(merge_decoded(shards), torch.float32) for shards in experts]
        return DenseWeight(torch.stack([unit for unit, _ in parts]), torch.stack([scale for _, scale in parts]))

    def matmul(
        self,
        weight: DenseWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        routing: Routing,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Implement :meth:`ExpertBackend.matmul`."""
        unit, out_scale = weight.unit, weight.out_scale
        y = torch.zeros(routing.rows, unit.shape[1], dtype=torch.float32, device=values.device)
        shared = routing.top_k if values.shape[0] != routing.rows else 1
        scaled = 1 if row_scale is None else max(routing.rows // row_scale.shape[0], 1)
        for expert in range(unit.shape[0]):
            rows = (routing.experts == expert).nonzero().squeeze(1)
            if rows.numel():
                scale = None if row_scale is None else row_scale[rows // scaled]
                y[rows] = dense_linear(values[rows // shared], scale, unit[expert], out_scale[expert], None)
        return y.to(out_dtype)
