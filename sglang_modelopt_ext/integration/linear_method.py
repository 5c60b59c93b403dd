"""The linear method: any scheme, for any of SGLang's parallel linear layers.

It registers, loads and prepares tensors; :class:`~sglang_modelopt_ext.layers.linear.LinearProduct` computes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig

from sglang_modelopt_ext.backends.base import Backend
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.env import W4A8Math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.layout import Layout, full_sizes, read_layout
from sglang_modelopt_ext.integration.parameters import StoredParameter, load_stored
from sglang_modelopt_ext.integration.stand_in import StandIn
from sglang_modelopt_ext.layers.linear import LinearProduct, ShardGroup, check_blocks, dense_weight
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_kernels.formats.base import TensorSpec, ValueRule

ABSORBED = ("kv_b_proj",)
"""Layers whose dense weight SGLang's model classes read while they load, to multiply it into others (latent attention, MLA)."""


class ModelOptExtLinearMethod(LinearMethodBase):
    """SGLang's quantization method of one linear layer of a checkpoint.

    Args:
        scheme: the layer's quantization.
        where: the checkpoint's folder, for errors.
        prefix: the layer's name in SGLang's module tree, for errors.
        math: the numerics of the layer's weights.
        stored: the checkpoint's layers that it is made of, in the order of its rows; None without a checkpoint (dummy weights).
    """

    def __init__(
        self,
        scheme: LayerScheme,
        where: object,
        prefix: str,
        math: W4A8Math,
        stored: Sequence[QuantizedLinear] | None,
    ) -> None:
        self.scheme = scheme
        self.where = where
        self.prefix = prefix
        self.math = math
        self.stored = None if stored is None else tuple(stored)
        self.product = LinearProduct(scheme, where, prefix, self.math, torch.get_default_dtype())
        self.quant_config: QuantizationConfig | None = None
        """The checkpoint's, which classes ask for its name and blocks."""
        self.verified = False
        """Whether every tensor of the layer was loaded and checked; set by the strict loader."""
        self._create: Callable[[], None] | None = None
        self._loaders: dict[str, Callable[..., Any]] = {}
        self._layout: Layout | None = None
        self._decoded = False

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
        # N is taken from output_partition_sizes, and our parameters load themselves.
        del output_size, extra_weight_attrs
        self.product.dtype = params_dtype
        layout = self._read_layout(layer, input_size, input_size_per_partition, output_partition_sizes)
        self.product.rank_amax = _rank_maximum(layer) if input_size_per_partition != input_size else None
        self._layout = layout

        def create() -> None:
            for spec in self.scheme.tensors:
                try:
                    parameter = StoredParameter(spec, layout)
                except ValueError as error:
                    raise ModelOptExtError.at(
                        self.where,
                        f"{self.prefix}.{spec.name}",
                        f"sizes per rank that hold whole blocks of {self.scheme.weight.name}",
                        error,
                    ) from error
                # A model's class may have put a loader of its own in the place of ours.
                parameter._weight_loader = self._loaders.get(spec.name, parameter._weight_loader)
                layer.register_parameter(spec.name, parameter)

        create()
        self._create = create

    def _read_layout(self, layer: torch.nn.Module, input_size: int, k_rank: int, partition_sizes: list[int]) -> Layout:
        """Return the layer's layout.

        Raises:
            ModelOptExtError: N or K is not the checkpoint's (on a CPU SGLang's loaders pad short tensors with zeros), or the
                layer's class slices it in a way of its own.
        """
        _check_loader(self.prefix, layer)
        stored = None if self.stored is None else [linear.n for linear in self.stored]
        source = _source_of_sizes(layer)
        for linear in self.stored or ():
            if linear.k != input_size:
                raise ModelOptExtError.at(
                    self.where, f"{self.prefix}.weight", f"K = {input_size}, as {source}", linear.k
                )
        try:
            return read_layout(layer, partition_sizes, input_size, k_rank, stored)
        except ValueError as error:
            expected = full_sizes(layer, partition_sizes)
            raise ModelOptExtError.at(
                self.where, f"{self.prefix}.weight", f"N = {expected}, as {source}", stored
            ) from error

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
        if self._decoded:
            return
        layout = self._placed
        self._check_rows(layer)
        shards, held = self._shards(layer), sum(shard.held for shard in layout.shards)
        self.product.prepare(layer, shards, held, layout.k_rank, self._is_vocabulary(layer))
        for spec in self.scheme.tensors:
            self._loaders[spec.name] = layer.get_parameter(spec.name)._weight_loader  # type: ignore[attr-defined]
        stand_in: Any = StandIn(self.prefix, layer.get_parameter("weight"))
        self._remove_stored(layer)
        if self._is_vocabulary(layer):
            # SGLang calls the method of an lm_head only if the layer has a `weight`.
            layer.register_parameter("weight", layer.get_parameter(next(iter(self.groups[0].prepared.values()))))
        else:
            layer.weight = stand_in

    @staticmethod
    def _is_vocabulary(layer: torch.nn.Module) -> bool:
        return hasattr(layer, "org_vocab_size")

    @property
    def is_absorbed(self) -> bool:
        """Whether the model's class reads the layer's dense weight while it loads."""
        return self.prefix.rpartition(".")[2] in ABSORBED

    @property
    def _placed(self) -> Layout:
        assert self._layout is not None, "a layer whose weights were created has a layout"
        return self._layout

    def _shards(self, layer: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
        """Return this rank's tensors of each stored layer, by the names of their specs."""
        names = [spec.name for spec in self.scheme.tensors]
        return [
            {name: layer.get_parameter(name).shard(index) for name in names}  # type: ignore[attr-defined]
            for index in range(len(self._placed.shards))
        ]

    def _check_rows(self, layer: torch.nn.Module) -> None:
        """Raise ModelOptExtError where ranks hold rows cut by two rules: by a loader of the model's class, and by ours."""
        names = [spec.name for spec in self.scheme.tensors if spec.dim_of("N") is not None]
        loaders = [layer.get_parameter(name)._weight_loader for name in names]  # type: ignore[attr-defined]
        ours = [name for name, loader in zip(names, loaders, strict=True) if loader is load_stored]
        if 0 < len(ours) < len(names) and not all(shard.is_whole for shard in self._placed.shards):
            expected = "a tensor that the model's class cuts for its ranks, as it does the weight"
            raise ModelOptExtError.at(self.where, f"{self.prefix}.{ours[0]}", expected, "one it does not know")

    def _remove_stored(self, layer: torch.nn.Module) -> None:
        for spec in self.scheme.tensors:
            delattr(layer, spec.name)

    def decode(self, layer: torch.nn.Module) -> None:
        """Replace the stored tensors of an absorbed layer by the dense weight that they stand for, in the model's type.

        The layer's input is not rounded then: the absorbed weight is multiplied by other activations than the recipe rounds.

        Raises:
            ModelOptExtError: a value is illegal.
        """
        shards = self._shards(layer)
        if not shards[0]["weight"].is_meta:
            check_blocks(self.where, self.prefix, self.scheme, shards)
        weight = torch.cat([dense_weight(self.scheme, shard) for shard in shards]).to(self.product.dtype)
        self._remove_stored(layer)
        layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
        self._decoded = True

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Replace the prepared weights by unset parameters for the stored tensors, before weights are updated from disk."""
        if self._create is not None and self._decoded:
            device = layer.get_parameter("weight").device
            delattr(layer, "weight")
            self.verified = self._decoded = False
            with torch.device(device):
                self._create()
        if self._create is None or not self.product.is_prepared:
            return
        device = layer.get_parameter(next(iter(self.groups[0].prepared.values()))).device
        self.product.release(layer)
        delattr(layer, "weight")
        self.verified = False
        with torch.device(device):
            self._create()

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output ``[..., N]`` for ``x`` ``[..., K]``, see :meth:`LinearProduct.apply`."""
        if self._decoded:
            return torch.nn.functional.linear(x, layer.get_parameter("weight"), bias)
        return self.product.apply(layer, x, bias)

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Return the rows of the weight for the token ids ``input_``, see :meth:`LinearProduct.rows`."""
        return self.product.rows(layer, input_)

    def fill_dummy(self, layer: torch.nn.Module) -> None:
        """Fill the layer's parameters with legal values for ``--load-format dummy``."""
        for spec in self.scheme.tensors:
            parameter = layer.get_parameter(spec.name)
            fill_dummy(parameter.data, spec)
        if self.is_absorbed:
            self.decode(layer)
        self.verified = True


def quantized_vocabularies(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the name and module of each embedding and head of ``model`` that this package serves."""
    for name, module in model.named_modules():
        if hasattr(module, "org_vocab_size") and isinstance(module.quant_method, ModelOptExtLinearMethod):
            yield name, module


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


def _check_loader(prefix: str, layer: torch.nn.Module) -> None:
    """Raise ModelOptExtError for a layer whose class loads its tensors by rules of its own, which are not known here."""
    known = ("sglang.srt.layers.linear", "sglang.srt.layers.vocab_parallel_embedding")
    for owner in type(layer).__mro__:
        if {"weight_loader", "weight_loader_v2"} & vars(owner).keys() and owner.__module__ not in known:
            expected = "a linear layer that SGLang's own classes slice"
            raise ModelOptExtError.at(prefix, "weight", expected, f"{owner.__name__}, which slices by itself")


def _rank_maximum(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def maximum(amax: torch.Tensor) -> torch.Tensor:
        # Of the collectives, only SGLang's may run inside a captured CUDA graph.
        return layer.tp_group.all_gather(amax, dim=-1).amax(dim=-1, keepdim=True)

    return maximum
