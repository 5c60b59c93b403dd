"""Checks of a stored tensor's values against its :class:`ValueRule`, before anything is multiplied with it."""

from __future__ import annotations

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats.base import ValueRule

_FLOAT32_TINY = torch.finfo(torch.float32).tiny


def check_values(where: object, name: str, tensor: torch.Tensor, rule: ValueRule) -> None:
    """Raise ModelOptExtError naming ``where`` and ``name`` when ``tensor`` is empty or an entry breaks ``rule``."""
    if tensor.numel() == 0:
        raise ModelOptExtError.at(where, name, "at least one entry", f"shape {list(tensor.shape)}")
    if rule is ValueRule.BLOCK_SCALE_E4M3:
        _check_e4m3(where, name, tensor)
    elif rule is ValueRule.BLOCK_SCALE_UE8M0:
        if bool((tensor.view(torch.uint8) == 255).any()):
            raise ModelOptExtError.at(where, name, "ue8m0 exponents 0..254", "255 (NaN)")
    elif rule is ValueRule.FINITE and tensor.dtype == torch.float8_e4m3fn:
        if bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise ModelOptExtError.at(where, name, "finite e4m3 values", "NaN")
    elif rule in (ValueRule.POSITIVE, ValueRule.FINITE):
        _check_float(where, name, tensor.float(), rule)


def _check_e4m3(where: object, name: str, tensor: torch.Tensor) -> None:
    # Compare bytes: nothing is converted, and the signs of NaN and zero stay visible. 0x7f and 0xff are E4M3's only NaNs.
    raw = tensor.view(torch.uint8)
    if bool(((raw & 0x7F) == 0x7F).any()):
        raise ModelOptExtError.at(where, name, "finite e4m3 block scales", "NaN")
    if bool((raw > 0x80).any()):
        raise ModelOptExtError.at(where, name, "block scales of zero or more", "a negative one")


def _check_float(where: object, name: str, tensor: torch.Tensor, rule: ValueRule) -> None:
    expected = "finite values" if rule is ValueRule.FINITE else "finite, positive, normal float32 values"
    bad = ~torch.isfinite(tensor)
    if rule is ValueRule.POSITIVE:
        bad |= tensor < _FLOAT32_TINY
    if bool(bad.any()):
        raise ModelOptExtError.at(where, name, expected, tensor[bad].flatten()[0].item())


def check_zero_blocks(where: object, name: str, codes: torch.Tensor, block_scale: torch.Tensor) -> None:
    """Raise ModelOptExtError where a zero E4M3 block scale lies over codes that are not all zero: those values would be lost.

    Args:
        where: file or layer named in the error.
        name: the block-scale tensor named in the error.
        codes: packed 4-bit codes, uint8 ``[N, K/2]``.
        block_scale: E4M3 ``[N, K/block]``.
    """
    zero = block_scale.view(torch.uint8) & 0x7F == 0
    if not bool(zero.any()):
        return
    # 0x77 masks the sign bits of both codes of a byte, since -0 is zero too.
    used = (codes & 0x77).view(*block_scale.shape, -1).any(dim=-1)
    if bool((zero & used).any()):
        raise ModelOptExtError.at(where, name, "a zero block scale only over all-zero codes", "one over non-zero codes")
