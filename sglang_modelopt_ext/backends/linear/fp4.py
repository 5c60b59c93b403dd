"""FP4 weights and activations on Blackwell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang_modelopt_ext.backends.base import BlockBackend, LinearRequest, ShardWeight
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats import e4m3, ue8m0
from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.gemm.blackwell_common import takes_tiles
from sglang_modelopt_kernels.gemm.fp4_blackwell import fp4_linear, path_of
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle

_ACTIVATION_OF = {"nvfp4": "nvfp4_dynamic", "mxfp4": "mxfp4_dynamic"}


class Fp4(BlockBackend):
    """Weights as stored times activations of the same format: :mod:`sglang_modelopt_kernels.gemm.fp4_blackwell`."""

    architectures: tuple[str, ...]
    """The GPUs it is for."""
    tiled: bool
    """Whether it keeps the weight's block scales in tiles, :func:`naive_swizzle`."""

    def objection(self, request: LinearRequest) -> str | None:
        """NVFP4 in blocks of 16 on both sides, or MXFP4 on both sides, on its architectures."""
        scheme, activation = request.scheme, request.scheme.activation
        if request.device != "cuda" or f"SM{request.capability}" not in self.architectures:
            return f"is for {' and '.join(self.architectures)}"
        if scheme.weight.name not in _ACTIVATION_OF:
            return f"has no matrix instruction for {scheme.weight.name} weights"
        if activation is None or activation.name != _ACTIVATION_OF[scheme.weight.name]:
            return f"needs {_ACTIVATION_OF[scheme.weight.name]} activations"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"may sum at less than the precision of {request.dtype}"
        return None

    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """``codes`` uint8 ``[N, K / 2]``, ``block_scale`` ``[N, K / group]`` or its tiles, and ``out_scale`` float32 ``[N]``."""
        codes = torch.cat([shard.tensors["weight"] for shard in shards])
        scale = torch.cat([shard.tensors["weight_scale"] for shard in shards])
        # The instruction reads E4M3 scales without their sign.
        if scale.dtype == torch.uint8:
            illegal = ue8m0.byte_is_nan(scale)
        else:
            illegal = e4m3.byte_is_nan(scale) | e4m3.byte_is_negative(scale)
        if bool(illegal.any()):
            raise ValueError("a block scale is NaN or negative")
        one = torch.ones((), dtype=torch.float32, device=codes.device)
        out_scale = [
            shard.tensors.get("weight_scale_2", one).to(torch.float32).expand(shard.tensors["weight"].shape[0])
            for shard in shards
        ]
        kept = naive_swizzle(scale) if self.tiled else scale
        return {"codes": codes, "block_scale": kept, "out_scale": torch.cat(out_scale)}

    def matmul_blocks(
        self,
        prepared: Mapping[str, torch.Tensor],
        x: BlockActivation,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`fp4_linear`."""
        weight = prepared["codes"], prepared["block_scale"], prepared["out_scale"]
        y: torch.Tensor = fp4_linear(x, *weight, bias, out_dtype, self.tiled)
        return y

    def check_tokens(self, prepared: Mapping[str, torch.Tensor], request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`fp4_linear`."""
        del request
        (n, half), device = prepared["codes"].shape, prepared["codes"].device
        return covering(lambda m: path_of(self.tiled, m, n, 2 * half, device))


class BlackwellFp4(Fp4):
    """Scales in tiles, which tcgen05 copies to tensor memory; those of the activations too, from 65 tokens on."""

    name = "triton_fp4_tcgen05"
    kernels = ("finish_kernel", "tcgen05_kernel")
    architectures = ("SM100", "SM103")
    tiled = True

    def swizzles(self, tokens: int) -> bool:
        """Where a tile of the product has as many tokens as a tile of scales."""
        return takes_tiles(tokens)


class MmaFp4(Fp4):
    """Scales in rows, which ``mma.sync`` takes from registers."""

    name = "triton_fp4_mma"
    kernels = ("finish_kernel", "fp4_kernel")
    architectures = ("SM120", "SM121")
    tiled = False
