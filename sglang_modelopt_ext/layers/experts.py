"""One product of a layer's experts, from the stored tensors of each expert to the output rows. It needs no SGLang.

A layer may have experts in several formats: each has a product of its own, which leaves out the rows of the others' experts.

Every expert keeps its own scales. Where all experts round their input with one scale (as ModelOpt exports gate and up), a token is
rounded once; otherwise each pair of a token and an expert is rounded with that expert's scale. Gate and up share a product unless
some expert rounds their inputs differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.base import PreparedWeight, ShardWeight, tensors_of, without_tensors
from sglang_modelopt_ext.backends.experts.base import NO_EXPERT, ExpertBackend, ExpertRequest, Routing
from sglang_modelopt_ext.backends.select import expert_candidates, prepare_first, served_scheme
from sglang_modelopt_ext.backends.self_test import check_expert_backend
from sglang_modelopt_ext.backends.timings import gpu_of
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import W4A8Math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.handover import LONGEST, announce_product
from sglang_modelopt_ext.layers.linear import (
    INPUT_SCALE,
    Shard,
    check_blocks,
    exact_fp8,
    group_shards,
    may_be_rounded,
    round_input,
    take_rounded,
    warn_once,
)
from sglang_modelopt_ext.schemes.base import PRE_QUANT_SCALE, LayerScheme
from sglang_modelopt_kernels.quantize.fp8.quantize import rounds
from sglang_modelopt_kernels.quantize.gated import swiglu_fp8

ExpertShards = Sequence[Shard]
"""The shards of one expert: gate and up, or down."""


@dataclass(frozen=True)
class ExpertGroup:
    """Shards of every expert computed by one product.

    Attributes:
        build: builds the prepared weight from its tensors, by field; see :class:`ShardGroup`.
        prepared: the layer's name of each tensor of the prepared weight, by field.
        inputs: the layer's names of ``input_scale`` and ``pre_quant_scale``, those that are stored.
        each: the names among ``inputs`` whose tensor has a first dimension of experts, because the experts differ in it.
    """

    build: Callable[..., PreparedWeight]
    prepared: dict[str, str]
    inputs: dict[str, str]
    each: frozenset[str]


class ExpertProduct:
    """One product of a layer's experts; its prepared tensors are parameters of the module it is prepared on.

    Args:
        scheme: how its weights are quantized.
        where: the checkpoint's folder, for messages.
        prefix: the name of the layer and the product, for messages.
        math: the numerics of its weights.
        dtype: the model's type.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        where: object,
        prefix: str,
        math: W4A8Math = "exact",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.scheme = scheme
        """How it is served: from the preparation on without roundings that are left out on its device."""
        self.stored_scheme = scheme
        self.where = where
        self.prefix = prefix
        self.math = math
        self.dtype = dtype
        self.rank_amax: Callable[[torch.Tensor], torch.Tensor] | None = None
        """The maximum over the ranks that hold slices of the same rows; None where a rank holds whole rows."""
        self.groups: tuple[ExpertGroup, ...] = ()
        self.backend: ExpertBackend | None = None
        self._operand = torch.float32

    def prepare(
        self,
        layer: torch.nn.Module,
        name: str,
        experts: Sequence[ExpertShards],
        n: int,
        k: int,
        top_k: int,
        backends: Sequence[ExpertBackend] | None = None,
    ) -> None:
        """Prepare the stored experts with the first backend that can serve them, as parameters of ``layer``.

        Args:
            layer: the module that will hold the tensors.
            name: the prefix of their names.
            experts: the stored tensors of each of this rank's experts.
            n, k: output and input features of one expert, all shards together.
            top_k: the number of experts that a token goes to.
            backends: the backends to try, in order; None for :func:`expert_candidates`.

        Raises:
            ModelOptExtError: a value is illegal, or no backend serves the experts, with the reason of each.
        """
        for shards in experts:
            check_blocks(self.where, self.prefix, self.scheme, shards)
        device = experts[0][0]["weight"].device
        request = self.request(device, n, k, len(experts), top_k)
        chosen = expert_candidates(request, self.prefix) if backends is None else backends
        self.scheme = request.scheme
        names = [PRE_QUANT_SCALE.name] if self.scheme.activation is None else [INPUT_SCALE, PRE_QUANT_SCALE.name]
        members = _group_experts(experts, names)

        def prepare(backend: ExpertBackend) -> list[PreparedWeight]:
            check_expert_backend(backend, request, device)
            return [backend.prepare(self._weights(experts, indices)) for indices in members]

        found, rejected = prepare_first(chosen, prepare)
        for reason in rejected:
            warn_once(f"modelopt_ext: experts {request.scheme.describe()}: rejected {reason}")
        if found is None:
            expected = f"weights that a kernel with math {self.math} can hold"
            raise ModelOptExtError.at(self.where, f"{self.prefix}.weight", expected, "; ".join(rejected))
        self.backend, prepared = found
        self._operand = self.backend.operand(request)
        self.groups = tuple(
            self._register(layer, f"{name}_{self.backend.name}_{indices[0]}_", weight, experts, indices[0], names)
            for indices, weight in zip(members, prepared, strict=True)
        )

    def request(self, device: torch.device, n: int, k: int, experts: int, top_k: int) -> ExpertRequest:
        """Return the request that backends are selected for.

        Args:
            device: where the experts are.
            n, k: output and input features of one expert, all shards together.
            experts: the number of experts that this rank holds.
            top_k: the number of experts that a token goes to.
        """
        target = Device.of(device)
        sizes = (served_scheme(self.scheme, target), target, n, k, self.math, self.dtype)
        return ExpertRequest(*sizes, gpu=gpu_of(device), experts=experts, top_k=top_k)

    def _weights(self, experts: Sequence[ExpertShards], indices: Sequence[int]) -> list[list[ShardWeight]]:
        return [[ShardWeight(self.scheme.weight, shards[index], self.math) for index in indices] for shards in experts]

    def _register(
        self,
        layer: torch.nn.Module,
        prefix: str,
        weight: PreparedWeight,
        experts: Sequence[ExpertShards],
        shard: int,
        names: Sequence[str],
    ) -> ExpertGroup:
        prepared = tensors_of(weight)
        tensors, each = dict(prepared), set()
        inputs = [name for name in names if name in experts[0][shard]]
        for name in inputs:
            stacked = torch.stack([shards[shard][name] for shards in experts])
            differ = not bool((stacked == stacked[0]).all())
            # Copies: a slice would keep the whole parameter of the checkpoint alive.
            tensors[name] = stacked if differ else stacked[0].clone()
            each |= {name} if differ else set()
        own = {name: tensors[name] for name in inputs}
        if not each and may_be_rounded(self.scheme.activation, own, self.rank_amax):
            announce_product()
        for name, tensor in tensors.items():
            layer.register_parameter(prefix + name, torch.nn.Parameter(tensor, requires_grad=False))
        return ExpertGroup(
            without_tensors(weight),
            {name: prefix + name for name in prepared},
            {name: prefix + name for name in inputs},
            frozenset(each),
        )

    def release(self, layer: torch.nn.Module) -> None:
        """Remove the prepared tensors from ``layer``."""
        for group in self.groups:
            for name in (*group.prepared.values(), *group.inputs.values()):
                delattr(layer, name)
        self.groups, self.backend = (), None

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        routing: Routing,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply every row by the weights of its expert.

        Args:
            layer: the module the product was prepared on.
            x: ``[T, K]``, one input for all choices of a token, or ``[R, K]``, one for each.
            routing: which expert serves which of the ``R = T * top_k`` rows.
            out_dtype: the type of the result, rounded to once.

        Returns:
            ``[R, N]``; zero where no expert of this rank serves the row.
        """
        outputs = [self._apply_group(layer, group, x, routing, out_dtype) for group in self.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def rounds_gated(self, h: torch.Tensor) -> bool:
        """Return whether :meth:`apply_gated` serves ``h``: on a GPU, all rows rounded alike, to E4M3, and by this rank alone."""
        return (
            h.is_cuda
            and len(self.groups) == 1
            and not self.groups[0].each
            and self.rank_amax is None
            and rounds(self.scheme.activation)
            and h.shape[1] <= 2 * LONGEST
        )

    def apply_gated(
        self, layer: torch.nn.Module, h: torch.Tensor, routing: Routing, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Return :meth:`apply` of ``silu(gate) * up``, rounded to the type of ``h``, ``[R, 2 * K]``: gate, up.

        One kernel computes and rounds it. See :meth:`rounds_gated`.
        """
        backend, weight, inputs = self._prepared(layer, self.groups[0])
        smoothing, scale = inputs.get(PRE_QUANT_SCALE.name), inputs.get(INPUT_SCALE)
        backend.arrange(weight, self._operand, routing)
        _, values, row_scale = swiglu_fp8(h, smoothing, scale, exact_fp8(self._operand))
        return backend.matmul(weight, values.to(self._operand), row_scale.reshape(-1, 1), routing, out_dtype)

    def _prepared(
        self, layer: torch.nn.Module, group: ExpertGroup
    ) -> tuple[ExpertBackend, PreparedWeight, dict[str, torch.Tensor]]:
        """Return the backend, a group's weight, and what rounds its input, by name."""
        if self.backend is None:
            raise RuntimeError(f"{self.prefix} is used before it is prepared")
        weight = group.build(**{name: getattr(layer, attribute) for name, attribute in group.prepared.items()})
        return self.backend, weight, {name: getattr(layer, attribute) for name, attribute in group.inputs.items()}

    def _apply_group(
        self,
        layer: torch.nn.Module,
        group: ExpertGroup,
        x: torch.Tensor,
        routing: Routing,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        backend, weight, inputs = self._prepared(layer, group)
        alone = len(self.groups) == 1 and not group.each
        if alone and may_be_rounded(self.scheme.activation, inputs, self.rank_amax):
            rounded = take_rounded(x, self._operand, inputs)
            if rounded is not None:
                return backend.matmul(weight, rounded[0], rounded[1].reshape(-1, 1), routing, out_dtype)
        if group.each:
            x = _for_rows(x, routing)
            # Rows with an invalid expert use the first expert's scales; their outputs are zero.
            chosen = routing.experts.clamp(min=0).long()
            for name in group.each:
                rows = inputs[name][chosen]
                inputs[name] = rows.unsqueeze(1) if rows.dim() == 1 else rows
        if self.scheme.activation is not None:
            backend.arrange(weight, self._operand, routing)
        values, row_scale = round_input(x, self.scheme.activation, self._operand, inputs, self.rank_amax)
        if row_scale is not None:
            row_scale = row_scale.reshape(-1, 1)
        return backend.matmul(weight, values, row_scale, routing, out_dtype)


@dataclass(frozen=True)
class ExpertPart:
    """Experts that share a product.

    Attributes:
        product: of these experts.
        members: their numbers on this rank, ascending.
    """

    product: ExpertProduct
    members: tuple[int, ...]


class ExpertProducts:
    """One product of all of a layer's experts on a rank, as the sum of products of those that have one scheme.

    Args:
        parts: that together have each expert once.
        name: the prefix of the names of the tensors on the layer.
    """

    def __init__(self, parts: Sequence[ExpertPart], name: str) -> None:
        self.parts = tuple(parts)
        self._name = name
        self._places = [f"{name}_places_{number}" for number in range(len(parts))] if len(parts) > 1 else []

    def prepare(self, layer: torch.nn.Module, experts: Sequence[ExpertShards], n: int, k: int, top_k: int) -> None:
        """Prepare each part; the arguments are those of :meth:`ExpertProduct.prepare`, of all experts."""
        if not self._places:
            self.parts[0].product.prepare(layer, self._name, experts, n, k, top_k)
            return
        for number, (part, attribute) in enumerate(zip(self.parts, self._places, strict=True)):
            own = [experts[member] for member in part.members]
            part.product.prepare(layer, f"{self._name}_{number}", own, n, k, top_k)
            places = torch.full((len(experts),), NO_EXPERT, dtype=torch.int32)
            places[list(part.members)] = torch.arange(len(part.members), dtype=torch.int32)
            placed = places.to(experts[0][0]["weight"].device)
            layer.register_parameter(attribute, torch.nn.Parameter(placed, requires_grad=False))

    def release(self, layer: torch.nn.Module) -> None:
        """Remove the prepared tensors from ``layer``."""
        for part in self.parts:
            part.product.release(layer)
        for attribute in self._places:
            delattr(layer, attribute)

    @property
    def backends(self) -> tuple[str, ...]:
        """The name of each part's backend; empty until they are prepared."""
        return tuple(part.product.backend.name for part in self.parts if part.product.backend is not None)

    def rounds_gated(self, h: torch.Tensor) -> bool:
        """Return whether :meth:`apply_gated` serves ``h``; see :meth:`ExpertProduct.rounds_gated`."""
        return not self._places and self.parts[0].product.rounds_gated(h)

    def apply_gated(
        self, layer: torch.nn.Module, h: torch.Tensor, routing: Routing, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """See :meth:`ExpertProduct.apply_gated`."""
        return self.parts[0].product.apply_gated(layer, h, routing, out_dtype)

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        routing: Routing,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply every row by the weights of its expert; see :meth:`ExpertProduct.apply`."""
        if not self._places:
            return self.parts[0].product.apply(layer, x, routing, out_dtype)
        total: torch.Tensor | None = None
        for part, attribute in zip(self.parts, self._places, strict=True):
            of_part = self._routing(routing, part, layer.get_parameter(attribute))
            y = part.product.apply(layer, x, of_part, out_dtype)
            # A row is zero in all parts but that of its expert: the sum is exact.
            total = y if total is None else total + y
        assert total is not None, "a layer has experts"
        return total

    @staticmethod
    def _routing(routing: Routing, part: ExpertPart, places: torch.Tensor) -> Routing:
        """Return the routing to a part's experts, by their place in it; made once for all products of a pass."""
        key = ("part", part.members)
        if key not in routing.derived:
            experts = routing.experts
            found = torch.where(experts < 0, NO_EXPERT, places[experts.clamp(min=0).long()])
            routing.derived[key] = Routing(found.to(torch.int32), routing.top_k)
        derived: Routing = routing.derived[key]
        return derived


def _for_rows(tensor: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Repeat ``[T, ...]`` to ``[R, ...]``, a token's row for each of its choices; return a tensor of R rows as it is."""
    return tensor if tensor.shape[0] == routing.rows else tensor.repeat_interleave(routing.top_k, dim=0)


def _group_experts(experts: Sequence[ExpertShards], names: Sequence[str]) -> list[list[int]]:
    """Return the indices of the shards that share a product: :func:`group_shards` where all experts agree, else each alone."""
    first = group_shards(experts[0], names)
    if all(group_shards(shards, names) == first for shards in experts):
        return first
    return [[index] for index in range(len(experts[0]))]
