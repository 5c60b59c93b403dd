"""FP8 (E4M3) weights under float32 scales per tensor, per output channel or per 128 x 128 block, and FP8 activations.

Sources: ``torch/export/quant_utils.py``, ``torch/quantization/qtensor/fp8_tensor.py`` and
``torch/quantization/tensor_quant.py`` of ModelOpt 0.47.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from . import e4m3
from .base import ActivationFormat, DecodedWeight, Dim, NumberType, TensorSpec, ValueRule, WeightFormat
from .checks import check_activation, check_weight, divide, positive_amax, static_scale

BLOCK = 128
FP8 = NumberType("e4m3")
"""E4M3 without block scales: weights per tensor and per channel, and activations."""
FP8_BLOCKS = NumberType("e4m3", (BLOCK, BLOCK), "float32")
"""E4M3 weights in square blocks."""

_CODES = TensorSpec("weight", (torch.float8_e4m3fn,), (Dim("N"), Dim("K")), ValueRule.FINITE)


class FP8PerTensorWeight(WeightFormat):
    """``weight`` e4m3 ``[N, K]`` and one ``weight_scale`` float32 ``[]`` = amax / 448, as quant_algo FP8 exports."""

    name = "fp8"
    number_type = FP8
    output_scale = "weight_scale"
    exact_in_bf16 = True

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale``."""
        return (_CODES, TensorSpec("weight_scale", (torch.float32,), (), ValueRule.POSITIVE))

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = codes, out scale = the scale."""
        scale = tensors["weight_scale"].to(torch.float32).reshape(())
        return DecodedWeight(e4m3.decode(tensors["weight"]), scale)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of an export of ``weight`` ``[N, K]``, bit for bit.

        The division by the scalar scale is rounded to the dtype of ``weight`` before it is rounded to E4M3: that is
        what ``to_quantized_weight`` computes for a bf16 model. Shards of a fused layer do not share a scale here.

        Raises:
            ValueError: the weight is not a finite matrix, or all zero (ModelOpt then exports 0 / 0 = NaN).
        """
        check_weight(weight)
        scale = divide(weight.abs().amax().to(torch.float32), e4m3.MAX)
        if not bool(scale > 0):
            raise ValueError("an all-zero weight has no FP8 export: its scale is zero")
        rounded = (weight.to(torch.float32) / scale).to(weight.dtype)
        return {"weight": e4m3.to_e4m3(rounded), "weight_scale": scale}


class FP8PerChannelWeight(WeightFormat):
    """``weight`` e4m3 ``[N, K]`` and ``weight_scale`` float32 ``[N]``, as FP8_PER_CHANNEL_PER_TOKEN exports."""

    name = "fp8_per_channel"
    number_type = FP8
    output_scale = "weight_scale"
    exact_in_bf16 = True

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale``."""
        return (_CODES, TensorSpec("weight_scale", (torch.float32,), (Dim("N"),), ValueRule.POSITIVE))

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = codes, out scale = the scales ``[N, 1]``."""
        return DecodedWeight(e4m3.decode(tensors["weight"]), tensors["weight_scale"].to(torch.float32).unsqueeze(1))

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of an export of ``weight`` ``[N, K]``, bit for bit; an all-zero channel has scale 1.

        Raises:
            ValueError: the weight is not a finite matrix.
        """
        check_weight(weight)
        scale = divide(positive_amax(weight.abs().amax(dim=1), e4m3.MAX), e4m3.MAX)
        return {"weight": e4m3.to_e4m3(weight / scale.unsqueeze(1)), "weight_scale": scale}


class FP8BlockWeight(WeightFormat):
    """``weight`` e4m3 ``[N, K]`` and ``weight_scale`` float32 ``[ceil(N / 128), 1, ceil(K / 128), 1]``, as fp8_pb_wo.

    Edge blocks are short where 128 does not divide N or K.
    """

    name = "fp8_block"
    number_type = FP8_BLOCKS
    exact_in_bf16 = False

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale``."""
        rows, columns = Dim("N", BLOCK, partial=True), Dim("K", BLOCK, partial=True)
        dims = (rows, Dim(None), columns, Dim(None))
        return (_CODES, TensorSpec("weight_scale", (torch.float32,), dims, ValueRule.POSITIVE))

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read one shard: unit = code * block scale, rounded to float32; out scale = 1."""
        codes = e4m3.decode(tensors["weight"])
        unit = codes * _spread(tensors["weight_scale"].to(torch.float32), *codes.shape)
        return DecodedWeight(unit, unit.new_ones(()))

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of an export of ``weight`` ``[N, K]``, bit for bit; an all-zero block has scale 1.

        Raises:
            ValueError: the weight is not a finite matrix.
        """
        check_weight(weight)
        n, k = weight.shape
        padded = pad(weight.abs(), (0, -k % BLOCK, 0, -n % BLOCK))
        tiles = torch.unflatten(torch.unflatten(padded, 1, (-1, BLOCK)), 0, (-1, BLOCK))
        scale = divide(positive_amax(tiles.amax(dim=(1, 3), keepdim=True), e4m3.MAX), e4m3.MAX)
        return {"weight": e4m3.to_e4m3(weight / _spread(scale, n, k)), "weight_scale": scale}


def _spread(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return block scales ``[n / 128, 1, k / 128, 1]`` repeated to ``[n, k]``."""
    full = scale.squeeze(3).squeeze(1).repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return full[:n, :k]


class FP8StaticPerTensor(ActivationFormat):
    """E4M3 under the static ``input_scale`` = amax / 448: ``e4m3(x * (1 / input_scale))``.

    Follows ``_fp8_eager``: what exceeds 448 saturates, infinity included; NaN stays NaN.
    """

    name = "fp8_static"
    number_type = FP8
    row_scale = "static"
    calibrated_range = e4m3.MAX

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """``input_scale``."""
        return (TensorSpec("input_scale", (torch.float32,), (), ValueRule.POSITIVE),)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return E4M3 values in float32 ``[M, K]`` and the scale, ``[]`` or ``[M, 1]``. Raises ValueError without a scale."""
        check_activation(x)
        input_scale = static_scale(scale, x.shape[0])
        return e4m3.round_to_e4m3(x * (1 / input_scale)), input_scale


class FP8DynamicPerToken(ActivationFormat):
    """E4M3 under a dynamic scale for each token, amax / 448, and 1 for an all-zero token.

    A token that holds NaN or infinity becomes NaN as a whole: infinity has no scale, and saturating it would hide it.
    ``_fp8_eager`` also zeroes tokens whose amax is at most 2^-24, a guard of the simulation that deployed kernels lack.
    """

    name = "fp8_per_token"
    number_type = FP8
    row_scale = "token"

    def token_amax(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``max |x|`` of each token, ``[M, 1]``."""
        return x.abs().amax(dim=1, keepdim=True)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return E4M3 values in float32 ``[M, K]`` and the scales ``[M, 1]``.

        Args:
            x: float32 ``[M, K]``.
            scale: the tokens' amax ``[M, 1]`` where ``x`` is a slice of them, None where it is all of them.

        Raises:
            ValueError: ``scale`` has another shape.
        """
        check_activation(x)
        amax = self.token_amax(x)
        if scale is not None:
            if scale.shape != amax.shape:
                raise ValueError(
                    f"the amax of {x.shape[0]} tokens has shape {list(amax.shape)}, not {list(scale.shape)}"
                )
            # A maximum over ranks may lose a NaN; a slice that holds one must stay NaN.
            amax = torch.where(torch.isfinite(amax), scale, torch.nan)
        row_scale = amax_scale(amax, e4m3.MAX)
        return e4m3.round_to_e4m3(x * (1 / row_scale)), row_scale


def amax_scale(amax: torch.Tensor, maxbound: float) -> torch.Tensor:
    """Return ``amax / maxbound`` for each token, float32 ``[M, 1]``, which has an inverse.

    1 for an all-zero token, NaN for one that holds NaN or infinity, and never below the smallest normal float32.
    """
    scale = divide(amax, maxbound).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(torch.isfinite(amax), scale, torch.nan)
