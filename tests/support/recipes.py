"""The storage of weights and the rounding of inputs by recipe, written straight from the definition of the formats.

Independent of the packages under test: nothing here imports them. A further recipe is one row of :data:`RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Math = Literal["exact", "fp8"]
Activation = Literal["recipe", "per_tensor", "per_token", "none", "keep_fp4"]
"""The rounding of an input: by the recipe; to FP8 with one scale per tensor or per token; none; by the recipe except to FP4, like
GPUs before Blackwell."""
Parts = Mapping[str, torch.Tensor]
"""The stored tensors of one linear layer by the last part of their name."""

FP8_MAX = 448.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Weight:
    """``W = units * scale``; units are 4-bit codes times block scales, ``scale`` is the scale of the whole tensor."""

    units: torch.Tensor
    scale: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """Return the weight in float32."""
        return self.units * self.scale


@dataclass(frozen=True)
class Recipe:
    """One ``quant_algo``.

    Attributes:
        group: the block size where the configuration does not say it.
        decode: from the stored tensors and the block size to the weight.
        round_input: from the input and the stored tensors to ``(values, scale)``, input = values * scale.
        tensors: tensors that must be stored, besides a bias.
        optional: tensors that may be stored too.
    """

    group: int
    decode: Callable[[Parts, int], Weight]
    round_input: Callable[[torch.Tensor, Parts], tuple[torch.Tensor, torch.Tensor]]
    tensors: frozenset[str]
    optional: frozenset[str] = frozenset()


def decode_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Return E2M1 codes, two to a byte, the low nibble first: float32 ``[N, K]`` from uint8 ``[N, K / 2]``."""
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=torch.float32)
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1)
    return values[nibbles.long()].flatten(start_dim=1)


def decode_nvfp4(parts: Parts, group: int) -> Weight:
    """Return a weight of E2M1 under E4M3 block scales and one float32 scale."""
    scales = parts["weight_scale"]
    if scales.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weight_scale of an NVFP4 layer is {scales.dtype}")
    units = _times_blocks(decode_fp4(parts["weight"]), scales.to(torch.float32), group)
    return Weight(units, _scalar(parts["weight_scale_2"]))


def decode_mxfp4(parts: Parts, group: int) -> Weight:
    """Return a weight of E2M1 under block scales that are powers of two, stored as the exponent + 127 in a byte.

    The tensor's scale is the power of two that puts the largest block just inside the range of E4M3.
    """
    exponents = parts["weight_scale"]
    if exponents.dtype != torch.uint8:
        raise ValueError(f"weight_scale of an MXFP4 layer is {exponents.dtype}")
    exponents = exponents.to(torch.float32) - 127.0
    shift = exponents.max() - 6.0
    return Weight(_times_blocks(decode_fp4(parts["weight"]), torch.exp2(exponents - shift), group), torch.exp2(shift))


def round_static_fp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to E4M3 under the stored ``input_scale``, saturating."""
    scale = _scalar(parts["input_scale"])
    return to_e4m3(x / scale), scale


def round_token_fp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to E4M3 under one scale per token: the largest magnitude of the row / 448."""
    return _round_by_amax(x, x.abs().amax(dim=-1, keepdim=True))


def round_static_or_token_fp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round by the static scale of a calibrated layer (also by a KV cache's calibration run), else by token."""
    return (round_static_fp8 if "input_scale" in parts else round_token_fp8)(x, parts)


def round_tensor_fp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to E4M3 under one dynamic scale for all tokens, like ModelOpt's simulation of W4A8_MXFP4_FP8."""
    return _round_by_amax(x, x.abs().amax())


def round_block_fp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to E4M3 under one scale per token and 128 inputs: the largest magnitude of these / 448."""
    blocks = x.view(*x.shape[:-1], -1, 128)
    values, scale = _round_by_amax(blocks, blocks.abs().amax(dim=-1, keepdim=True))
    return (values * scale).view(x.shape), torch.ones(())


def round_nothing(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input unchanged."""
    return x, torch.ones(())


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest E4M3 value, ties to even, saturating at 448."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def _round_by_amax(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.where(amax > 0, amax / FP8_MAX, torch.ones_like(amax))
    return to_e4m3(x / scale), scale


def _times_blocks(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    n, k = codes.shape
    if scales.shape != (n, k // group) or k % group:
        raise ValueError(f"block scales {list(scales.shape)} for a weight {[n, k]} in groups of {group}")
    return (codes.view(n, k // group, group) * scales.unsqueeze(-1)).view(n, k)


def _scalar(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() != 1:
        raise ValueError(f"a scalar has shape {list(tensor.shape)}")
    return tensor.to(torch.float32).reshape(())


def decode_fp8(parts: Parts, group: int) -> Weight:
    """Return a weight of E4M3 codes under one float32 scale, or one for each output feature."""
    scale = parts["weight_scale"].to(torch.float32)
    return Weight(_fp8_codes(parts), scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))


def decode_fp8_blocks(parts: Parts, group: int) -> Weight:
    """Return a weight of E4M3 codes under float32 scales of 128 x 128 tiles, stored ``[N / 128, 1, K / 128, 1]``."""
    codes = _fp8_codes(parts)
    scales = parts["weight_scale"].to(torch.float32)[:, 0, :, 0]
    rows = torch.arange(codes.shape[0]) // 128
    columns = torch.arange(codes.shape[1]) // 128
    return Weight(codes * scales[rows][:, columns], torch.ones(()))


def decode_mxfp8(parts: Parts, group: int) -> Weight:
    """Return a weight of E4M3 codes under powers of two, stored as the exponent + 127 in a byte."""
    exponents = parts["weight_scale"].to(torch.float32) - 127.0
    return Weight(_times_blocks(_fp8_codes(parts), torch.exp2(exponents), group), torch.ones(()))


def decode_int8(parts: Parts, group: int) -> Weight:
    """Return a weight of INT8 codes under one float32 scale for each output feature."""
    return Weight(parts["weight"].to(torch.float32), parts["weight_scale"].to(torch.float32).reshape(-1, 1))


def decode_int4(parts: Parts, group: int) -> Weight:
    """Return a weight of signed 4-bit codes under float32 block scales; of two outputs in a byte the even one is low."""
    packed = parts["weight"].to(torch.int32)
    codes = torch.empty(2 * packed.shape[0], packed.shape[1])
    for parity, nibbles in enumerate((packed & 15, packed >> 4)):
        codes[parity::2] = torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.float32)
    return Weight(_times_blocks(codes, parts["weight_scale"], group), torch.ones(()))


def round_static_int8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to integers under the stored ``input_scale``, saturating."""
    scale = _scalar(parts["input_scale"])
    return (x / scale).round().clamp(-128, 127), scale


def round_nvfp4(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to E2M1 in blocks of 16 under dynamic E4M3 scales and the stored ``input_scale``."""
    scale = _scalar(parts["input_scale"])
    blocks = x.view(*x.shape[:-1], -1, 16) / scale
    steps = to_e4m3(blocks.abs().amax(dim=-1, keepdim=True) / 6.0)
    values = _nearest_fp4(blocks / torch.where(steps == 0, torch.inf, steps))
    return (values * steps).view(x.shape), scale


def round_mxfp4(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to E2M1 in blocks of 32 under powers of two, ties to even (unlike ModelOpt's MXFP4 weights)."""
    blocks = x.view(*x.shape[:-1], -1, 32)
    steps = _power_of_two(blocks.abs().amax(dim=-1, keepdim=True) / 6.0)
    return (_nearest_fp4(blocks / steps) * steps).view(x.shape), torch.ones(())


def round_mxfp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to E4M3 in blocks of 32 under powers of two."""
    blocks = x.view(*x.shape[:-1], -1, 32)
    steps = _power_of_two(blocks.abs().amax(dim=-1, keepdim=True) / FP8_MAX)
    return (to_e4m3(blocks / steps) * steps).view(x.shape), torch.ones(())


def _power_of_two(ratio: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two that is at least ``ratio``; 1 for zero."""
    mantissa, exponent = torch.frexp(ratio)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(ratio > 0, torch.exp2(exponent.to(torch.float32)), 1.0)


def _nearest_fp4(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest E2M1 value, saturating at 6; ties to the even code."""
    values = torch.tensor(FP4_VALUES)
    middles = (values[1:] + values[:-1]) / 2
    magnitude = x.abs().contiguous()
    code = torch.bucketize(magnitude, middles)  # a tie stays at the lower code
    tie = (magnitude.unsqueeze(-1) == middles).any(dim=-1)
    code = code + (tie & (code % 2 == 1)).long()
    return torch.copysign(values[code], x)


def _fp8_codes(parts: Parts) -> torch.Tensor:
    if parts["weight"].dtype != torch.float8_e4m3fn:
        raise ValueError(f"weight of an FP8 layer is {parts['weight'].dtype}")
    return parts["weight"].to(torch.float32)


_WEIGHT = frozenset({"weight", "weight_scale"})
_NVFP4 = _WEIGHT | {"weight_scale_2"}
_INPUT = frozenset({"input_scale"})
RECIPES: dict[str, Recipe] = {
    "W4A8_NVFP4_FP8": Recipe(32, decode_nvfp4, round_static_fp8, _NVFP4 | _INPUT),
    "W4A8_MXFP4_FP8": Recipe(32, decode_mxfp4, round_static_or_token_fp8, _WEIGHT, optional=_INPUT),
    "W4A8_AWQ": Recipe(128, decode_int4, round_static_fp8, _NVFP4 | _INPUT),
    "W4A16_AWQ": Recipe(128, decode_int4, round_nothing, _WEIGHT),
    "NVFP4": Recipe(16, decode_nvfp4, round_nvfp4, _NVFP4 | _INPUT),
    "NVFP4_AWQ": Recipe(16, decode_nvfp4, round_nvfp4, _NVFP4 | _INPUT),
    "NVFP4_SVD": Recipe(16, decode_nvfp4, round_nvfp4, _NVFP4 | _INPUT),
    "W4A16_NVFP4": Recipe(16, decode_nvfp4, round_nothing, _NVFP4),
    "MXFP4": Recipe(32, decode_mxfp4, round_mxfp4, _WEIGHT),
    "MXFP8": Recipe(32, decode_mxfp8, round_mxfp8, _WEIGHT),
    "FP8": Recipe(0, decode_fp8, round_static_fp8, _WEIGHT | _INPUT),
    "FP8 weights": Recipe(0, decode_fp8, round_nothing, _WEIGHT),
    "FP8_PER_CHANNEL_PER_TOKEN": Recipe(0, decode_fp8, round_token_fp8, _WEIGHT),
    "FP8_PB_WO": Recipe(0, decode_fp8_blocks, round_nothing, _WEIGHT),
    "FP8_BLOCK_SCALES": Recipe(0, decode_fp8_blocks, round_block_fp8, _WEIGHT),
    "W8A8_SQ_PER_CHANNEL": Recipe(0, decode_int8, round_static_int8, _WEIGHT | _INPUT),
    "W8A16": Recipe(0, decode_int8, round_nothing, _WEIGHT),
}
"""By ``quant_algo`` in upper case. MXFP4 stands for the recipe that rounds activations, "FP8 weights" for a weight-only head,
FP8_BLOCK_SCALES for FP8_PB_WO as SGLang serves it."""

FP4_ROUNDINGS = (round_nvfp4, round_mxfp4)

OPTIONAL = frozenset({"bias", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"})
"""Optional tensors of every quantized layer; the low-rank factors have either of two names."""

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor, Parts], tuple[torch.Tensor, torch.Tensor]]] = {
    "per_tensor": round_tensor_fp8,
    "per_token": round_token_fp8,
    "none": round_nothing,
}
