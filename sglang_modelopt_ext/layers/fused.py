"""A whole layer of experts in one call of another package's kernel, from the stored tensors to the output. It needs no SGLang."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sglang_modelopt_ext.backends.base import Prepared, ShardWeight, tensors_of, without_tensors
from sglang_modelopt_ext.backends.experts.base import ExpertRequest
from sglang_modelopt_ext.backends.experts.fused import FusedExperts, FusedRequest, StoredExperts
from sglang_modelopt_ext.backends.select import fused_candidates, only_fused_is_named, prepare_first
from sglang_modelopt_ext.backends.self_test import check_fused_backend
from sglang_modelopt_ext.env import EXPERTS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.experts import ExpertShards
from sglang_modelopt_ext.layers.linear import INPUT_SCALE, check_blocks, warn_once
from sglang_modelopt_ext.layers.mixture import Choices

PREFIX = "fused_"


class FusedProduct:
    """Both products of a layer's experts in one kernel; the prepared tensors are parameters of the module it is prepared on.

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
        """Prepare the stored experts with the first named backend that can serve them, as parameters of ``layer``.

        Args:
            layer: the module that will hold the tensors.
            request: the layer.
            gate_up, down: the stored tensors of each of this rank's experts.

        Returns:
            Whether there is one. If not, the log says why.

        Raises:
            ModelOptExtError: a value is illegal; or only such backends are named and none serves the layer, with the reasons.
        """
        candidates, unsupported = fused_candidates(request)
        for asked, experts in ((request.gate_up, gate_up), (request.down, down)) if candidates else ():
            for shards in experts:
                check_blocks(self.where, self.prefix, asked.scheme, shards)

        def prepare(backend: FusedExperts) -> Prepared:
            check_fused_backend(backend, request, gate_up[0][0]["weight"].device)
            return backend.prepare(_stored(request.gate_up, gate_up), _stored(request.down, down))

        found, rejected = prepare_first(candidates, prepare)
        if found is not None:
            self.backend, prepared = found
            tensors = tensors_of(prepared)
            for name, tensor in tensors.items():
                layer.register_parameter(PREFIX + name, torch.nn.Parameter(tensor, requires_grad=False))
            self._build, self._names = without_tensors(prepared), tuple(tensors)
            return True
        rejected = [*(f"{name} {reason}" for name, reason in unsupported.items()), *rejected]
        if only_fused_is_named():
            expected = f"experts that a kernel named in {EXPERTS.variable} takes"
            raise ModelOptExtError.at(self.where, self.prefix, expected, "; ".join(rejected))
        for reason in rejected:
            warn_once(f"modelopt_ext: experts {request.gate_up.scheme.describe()}: rejected {reason}")
        return False

    def release(self, layer: torch.nn.Module) -> None:
        """Remove the prepared tensors from ``layer``."""
        for name in self._names:
            delattr(layer, PREFIX + name)
        self.backend, self._build, self._names = None, None, ()

    def tensors(self, layer: torch.nn.Module) -> Mapping[str, torch.Tensor]:
        """Return the tensors prepared on ``layer``, by the backend's names."""
        return {name: layer.get_parameter(PREFIX + name) for name in self._names}

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, choices: Choices) -> torch.Tensor:
        """Return the layer's output ``[T, N]`` for ``x`` ``[T, K]``, as :func:`.mixture.mix` defines it.

        Raises:
            RuntimeError: it is not prepared, or the router's weights multiply the input.
        """
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
