"""NVFP4: E2M1 codes, E4M3 block scales, one float32 global scale: ``W = code * weight_scale * weight_scale_2``.

Sources: ``NVFP4QTensor`` (``torch/quantization/qtensor/nvfp4_tensor.py``) and ``get_weight_scaling_factor[_2]``
(``torch/export/quant_utils.py``) of ModelOpt 0.47; NVIDIA's NVFP4 has blocks of 16, ModelOpt also exports blocks of 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e2m1, e4m3
from .base import (
    ActivationFormat,
    BlockActivation,
    BlockWeight,
    DecodedWeight,
    Dim,
    NumberType,
    SearchedWeightFormat,
    TensorSpec,
    ValueRule,
)
from .checks import block_amax, check_activation, divide, scale_blocks, split_blocks, static_scale

FULL_RANGE = e2m1.MAX * e4m3.MAX
"""2688, the largest code times the largest block scale: the block scales use all of E4M3."""

FP8_RANGE = e4m3.MAX
"""448: code times block scale stays in the range of E4M3, for kernels that turn the weight into FP8."""

NEIGHBOURS = (-1, 1, -2, 2, -3, 3, 4, 5)
"""Where a block's best scale is searched for, in steps of E4M3 from a max calibration's: from about 3/4 of it to 3/2, under which
the largest element is a 4 and not a 6."""

NVFP4 = NumberType("e2m1", (1, 16), "e4m3")
"""NVIDIA's NVFP4, the one of FP4 matrix instructions."""
NVFP4_BLOCK32 = NumberType("e2m1", (1, 32), "e4m3")
"""ModelOpt's NVFP4 in blocks of 32: two blocks of 16 with one scale."""


class NVFP4Weight(SearchedWeightFormat):
    """``weight`` uint8 ``[N, K / 2]``, ``weight_scale`` e4m3 ``[N, K / g]`` and ``weight_scale_2`` float32 ``[]``.

    Code times block scale has at most 2 + 4 significant bits, so that the unit weight is exact in bf16 and in fp16.

    Args:
        name: registry name.
        group_size: g, 16 or 32.
        unit_max: what code times block scale reaches, which fixes the global scale as ``amax / unit_max``. Only
            :meth:`quantize` depends on it: 2688 for every recipe but W4A8_NVFP4_FP8, which uses 448.
    """

    output_scale = "weight_scale_2"
    exact_in_bf16 = True

    def __init__(self, name: str, group_size: int, unit_max: float) -> None:
        if group_size not in (16, 32):
            raise ValueError(f"NVFP4 has blocks of 16 or 32, not {group_size}")
        self.name = name
        self.number_type = NumberType("e2m1", (1, group_size), "e4m3")
        self.unit_max = unit_max

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight``, ``weight_scale`` and ``weight_scale_2``."""
        block = Dim("K", self.group_size)
        return (
            TensorSpec("weight", (torch.uint8,), (Dim("N"), Dim("K", 2)), ValueRule.CODES),
            TensorSpec("weight_scale", (torch.float8_e4m3fn,), (Dim("N"), block), ValueRule.BLOCK_SCALE_E4M3),
            TensorSpec("weight_scale_2", (torch.float32,), (), ValueRule.POSITIVE),
        )

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = code * block scale, out scale = the global scale."""
        values = e2m1.decode(e2m1.unpack_codes(tensors["weight"]))
        unit = scale_blocks(values, e4m3.decode(tensors["weight_scale"]))
        return DecodedWeight(unit, tensors["weight_scale_2"].to(torch.float32).reshape(()))

    def blocks(self, tensors: Mapping[str, torch.Tensor]) -> BlockWeight:
        """Return the codes and scales of one shard; out scale = the global scale."""
        out_scale = tensors["weight_scale_2"].to(torch.float32).reshape(())
        codes = e2m1.unpack_codes(tensors["weight"])
        return BlockWeight(codes, tensors["weight_scale"], out_scale, "e2m1", self.group_size)

    def scales(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return ``weight_scale`` and ``weight_scale_2`` of a max-calibrated export of ``weight`` ``[N, K]``.

        Args:
            weight: in the dtype of the model.
            amax: float32 ``[]``. ModelOpt gives q, k and v, and gate and up, the largest of their global scales: the largest
                magnitude of all of them. None for that of ``weight``.

        Raises:
            ValueError: everything is zero. An export then holds NaN block scales, because ModelOpt divides by the global scale.
        """
        largest = weight.abs().amax().to(torch.float32) if amax is None else amax
        global_scale = divide(largest, self.unit_max)
        if not bool(global_scale > 0):
            raise ValueError("an all-zero weight has no NVFP4 export: its global scale is zero")
        block_scale = _weight_block_scale(block_amax(weight, self.group_size), global_scale)
        return {"weight_scale": block_scale, "weight_scale_2": global_scale}

    def encode(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``weight`` and the scales of a finite ``weight`` ``[N, K]``: ties round to even."""
        block_scale, global_scale = scales["weight_scale"], scales["weight_scale_2"]
        step = block_scale.to(torch.float32) * global_scale
        codes = e2m1.encode(split_blocks(weight, self.group_size) / step.unsqueeze(-1)).flatten(-2)
        return {"weight": e2m1.pack_codes(codes), "weight_scale": block_scale, "weight_scale_2": global_scale}

    def candidates(self, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the :data:`NEIGHBOURS` of a block scale in E4M3, none of them zero.

        None is larger than the largest one that a max calibration has, so that code times block scale stays in
        :attr:`unit_max`.
        """
        codes = scale.view(torch.uint8).to(torch.int16)
        largest = torch.tensor(self.unit_max / e2m1.MAX).to(torch.float8_e4m3fn).view(torch.uint8).item()
        # Positive E4M3 numbers are in the order of their bytes.
        found = ((codes + step).clamp(1, int(largest)).to(torch.uint8) for step in NEIGHBOURS)
        return tuple(code.view(torch.float8_e4m3fn) for code in found)


def _weight_block_scale(amax: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Return the block scales of ``_cast_per_block_scale_to_fp8``: never zero for a block that is not, and 1 for one that is."""
    scale = amax / (e2m1.MAX * global_scale)
    scale = torch.where(scale == 0, 1.0, scale)
    return scale.clamp(e4m3.SMALLEST_SUBNORMAL, e4m3.MAX).to(torch.float8_e4m3fn)


def round_unit_to_e4m3(decoded: DecodedWeight) -> DecodedWeight:
    """Return the weight of the ``fp8`` numerics: the unit weight rounded to E4M3, as TensorRT-LLM's W4A8 kernels round it.

    E4M3 keeps 4 of the up to 6 significant bits of code times block scale, changing about a quarter of the weights.

    Raises:
        ValueError: the unit weight exceeds 448, as under a global scale of amax / 2688, and would be clipped.
    """
    if bool((decoded.unit.abs() > e4m3.MAX).any()):
        raise ValueError("code times block scale exceeds 448: only a W4A8_NVFP4_FP8 export fits the range of E4M3")
    return DecodedWeight(e4m3.round_to_e4m3(decoded.unit), decoded.out_scale)


class NVFP4DynamicBlock(ActivationFormat):
    """Blocks of 16 inputs in E2M1, with dynamic E4M3 block scales under the static ``input_scale`` = amax / 2688.

    Follows ``fp8_quantize_scale`` and ``fp4_round_magnitude`` of ModelOpt 0.47
    (``torch/kernels/quantization/common/nvfp4_quant.py``): a block scale rounds to nearest, saturates at 448 and may
    become zero, and with it the block. ``fp4_fake_quant_block`` also zeroes blocks whose scale is below 1e-5 in
    absolute terms, a guard of the simulation against division by zero that deployed kernels lack.
    A block that holds NaN or infinity becomes NaN.
    """

    name = "nvfp4_dynamic"
    number_type = NVFP4
    row_scale = "static"
    calibrated_range = FULL_RANGE
    block = 16

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``input_scale``."""
        return (TensorSpec("input_scale", (torch.float32,), (), ValueRule.POSITIVE),)

    def encode(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and block scales of float32 ``x`` ``[M, K]``.

        Args:
            x: float32 ``[M, K]``.
            scale: the static ``input_scale``, float32 ``[]`` or ``[M, 1]``.

        Returns:
            ``(codes, block_scale)``: uint8 ``[M, K]``, one code to a byte, and e4m3 ``[M, K / 16]``, NaN for a block
            that holds NaN or infinity. ``x ~ code * block_scale * scale``.

        Raises:
            ValueError: ``x`` is not float32 ``[M, K]`` with K a multiple of 16.
        """
        check_activation(x, self.block)
        amax = block_amax(x, self.block)
        ratio = torch.where(torch.isfinite(amax), amax / (e2m1.MAX * scale), torch.nan)
        block_scale = e4m3.to_e4m3(ratio)
        step = block_scale.to(torch.float32) * scale
        step = torch.where(step == 0, torch.inf, step)  # the block is zero: give it code 0
        codes = e2m1.encode(split_blocks(x, self.block) / step.unsqueeze(-1)).flatten(-2)
        return codes, block_scale

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return values code * block scale, float32 ``[M, K]``, and the ``input_scale``, ``[]`` or ``[M, 1]``.

        Raises as :meth:`encode`.
        """
        input_scale = static_scale(scale, x.shape[0])
        codes, block_scale = self.encode(x, input_scale)
        return scale_blocks(e2m1.decode(codes), block_scale.to(torch.float32)), input_scale

    def blocks(self, x: torch.Tensor, scale: torch.Tensor | None) -> BlockActivation:
        """Return packed codes, E4M3 block scales and the ``input_scale``. Raises as :meth:`encode`."""
        input_scale = static_scale(scale, x.shape[0])
        codes, block_scale = self.encode(x, input_scale)
        return BlockActivation(e2m1.pack_codes(codes), block_scale, input_scale)
