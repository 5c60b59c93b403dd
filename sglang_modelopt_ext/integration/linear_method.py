"""The linear method: any scheme, for any of SGLang's parallel linear layers.

It registers, loads and prepares tensors; :class:`~sglang_modelopt_ext.layers.linear.LinearProduct` computes with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from sglang_modelopt_ext.backends.base import Backend
from sglang_modelopt_ext.env import W4A8Math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.parameters import make_parameter, shard_tensor
from sglang_modelopt_ext.layers.linear import LinearProduct, ShardGroup
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_kernels.formats.base import TensorSpec, ValueRule


class ModelOptExtLinearMethod(LinearMethodBase):
    """SGLang's quantization method of one linear layer of a checkpoint.

    Args:
        scheme: the layer's quantization.
        where: the checkpoint's folder, for errors.
        prefix: the layer's name in SGLang's module tree, for errors.
        math: the numerics of the layer's weights.
        stored_n: N of each shard in the checkpoint, None without a checkpoint (dummy weights).
        stored_k: K in the checkpoint, None without a checkpoint.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        where: object,
        prefix: str,
        math: W4A8Math,
        stored_n: tuple[int, ...] | None,
        stored_k: int | None,
    ) -> None:
        self.scheme = scheme
        self.where = where
        self.prefix = prefix
        self.math = math
        self.stored_n = stored_n
        self.stored_k = stored_k
        self.product = LinearProduct(scheme, where, prefix, self.math, torch.get_default_dtype())
        self.verified = False
        """Whether every tensor of the layer was loaded and checked; set by the strict loader."""
        self._create: Callable[[], None] | None = None
        self._shard_sizes: list[int] = []
        self._k = 0

    @property
    def backend(self) -> Backend | None:
        """The backend that serves the layer, None until the weights are prepared."""
        return self.product.backend if self.product.is_prepared else None

    @property
    def groups(self) -> tuple[ShardGroup, ...]:
        """The groups of shards that are multiplied in one product each."""
        return self.product.groups

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors as parameters of ``layer``, unset.

        Raises:
            ModelOptExtError: the model's sizes are not the checkpoint's, or this rank's cut through a block.
        """
        del output_size  # N is taken from output_partition_sizes
        self.product.dtype = params_dtype
        self._check_sizes(layer, input_size, output_partition_sizes)
        self.product.rank_amax = _rank_maximum(layer) if input_size_per_partition != input_size else None
        self._shard_sizes, self._k = list(output_partition_sizes), input_size_per_partition
        weight_loader = extra_weight_attrs["weight_loader"]

        def create() -> None:
            for spec in self.scheme.tensors:
                try:
                    parameter = make_parameter(spec, self._shard_sizes, self._k, weight_loader)
                except ValueError as error:
                    raise ModelOptExtError.at(
                        self.where,
                        f"{self.prefix}.{spec.name}",
                        f"sizes per rank that hold whole blocks of {self.scheme.weight.name}",
                        error,
                    ) from error
                layer.register_parameter(spec.name, parameter)

        create()
        self._create = create

    def _check_sizes(self, layer: torch.nn.Module, input_size: int, partition_sizes: list[int]) -> None:
        """Raise ModelOptExtError unless N and K are the checkpoint's: on a CPU SGLang's loaders pad short tensors with zeros."""
        source = _source_of_sizes(layer)
        if self.stored_k is not None and self.stored_k != input_size:
            raise ModelOptExtError.at(
                self.where, f"{self.prefix}.weight", f"K = {input_size}, as {source}", self.stored_k
            )
        expected = full_shard_sizes(layer, partition_sizes)
        if self.stored_n is not None and expected is not None and list(self.stored_n) != expected:
            raise ModelOptExtError.at(
                self.where, f"{self.prefix}.weight", f"N = {expected}, as {source}", list(self.stored_n)
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Prepare the weights for the first backend that supports them, and delete the stored tensors.

        Raises:
            ModelOptExtError: the weights did not pass through the strict reader, or no backend can serve them.
        """
        if not self.verified:
            raise ModelOptExtError.at(
                self.where,
                f"{self.prefix}.weight",
                "a load through the strict reader",
                "a loader that bypasses it (see --load-format)",
            )
        shards = [self._shard(layer, index) for index in range(len(self._shard_sizes))]
        self.product.prepare(layer, shards, sum(self._shard_sizes), self._k, self._is_vocabulary(layer))
        for spec in self.scheme.tensors:
            delattr(layer, spec.name)
        if self._is_vocabulary(layer):
            # SGLang calls the method of an lm_head only if the layer has a `weight`.
            layer.register_parameter("weight", layer.get_parameter(next(iter(self.groups[0].prepared.values()))))

    @staticmethod
    def _is_vocabulary(layer: torch.nn.Module) -> bool:
        return hasattr(layer, "org_vocab_size")

    def _shard(self, layer: torch.nn.Module, index: int) -> dict[str, torch.Tensor]:
        return {
            spec.name: shard_tensor(spec, layer.get_parameter(spec.name), index, self._shard_sizes)
            for spec in self.scheme.tensors
        }

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Replace the prepared weights by unset parameters for the stored tensors, before weights are updated from disk."""
        if self._create is None or not self.product.is_prepared:
            return
        device = layer.get_parameter(next(iter(self.groups[0].prepared.values()))).device
        self.product.release(layer)
        if self._is_vocabulary(layer):
            delattr(layer, "weight")
        self.verified = False
        with torch.device(device):
            self._create()

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output ``[..., N]`` for ``x`` ``[..., K]``, see :meth:`LinearProduct.apply`."""
        return self.product.apply(layer, x, bias)

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Return the rows of the weight for the token ids ``input_``, see :meth:`LinearProduct.rows`."""
        return self.product.rows(layer, input_)

    def fill_dummy(self, layer: torch.nn.Module) -> None:
        """Fill the layer's parameters with legal values for ``--load-format dummy``."""
        for spec in self.scheme.tensors:
            parameter = layer.get_parameter(spec.name)
            fill_dummy(parameter.data, spec)
        self.verified = True


def fill_dummy(tensor: torch.Tensor, spec: TensorSpec) -> None:
    """Fill ``tensor`` with values that are legal for ``spec``: random codes, and scales under which weights are small."""
    if spec.values is ValueRule.CODES:
        tensor.random_(0, 256) if tensor.dtype == torch.uint8 else tensor.zero_()
    elif spec.values is ValueRule.BLOCK_SCALE_UE8M0:
        tensor.fill_(117)  # 2^-10
    elif spec.values is ValueRule.BLOCK_SCALE_E4M3:
        tensor.copy_(torch.ones(tensor.shape, device=tensor.device))
    else:
        tensor.fill_(2.0**-10)


def _source_of_sizes(layer: Any) -> str:
    """Return the source of a model's sizes, for errors: SGLang pads sizes that do not divide by the ranks of a CPU."""
    from sglang.srt.distributed.utils import get_group_rank_size
    from sglang.srt.utils import is_cpu

    _, ranks = get_group_rank_size(getattr(layer, "tp_group", None))
    padded = ranks > 1 and is_cpu()
    return f"SGLang pads config.json for --tp-size {ranks} on a CPU" if padded else "config.json has it"


def full_shard_sizes(layer: Any, partition_sizes: list[int]) -> list[int] | None:
    """Return N of each shard of a linear layer over all ranks, by the model's configuration; None for an unknown kind of layer."""
    if hasattr(layer, "total_num_kv_heads"):  # QKVParallelLinear; its output_sizes count replicated KV heads
        head, v_head = layer.head_size, layer.v_head_size
        return [layer.total_num_heads * head, layer.total_num_kv_heads * head, layer.total_num_kv_heads * v_head]
    if hasattr(layer, "org_vocab_size"):  # embeddings and lm_head, padded by SGLang
        return [layer.org_vocab_size]
    if hasattr(layer, "output_sizes"):
        return list(layer.output_sizes)
    return [layer.output_size] if len(partition_sizes) == 1 and hasattr(layer, "output_size") else None


def _rank_maximum(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def maximum(amax: torch.Tensor) -> torch.Tensor:
        # Of the collectives, only SGLang's may run inside a captured CUDA graph.
        return layer.tp_group.all_gather(amax, dim=-1).amax(dim=-1, keepdim=True)

    return maximum
