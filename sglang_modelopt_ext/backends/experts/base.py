"""Ways to keep the weights of a layer's experts, each with the product that reads them.

A mixture of experts multiplies every token by the weights of the few experts it was routed to. One expert product has the same
number of outputs and inputs for every expert: gate and up together (or each, where their activations are rounded differently),
then down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import torch

from sglang_modelopt_ext.backends.base import LinearRequest, ShardWeight, WeightT, merge_decoded
from sglang_modelopt_ext.backends.linear.dense import DenseWeight
from sglang_modelopt_kernels.gemm.reference import dense_linear, prepare_dense

NO_EXPERT = -1
"""The expert of a row that no expert of this rank serves; its output is zero."""


@dataclass(frozen=True, kw_only=True)
class ExpertRequest(LinearRequest):
    """What an expert backend may base its answer on: as for a linear layer, whose ``n`` and ``k`` are those of one expert.

    Attributes:
        experts: how many experts this rank holds.
        top_k: how many experts a token goes to, on all ranks.
    """

    experts: int
    top_k: int


@dataclass(frozen=True)
class Routing:
    """Which expert serves which row, of a size that depends on the number of tokens alone, so that CUDA graphs can hold it.

    Rows are the pairs of a token and one of its ``top_k`` choices: row ``r`` is choice ``r % top_k`` of token ``r // top_k``.

    Attributes:
        experts: int32 ``[R]``, ``R = tokens * top_k``: this rank's number of the expert, or :data:`NO_EXPERT`.
        top_k: rows for each token.
        derived: what a backend works out of it (sorted rows, offsets) and wants to find again: the object is made once for
            each pass through a layer and given to all of its products.
    """

    experts: torch.Tensor
    top_k: int
    derived: dict[object, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """``R``."""
        return self.experts.shape[0]


class ExpertBackend(ABC, Generic[WeightT]):
    """A way to keep the weights of all experts of this rank, and the product that reads them."""

    name: str
    repeats = True
    """Whether its product repeats bit for bit: the check before serving holds it to that."""
    kernels: tuple[str, ...] = ()
    """Names of the Triton functions of this package its product launches; none where PyTorch or another package multiplies."""

    @abstractmethod
    def supports(self, request: ExpertRequest) -> str | None:
        """None, or the reason why not."""

    @abstractmethod
    def operand(self, request: ExpertRequest) -> torch.dtype:
        """The type :meth:`matmul` reads activations in; it holds the rounded ones exactly."""

    @abstractmethod
    def prepare(self, experts: Sequence[Sequence[ShardWeight]]) -> WeightT:
        """Return what is kept: tensors ``[E, ...]``, one of them ``out_scale`` float32 ``[E, N]``, and static metadata.

        Args:
            experts: for each expert its shards, one below the other (gate above up).

        Raises:
            ValueError: the backend cannot hold them.
        """

    @abstractmethod
    def matmul(
        self,
        weight: WeightT,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        routing: Routing,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """``[R, N]``: every row times the transposed weight of its expert, summed in float32 and rounded once.

        Must not copy to the host or allocate by what ``routing`` says, except on a CPU.

        Args:
            weight: see :meth:`prepare`.
            values: activations in the type of :meth:`operand`, ``[R, K]``, or ``[R / top_k, K]`` where all choices of a
                token read the same: row ``r`` then reads ``values[r // top_k]``.
            row_scale: float32 ``[R, 1]`` whatever the shape of ``values``, multiplied to the output row; None for ones.
            routing: the expert of each row.
            out_dtype: the type of the result.

        Returns:
            Row ``r`` is ``row_scale[r] * out_scale[e] * (values[..] @ unit[e].T)`` with ``e = routing.experts[r]``, zero
            where that is :data:`NO_EXPERT`.
        """


class ReferenceExperts(ExpertBackend[DenseWeight]):
    """Weights decoded to float32 once, one matrix product for each expert that has rows: the reference path, on a CPU."""

    name = "experts_reference"

    def supports(self, request: ExpertRequest) -> str | None:
        """Any layer on a CPU: the rows of an expert are found by looking at the routing, which a CUDA graph cannot hold."""
        return None if request.device == "cpu" else "is for cpu"

    def operand(self, request: ExpertRequest) -> torch.dtype:
        """float32."""
        del request
        return torch.float32

    def prepare(self, experts: Sequence[Sequence[ShardWeight]]) -> DenseWeight:
        """``unit`` float32 ``[E, N, K]`` and ``out_scale`` float32 ``[E, N]``."""
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
        """See :class:`ExpertBackend`."""
        unit, out_scale = weight.unit, weight.out_scale
        y = torch.zeros(routing.rows, unit.shape[1], dtype=torch.float32, device=values.device)
        shared = routing.top_k if values.shape[0] != routing.rows else 1
        for expert in range(unit.shape[0]):
            rows = (routing.experts == expert).nonzero().squeeze(1)
            if rows.numel():
                scale = None if row_scale is None else row_scale[rows]
                y[rows] = dense_linear(values[rows // shared], scale, unit[expert], out_scale[expert], None)
        return y.to(out_dtype)
