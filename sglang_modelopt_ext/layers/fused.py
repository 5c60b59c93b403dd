"""A whole layer of experts in one call of another package's kernel, from the stored tensors to its output. Needs no SGLang."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sglang_modelopt_ext.backends.base import Prepared, ShardWeight, tensors_of, without_tensors
from sglang_modelopt_ext.backends.experts.base import ExpertRequest
from sglang_modelopt_ext.backends.experts.fused import FusedExperts, FusedRequest, StoredExperts
from sglang_modelopt_ext.backends.select import fused_candidates, only_fused_is_named
from sglang_modelopt_ext.backends.self_test import check_fused_backend
from sglang_modelopt_ext.env import EXPERTS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.experts import ExpertShards
from sglang_modelopt_ext.layers.linear import INPUT_SCALE, check_blocks, say_once
from sglang_modelopt_ext.layers.mixture import Choices

PREFIX = "fused_"


class FusedProduct:
    """Both products of a layer's experts, prepared for one kernel; its tensors are parameters of the module it is prepared on.

    Args:
        where: the checkpoint's folder, for messages.
        prefix: the layer's name, for messages.
    """

    def __init__(self, where: object, prefix: str) -> None:
        self.where = where
        self.prefix = prefix
        self.backend: FusedExperts | None = None
        self._build: Callable[..., Prepared] | None = None
        self._names: tuple[str, ...] = ()

    def prepare(
        self,
        layer: torch.nn.Module,
        request: FusedRequest,
        gate_up: Sequence[ExpertShards],
        down: Sequence[ExpertShards],
    ) -> bool:
        """Prepares the stored experts with the first backend that is named and can hold them, as parameters of ``layer``.

        Args:
            layer: the module that will hold the tensors.
            request: what the layer asks for.
            gate_up, down: what is stored for each of this rank's experts.

        Returns:
            Whether there was one. If not, the log says why.

        Raises:
            ModelOptExtError: a value is illegal, or no backend is named that takes the layer, with the reason of each.
        """
        taking, refused = fused_candidates(request)
        reasons = [f"{name} {reason}" for name, reason in refused.items()]
        for asked, experts in ((request.gate_up, gate_up), (request.down, down)) if taking else ():
            for shards in experts:
                check_blocks(self.where, self.prefix, asked.scheme, shards)
        device = gate_up[0][0]["weight"].device
        for backend in taking:
            try:
                check_fused_backend(backend, request, device)
                prepared = backend.prepare(_stored(request.gate_up, gate_up), _stored(request.down, down))
            except ValueError as error:
                reasons.append(f"{backend.name}: {error}")
                continue
            tensors = tensors_of(prepared)
            for name, tensor in tensors.items():
                layer.register_parameter(PREFIX + name, torch.nn.Parameter(tensor, requires_grad=False))
            self.backend, self._build, self._names = backend, without_tensors(prepared), tuple(tensors)
            return True
        if only_fused_is_named():
            raise ModelOptExtError.at(
                self.where, self.prefix, f"experts that a kernel named in {EXPERTS.variable} takes", "; ".join(reasons)
            )
        for reason in reasons:
            say_once(f"modelopt_ext: experts {request.gate_up.scheme.describe()}: passed over {reason}")
        return False

    def release(self, layer: torch.nn.Module) -> None:
        """Takes the prepared tensors off ``layer`` again."""
        for name in self._names:
            delattr(layer, PREFIX + name)
        self.backend, self._build, self._names = None, None, ()

    def tensors(self, layer: torch.nn.Module) -> Mapping[str, torch.Tensor]:
        """What is prepared on ``layer``, by the backend's names."""
        return {name: layer.get_parameter(PREFIX + name) for name in self._names}

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, choices: Choices) -> torch.Tensor:
        """As :func:`mix`, for choices whose weights are not multiplied to the input."""
        if self.backend is None or self._build is None or choices.weights_input:
            raise RuntimeError(f"{self.prefix} is not prepared for this")
        weights = choices.weights.to(torch.float32)
        if choices.factor is not None:
            weights = weights * choices.factor
        numbers = choices.numbers.to(torch.int32).contiguous()
        return self.backend.run(self._build(**self.tensors(layer)), x.contiguous(), numbers, weights.contiguous())


def _stored(request: ExpertRequest, experts: Sequence[ExpertShards]) -> StoredExperts:
    weights = [[ShardWeight(request.scheme.weight, shard, request.math) for shard in shards] for shards in experts]
    if INPUT_SCALE not in experts[0][0]:
        return StoredExperts(weights, None)
    scales = [torch.stack([shard[INPUT_SCALE].reshape(()) for shard in shards]) for shards in experts]
    return StoredExperts(weights, torch.stack(scales))
