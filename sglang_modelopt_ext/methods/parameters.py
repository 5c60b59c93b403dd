"""From a :class:`TensorSpec` to the SGLang parameter class that slices and loads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.parameter import BasevLLMParameter, ModelWeightParameter, PerTensorScaleParameter

from sglang_modelopt_kernels.formats.base import TensorSpec


def make_parameter(
    spec: TensorSpec, shard_sizes: list[int], k: int, weight_loader: Callable[..., Any]
) -> BasevLLMParameter:
    """An empty parameter for ``spec`` on this rank.

    Floating-point parameters start as NaN: what is never loaded can then not pass for a scale.

    Args:
        spec: the tensor's declaration.
        shard_sizes: output features of each shard of the (fused) layer on this rank.
        k: input features on this rank.
        weight_loader: SGLang's loader of the layer.

    Raises:
        ValueError: a block does not fit ``k`` or a shard.
    """
    dtype = spec.dtypes[0]
    if spec.is_scalar:
        parameter = PerTensorScaleParameter(data=_unset((len(shard_sizes),), dtype), weight_loader=weight_loader)
        # Read by SGLang's first-generation loaders, which would otherwise copy one shard's scale over all.
        parameter.needs_scalar_to_array = True
        return parameter
    for size in shard_sizes:
        spec.shape(size, k)
    n_dim, k_dim = spec.dim_of("N"), spec.dim_of("K")
    if n_dim is None or k_dim is None:
        raise NotImplementedError(f"no SGLang parameter class for {spec}")
    return ModelWeightParameter(
        data=_unset(spec.shape(sum(shard_sizes), k), dtype),
        input_dim=k_dim,
        output_dim=n_dim,
        weight_loader=weight_loader,
    )


def _unset(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=torch.float32).to(dtype)
    return torch.empty(shape, dtype=dtype)


def shard_tensor(spec: TensorSpec, parameter: torch.Tensor, index: int, shard_sizes: list[int]) -> torch.Tensor:
    """Shard ``index`` of a loaded parameter: a scalar ``[]`` or its rows."""
    if spec.is_scalar:
        return parameter[index]
    n_dim = spec.dim_of("N")
    assert n_dim is not None
    per = spec.dims[n_dim].per
    return parameter.narrow(n_dim, sum(shard_sizes[:index]) // per, shard_sizes[index] // per)
