"""MXFP4 weights with FP8 activations in humming's kernels, which fold the exponents into E4M3."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    LinearRequest,
    ShardWeight,
    check_no_output_scale,
    check_type,
    fp8_objection,
    type_objection,
)
from sglang_modelopt_ext.backends.linear.flashinfer import add_bias, check_rows, stored
from sglang_modelopt_ext.backends.packages import package_objection
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4

SPAN = 11
"""The most that exponents of a row may differ by: E4M3 then holds every E2M1 code under them, exactly."""

LOWEST = 8
"""The least UE8M0 byte a row's exponents may be counted from: its scale is kept in bf16, and halved."""

OVERRIDES = {"multi_cast_size_a": 1, "multi_cast_size_b": 1, "use_stream_k": False}
"""Settings that replace those of every kernel humming chooses: no load is shared by blocks of threads, no sum split among them."""


@dataclass(frozen=True)
class HummingWeight:
    """A weight as ``transform_humming_tensors`` returns it.

    Attributes:
        weight, weight_scale, weight_scale_2: humming's codes and scales.
        out_scale: float32 ``[N]``, ones.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor
    out_scale: torch.Tensor


class Humming(Backend[HummingWeight]):
    """MXFP4 weights as E4M3 in registers, in FP8 matrix instructions: ``humming.forward.humming_forward``.

    humming rounds codes of rows whose exponents differ by more than SPAN; such weights are rejected here. A warp's sum over its
    share of K, in most kernels all of it, stays in the matrix instructions, which keep about 13 bits on Hopper.
    """

    name = "humming_mxfp4_fp8"

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but MXFP4 weights with FP8 activations in bf16 models on SM89 and SM90, K in 128s."""
        scheme = request.scheme
        if not request.target.is_one_of(89, 90):
            return "is for SM89, SM90"
        if (reason := type_objection(scheme, (MXFP4,))) is not None:
            return reason
        if request.dtype != torch.bfloat16:
            return f"has no {request.dtype} output here"
        if request.k % 128 or request.n % 8:
            return f"needs N in 8s and K in 128s, not {request.n} and {request.k}"
        return fp8_objection(request) or package_objection("humming-kernels", request.packages)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> HummingWeight:
        """Transform the shards for humming, and compile its kernel for their size.

        Raises ValueError where humming would round a weight.
        """
        check_type(shards, (MXFP4,))
        check_no_output_scale(shards)
        from humming.transform import transform_humming_tensors

        codes, scale = stored(shards, "weight"), stored(shards, "weight_scale")
        check_rows(codes.shape[0], 8)
        check_span(codes, scale)
        rows = codes.shape[0]
        tensors = {"weight": codes.view(torch.int32), "weight_scale": scale.view(torch.float8_e8m0fnu)}
        made = transform_humming_tensors(layer_config(rows, 2 * codes.shape[1]), tensors)
        prepared = HummingWeight(
            **{name: made[name] for name in ("weight", "weight_scale", "weight_scale_2")},
            out_scale=torch.ones(rows, dtype=torch.float32, device=codes.device),
        )
        # humming compiles for every size of a layer: now, and not with the first token.
        zeros = torch.zeros(1, 2 * codes.shape[1], dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn)
        self.matmul(prepared, zeros, None, None, torch.bfloat16)
        return prepared

    def matmul(
        self,
        weight: HummingWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply; the sum is scaled by ``row_scale`` before it is rounded to bf16; the bias is added afterwards."""
        scale = weight.out_scale.new_ones(1) if row_scale is None else row_scale
        scale = scale.to(torch.float32).reshape(-1, 1).expand(values.shape[0], 1).contiguous()
        kept = weight.weight, weight.weight_scale, weight.weight_scale_2
        y: torch.Tensor = _humming_gemm(values.contiguous(), scale, *kept, weight.out_scale.shape[0])
        return add_bias(y, bias).to(out_dtype)


def check_span(codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise ValueError unless humming reads the weight exactly.

    Args:
        codes: uint8 ``[N, K / 2]``.
        scale: UE8M0, uint8 ``[N, K / 32]``.
    """
    used = (codes.unflatten(1, (-1, 16)) & 0x77).ne(0).any(dim=2)
    exponent = scale.to(torch.int32)
    lowest = torch.where(used, exponent, 255).amin(dim=1)
    highest = exponent.amax(dim=1)
    if bool((lowest < highest - SPAN).any()):
        raise ValueError(f"the exponents of a row differ by more than {SPAN}")
    if bool((used.any(dim=1) & (highest - SPAN < LOWEST)).any()):
        raise ValueError(f"a row's exponents are below {LOWEST + SPAN - 127}")


@functools.cache
def layer_config(n: int, k: int) -> Any:
    """Return humming's description of a layer, for the GPU at hand."""
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config

    weight = HummingWeightSchema(
        b_dtype="float4e2m1",
        bs_dtype="float8e8m0",
        weight_scale_group_size=32,
        weight_scale_2_type="channel",
    )
    return prepare_layer_config(
        shape_n=n,
        shape_k=k,
        weight_schema=weight,
        input_schema=HummingInputSchema(a_dtype="float8e4m3"),
        pad_n_to_multiple=256,
        torch_dtype=torch.bfloat16,
    )


@functools.cache
def kernel_choice(n: int, k: int) -> str:
    """Return humming's own choice of a kernel for each number of tokens, with :data:`OVERRIDES`, as JSON.

    A tile's sum is not split along K among blocks (``use_stream_k``). humming rounds each part to bf16, and adds the parts in bf16,
    in the output, in the order in which the blocks finish: ``epilogue/gmem_writer.cuh`` of 0.1.12 (``tma_reduce_add_2d``,
    ``reduce_add_f162``, ``atomic_reduce_add_f162``). Four to eight parts, its choice for few tokens at N = K = 4096, have about
    twice the error of one rounding, and results differ between launches; float32 parts it does not have. Layers of fewer tiles than
    the GPU has SMs are slower without the split (docs/roadmap.md).

    No two blocks share loads (``multi_cast_size_a`` and ``_b``). On SM90, for many tokens, humming has one block of a cluster load
    the activations of both. That block waits for the output of its own previous tile, not for its peer's, before it overwrites the
    shared memory that the peer's output may still lie in: ``memory/g2s_pipeline.cuh`` of 0.1.12 counts the peer for the stages, and
    not for ``math_mbar[kNumStages]``. Outputs are then wrong, in some launches. 0.1.13 counts it for both (inclusionAI/humming,
    pull request 56); SGLang 0.5.23 pins 0.1.12.
    """
    from humming.tune import get_heuristics_config

    return json.dumps(
        [[above, to, {**kernel, **OVERRIDES}] for above, to, kernel in get_heuristics_config(layer_config(n, k))]
    )


@torch.library.custom_op("modelopt_ext::humming_gemm", mutates_args=())
def _humming_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    n: int,
) -> torch.Tensor:
    from humming.forward import humming_forward

    if x.shape[0] == 0:
        return x.new_empty((0, n), dtype=torch.bfloat16)
    return humming_forward(
        layer_config(n, x.shape[1]),
        inputs=x,
        weight=weight,
        weight_scale=weight_scale,
        weight_scale_2=weight_scale_2,
        input_scale=x_scale,
        tuning_config=kernel_choice(n, x.shape[1]),
    )


@_humming_gemm.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    n: int,
) -> torch.Tensor:
    del x_scale, weight, weight_scale, weight_scale_2
    return x.new_empty((x.shape[0], n), dtype=torch.bfloat16)
