"""Decoding of single rows of a packed weight: the lookup in a quantized embedding."""

from __future__ import annotations

import torch

from .launch import decode_into, descale
from .packing import PackedWeight, check_kind, unpack


@torch.library.custom_op("modelopt_ext::block_scaled_rows", mutates_args=())
def _block_scaled_rows(
    codes: torch.Tensor, scale: torch.Tensor, out_scale: torch.Tensor, kind: str, group: int, indices: torch.Tensor
) -> torch.Tensor:
    # Indexing is not implemented for E4M3 on every device.
    picked_scale = scale.view(torch.uint8)[indices].view(scale.dtype) if scale.itemsize == 1 else scale[indices]
    picked = PackedWeight(codes[indices], picked_scale, out_scale[indices], check_kind(kind), group)
    if not codes.is_cuda:
        return unpack(picked).to(torch.float32) * picked.out_scale.unsqueeze(1)
    unit = torch.empty((indices.shape[0], picked.k), dtype=torch.float16, device=codes.device)
    if indices.shape[0]:
        decode_into(picked, 0, unit)
    if picked.kind == "int4_float":
        values = unit.to(torch.float32).unflatten(1, (-1, picked.group)) * picked.scale.unsqueeze(2)
        return values.flatten(1) * picked.out_scale.unsqueeze(1)
    return unit.to(torch.float32) * descale(picked.kind, True) * picked.out_scale.unsqueeze(1)


@_block_scaled_rows.register_fake
def _(
    codes: torch.Tensor, scale: torch.Tensor, out_scale: torch.Tensor, kind: str, group: int, indices: torch.Tensor
) -> torch.Tensor:
    del scale, out_scale, kind, group
    return codes.new_empty((indices.shape[0], 4 * codes.shape[1]), dtype=torch.float32)


def block_scaled_rows(weight: PackedWeight, indices: torch.Tensor) -> torch.Tensor:
    """Return rows of the weight, fp32 ``[..., K]``, for indices ``[...]``; exact but for INT4's scales. No host sync."""
    flat = indices.reshape(-1)
    rows: torch.Tensor = _block_scaled_rows(
        weight.codes, weight.scale, weight.out_scale, weight.kind, weight.group, flat
    )
    return rows.reshape(*indices.shape, weight.k)
