"""SGLang parameters for stored tensors: from a :class:`TensorSpec` to the parameter class that slices and loads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.parameter import BasevLLMParameter, ModelWeightParameter, PerTensorScaleParameter

from sglang_modelopt_kernels.formats.base import TensorSpec

_QKV_INDEX = {"q": 0, "k": 1, "v": 2}


class ConcatParameter(BasevLLMParameter):
    """A parameter with the shards of a fused layer concatenated along dimension 0, each sliced for this rank by its spec.

    It serves the tensors that SGLang's own classes would slice wrongly: a vector along K for each shard (``pre_quant_scale``),
    low-rank factors, codes packed along N, block scales whose blocks span several output features.
    """

    def __new__(
        cls, spec: TensorSpec, shard_sizes: list[int], k: int, weight_loader: Callable[..., Any]
    ) -> ConcatParameter:
        """Return an unset parameter; see :func:`make_parameter` for the arguments."""
        shapes = [spec.shape(size, k) for size in shard_sizes]
        data = torch.cat([_unset(shape, spec.dtypes[0]) for shape in shapes])
        parameter: ConcatParameter = super().__new__(cls, data=data, weight_loader=weight_loader)
        return parameter

    def __init__(self, spec: TensorSpec, shard_sizes: list[int], k: int, weight_loader: Callable[..., Any]) -> None:
        super().__init__(data=self.data, weight_loader=weight_loader)
        self.spec = spec
        self.shard_sizes = shard_sizes
        self.k = k

    def shard(self, index: int) -> torch.Tensor:
        """Return this rank's part of shard ``index``, a view."""
        lengths = [self.spec.shape(size, self.k)[0] for size in self.shard_sizes]
        part: torch.Tensor = self.data.narrow(0, sum(lengths[:index]), lengths[index])
        return part

    @property
    def output_dim(self) -> int | None:
        """The dimension with one entry per output feature, None without one; read by the loader of embeddings and lm_head."""
        first = self.spec.dims[0]
        return 0 if first.axis == "N" and first.per == 1 else None

    def _load(self, loaded: torch.Tensor, index: int, n_rank: int, k_rank: int) -> None:
        copy_slice(self.spec, loaded, self.shard(index), self.shard_sizes[index], self.k, n_rank, k_rank)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor, tp_rank: int = 0, **_: Any) -> None:
        """Load a layer whose output features are split over the ranks."""
        self._load(loaded_weight, 0, tp_rank, 0)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor, tp_rank: int = 0, **_: Any) -> None:
        """Load a layer whose input features are split over the ranks."""
        self._load(loaded_weight, 0, 0, tp_rank)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, *, shard_id: int, tp_rank: int, **_: Any) -> None:
        """Load one shard of a fused layer whose output features are split over the ranks."""
        self._load(loaded_weight, shard_id, tp_rank, 0)

    def load_qkv_weight(
        self, loaded_weight: torch.Tensor, *, shard_id: str, tp_rank: int, num_heads: int = 1, **_: Any
    ) -> None:
        """Load q, k or v; ``num_heads`` consecutive ranks hold equal key and value heads."""
        self._load(loaded_weight, _QKV_INDEX[shard_id], tp_rank if shard_id == "q" else tp_rank // num_heads, 0)


def copy_slice(
    spec: TensorSpec, loaded: torch.Tensor, target: torch.Tensor, n: int, k: int, n_rank: int, k_rank: int
) -> None:
    """Copy this rank's slice of a stored tensor.

    Args:
        spec: the tensor's spec.
        loaded: the stored tensor, of the whole layer.
        target: this rank's tensor, which is written.
        n, k: output and input features of this rank.
        n_rank, k_rank: the index of this rank's slice along N and along K.

    Raises:
        ValueError: the slice cuts through a block, or does not fit.
    """
    for position, dim in enumerate(spec.dims):
        if dim.axis is None or loaded.shape[position] == target.shape[position]:
            continue
        extent = n if dim.axis == "N" else k
        if extent % dim.per:
            raise ValueError(f"a rank's {dim.axis} = {extent} cuts through blocks of {dim.per}")
        rank = n_rank if dim.axis == "N" else k_rank
        loaded = loaded.narrow(position, rank * target.shape[position], target.shape[position])
    if loaded.shape != target.shape:
        raise ValueError(f"shape {tuple(loaded.shape)} does not fit {tuple(target.shape)}")
    target.copy_(loaded)


class ExpertParameter(torch.nn.Parameter):
    """A parameter with one tensor of all experts of this rank: ``[experts, shards, *shape]``."""

    def __new__(cls, spec: TensorSpec, experts: int, shards: int, n: int, k: int) -> ExpertParameter:
        """Return an unset parameter.

        Args:
            spec: the tensor's spec.
            experts: the number of experts on this rank.
            shards: 2 for gate and up, 1 for down.
            n, k: output and input features of one shard on this rank.

        Raises:
            ValueError: a block does not fit ``n`` or ``k``.
        """
        # Of several types, the widest holds the values of all.
        dtype = max(spec.dtypes, key=lambda dtype: dtype.itemsize)
        data = _unset((experts, shards, *spec.shape(n, k)), dtype)
        parameter: ExpertParameter = torch.nn.Parameter._make_subclass(cls, data, False)
        return parameter

    def __init__(self, spec: TensorSpec, experts: int, shards: int, n: int, k: int) -> None:
        self.spec = spec
        self.n = n
        self.k = k

    def load(self, loaded: torch.Tensor, expert: int, shard: int, n_rank: int, k_rank: int) -> None:
        """Copy one expert's stored tensor, sliced for this rank; a scalar may have the shape ``[1]``."""
        target = self.data[expert, shard]
        if self.spec.is_scalar:
            loaded = loaded.reshape(())
        copy_slice(self.spec, loaded, target, self.n, self.k, n_rank, k_rank)


def make_parameter(
    spec: TensorSpec, shard_sizes: list[int], k: int, weight_loader: Callable[..., Any]
) -> BasevLLMParameter:
    """Return an unset parameter for ``spec`` on this rank.

    Floating-point parameters start as NaN, so that an entry that is never loaded cannot pass for a scale.

    Args:
        spec: the tensor's spec.
        shard_sizes: output features of each shard of the (fused) layer on this rank.
        k: input features on this rank.
        weight_loader: SGLang's loader of the layer.

    Raises:
        ValueError: a block does not fit ``k`` or a shard.
    """
    if spec.is_scalar:
        data = _unset((len(shard_sizes),), spec.dtypes[0])
        parameter = PerTensorScaleParameter(data=data, weight_loader=weight_loader)
        # Without this attribute SGLang's first-generation loaders copy one shard's scale over all.
        parameter.needs_scalar_to_array = True
        return parameter
    n_dim, k_dim = spec.dim_of("N"), spec.dim_of("K")
    if n_dim == 0 and k_dim == 1 and spec.dims[0].per == 1:
        return ModelWeightParameter(
            data=_unset(spec.shape(sum(shard_sizes), k), spec.dtypes[0]),
            input_dim=k_dim,
            output_dim=n_dim,
            weight_loader=weight_loader,
        )
    return ConcatParameter(spec, shard_sizes, k, weight_loader)


def _unset(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=torch.float32).to(dtype)
    return torch.empty(shape, dtype=dtype)


def shard_tensor(spec: TensorSpec, parameter: torch.Tensor, index: int, shard_sizes: list[int]) -> torch.Tensor:
    """Return shard ``index`` of a loaded parameter: a scalar ``[]``, or this rank's part of the shard's tensor."""
    if spec.is_scalar:
        return parameter.data[index]
    if isinstance(parameter, ConcatParameter):
        return parameter.shard(index)
    return parameter.data.narrow(0, sum(shard_sizes[:index]), shard_sizes[index])
