"""FlashInfer's CUTLASS kernels for a layer of experts on Blackwell, for recipes with block scales on both sides.

The input of the layer is rounded here, bit for bit as the recipe says, where all experts share its scale. Where they do not, and
always before the down projection, FlashInfer rounds: by the recipe's formula, but with reciprocals instead of quotients
(approximate ones, unless FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH is 1), so that a value within some 2^-22 of the middle between two
codes may get the other one. FlashInfer rounds to the model's type after the first product, after the gated activation, and after
each expert's second product, whose weighted sum is float32 (``doActivationKernel`` and ``finalizeMoeRoutingKernel`` of its
``cutlass_fused_moe_kernels.cuh``).
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.base import ShardWeight, describe_operands, one_scale, round_to_blocks
from sglang_modelopt_ext.backends.experts.fused import FusedExperts, FusedRequest, StoredExperts
from sglang_modelopt_ext.backends.linear.flashinfer import PACKAGE, both_sides
from sglang_modelopt_ext.backends.packages import package_objection
from sglang_modelopt_ext.device import Device
from sglang_modelopt_kernels.formats.base import ActivationFormat
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8, MXFP8Dynamic
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4DynamicBlock
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle

FOUR_OVER_SIX = "FLASHINFER_NVFP4_4OVER6"
"""FlashInfer's environment variable that changes how NVFP4 activations are rounded."""


@dataclass(frozen=True)
class CutlassWeights:
    """Both products of all experts as ``cutlass_fused_moe`` reads them; the rows of gate_up are up above gate.

    Attributes:
        gate_up, down: codes as stored, ``[E, N, ..]``.
        gate_up_scale, down_scale: block scales, uint8, swizzled for each expert.
        gate_up_alpha, down_alpha: the scale of the output, float32 ``[E]``.
        gate_up_input, down_input: the reciprocal of the input's scale, float32: ``[]`` if the experts have one, else ``[E]``. None
            for activations without a static scale.
        input_scale: the scale of what both gate and up read, float32 ``[]``; None unless all experts have that one.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor
    gate_up_alpha: torch.Tensor
    down_alpha: torch.Tensor
    gate_up_input: torch.Tensor | None = None
    down_input: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None


class CutlassExperts(FusedExperts[CutlassWeights]):
    """A layer of experts in ``flashinfer.fused_moe.cutlass_fused_moe``, for one format of weights and activations."""

    activation: ActivationFormat
    """Format of the activations of both products; the weights are of its number type."""
    capabilities: tuple[int, ...]
    multiples: tuple[int, int]
    """The numbers that the hidden and the intermediate size must be multiples of."""

    def supports(self, request: FusedRequest) -> str | None:
        """Support its formats, GPUs and sizes in bf16 and float16 models, without smoothing or weighted inputs."""
        asked = request.gate_up
        if not asked.target.is_one_of(*self.capabilities):
            return f"is for {', '.join(Device.cuda(capability).name for capability in self.capabilities)}"
        for scheme in (asked.scheme, request.down.scheme):
            if not both_sides(scheme, self.activation.number_type):
                return f"does not multiply {describe_operands(scheme)}"
            if scheme.smoothing:
                return "does not smooth its input"
        if asked.dtype not in (torch.float16, torch.bfloat16):
            return f"has no {asked.dtype} output"
        if asked.k % self.multiples[0] or request.down.k % self.multiples[1]:
            hidden, inner = self.multiples
            return f"needs sizes in {hidden}s and {inner}s, not hidden {asked.k} and intermediate {request.down.k}"
        if request.weights_input:
            return "weights what experts return, not what they read"
        return package_objection(PACKAGE, asked.packages)

    def run(
        self, prepared: CutlassWeights, x: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Implement :meth:`FusedExperts.run`."""
        read, read_scale = self.read(prepared, x)
        y: torch.Tensor = _cutlass_fused_moe(
            read,
            read_scale,
            numbers,
            weights,
            prepared.gate_up,
            prepared.down,
            self.scales(prepared),
            self.activation.number_type == MXFP8,
            x.dtype,
        )
        return y

    @abstractmethod
    def read(self, prepared: CutlassWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the input of the first product: codes and swizzled block scales, or ``x`` and None where FlashInfer rounds it."""

    @abstractmethod
    def scales(self, prepared: CutlassWeights) -> list[torch.Tensor]:
        """Return FlashInfer's argument ``quant_scales``, in its order."""


class CutlassNvfp4Experts(CutlassExperts):
    """NVFP4 weights and activations, a whole layer in one call: ``flashinfer.fused_moe.cutlass_fused_moe``."""

    name = "flashinfer_cutlass_nvfp4_experts"
    activation = NVFP4DynamicBlock()
    capabilities = (100, 103, 110, 120, 121)
    multiples = (64, 64)

    def supports(self, request: FusedRequest) -> str | None:
        """Support what :class:`CutlassExperts` does, unless :data:`FOUR_OVER_SIX` is set."""
        if os.environ.get(FOUR_OVER_SIX, "0") not in ("", "0"):
            return f"rounds activations by another rule while {FOUR_OVER_SIX} is set"
        return super().supports(request)

    def prepare(self, gate_up: StoredExperts, down: StoredExperts) -> CutlassWeights:
        """Keep codes as stored, with the scales of inputs and outputs.

        Raises:
            ValueError: gate and up of an expert have different global scales or input scales.
        """
        prepared: dict[str, torch.Tensor] = {}
        for name, stored in (("gate_up", gate_up), ("down", down)):
            experts = [list(reversed(shards)) for shards in stored.weights]
            input_scale = stored.one_input_scale().to(torch.float32)
            is_one = bool((input_scale == input_scale[0]).all())
            prepared[name], prepared[f"{name}_scale"] = stack(experts)
            prepared[f"{name}_alpha"] = torch.cat([one_scale(shards) for shards in experts]) * input_scale
            prepared[f"{name}_input"] = (1.0 / input_scale)[0].clone() if is_one else 1.0 / input_scale
            if is_one and name == "gate_up":
                prepared["input_scale"] = input_scale[0].clone()
        return CutlassWeights(**prepared)

    def read(self, prepared: CutlassWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Round ``x`` to NVFP4 where all experts share its scale; leave it to FlashInfer where they do not."""
        if prepared.input_scale is None:
            return x, None
        rounded = round_to_blocks(self.activation, x, None, prepared.input_scale, swizzled=True)
        return rounded.codes, rounded.scale.view(torch.uint8)

    def scales(self, prepared: CutlassWeights) -> list[torch.Tensor]:
        """Return the input scale, block scales and output scale of gate and up, then of down."""
        if prepared.gate_up_input is None or prepared.down_input is None:
            raise ValueError("expected static input scales, got none")
        return [
            *(prepared.gate_up_input, prepared.gate_up_scale, prepared.gate_up_alpha),
            *(prepared.down_input, prepared.down_scale, prepared.down_alpha),
        ]


class CutlassMxfp8Experts(CutlassExperts):
    """MXFP8 weights and activations, a whole layer in one call: ``flashinfer.fused_moe.cutlass_fused_moe``."""

    name = "flashinfer_cutlass_mxfp8_experts"
    activation = MXFP8Dynamic()
    capabilities = (100, 103)
    multiples = (128, 128)

    def prepare(self, gate_up: StoredExperts, down: StoredExperts) -> CutlassWeights:
        """Keep codes as stored, under output scales of ones."""
        prepared: dict[str, torch.Tensor] = {}
        for name, stored in (("gate_up", gate_up), ("down", down)):
            experts = [list(reversed(shards)) for shards in stored.weights]
            prepared[name], prepared[f"{name}_scale"] = stack(experts)
            prepared[f"{name}_alpha"] = torch.ones(len(experts), dtype=torch.float32, device=prepared[name].device)
        return CutlassWeights(**prepared)

    def read(self, prepared: CutlassWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Round ``x`` to MXFP8."""
        del prepared
        rounded = round_to_blocks(self.activation, x, None, None, swizzled=True)
        return rounded.codes, rounded.scale.flatten()

    def scales(self, prepared: CutlassWeights) -> list[torch.Tensor]:
        """Return the block scales and output scale of gate and up, then of down."""
        return [prepared.gate_up_scale, prepared.gate_up_alpha, prepared.down_scale, prepared.down_alpha]


def stack(experts: Sequence[Sequence[ShardWeight]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes ``[E, N, ..]`` as stored, shards one below the other, and uint8 block scales, swizzled for each expert."""
    codes = torch.stack([torch.cat([shard.tensors["weight"] for shard in shards]) for shards in experts])
    scales = [torch.cat([shard.tensors["weight_scale"].view(torch.uint8) for shard in shards]) for shards in experts]
    return codes, torch.stack([naive_swizzle(scale) for scale in scales])


@torch.library.custom_op("modelopt_ext::flashinfer_cutlass_fused_moe", mutates_args=())
def _cutlass_fused_moe(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    numbers: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    scales: list[torch.Tensor],
    is_mxfp8: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    from flashinfer.fused_moe import cutlass_fused_moe

    # Every rank holds its experts and its slices of them: to FlashInfer it is alone. It tells the formats by the types: 16 FP4
    # codes are an int64, four block scales an int32.
    y = torch.empty((x.shape[0], down.shape[1]), dtype=out_dtype, device=x.device)
    cutlass_fused_moe(
        x,
        numbers,
        weights,
        gate_up if is_mxfp8 else gate_up.view(torch.int64),
        down if is_mxfp8 else down.view(torch.int64),
        out_dtype,
        [scale.view(torch.int32) if scale.dtype == torch.uint8 else scale for scale in scales],
        input_sf=x_scale,
        output=y,
        use_mxfp8_act_scaling=is_mxfp8,
        swizzled_input_sf=True,
        use_fused_finalize=False,  # sums in the order of the experts, and not as they come
    )
    return y


@_cutlass_fused_moe.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    numbers: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    scales: list[torch.Tensor],
    is_mxfp8: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del x_scale, numbers, weights, gate_up, scales, is_mxfp8
    return x.new_empty((x.shape[0], down.shape[1]), dtype=out_dtype)
