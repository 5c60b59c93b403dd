"""A kernel in PyTorch in the place of ``flashinfer.fused_moe.cutlass_fused_moe``: it checks its weights with the package's own
checks, reads codes and scales in the package's order, and computes in float64 with the package's roundings between.

Those are, for NVFP4 and MXFP8 (``cutlass_fused_moe_kernels.cuh``, ``quantization_utils.cuh``): to the model's type after the first
product, after ``silu(gate) * up`` and after the second product; and to codes in float32, with reciprocals.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from sglang_modelopt_kernels.formats import e2m1, e4m3, ue8m0
from sglang_modelopt_kernels.formats.checks import scale_blocks
from tests.support.contracts import evaluate, function, method, parameters

RUNNERS = "flashinfer/fused_moe/runners.py"
CORE = "flashinfer/fused_moe/core.py"
WEIGHT_ONLY = "flashinfer/gemm/gemm_bf16_fp4.py"


def round_up(x: int, multiple: int) -> int:
    """Return ``x`` rounded up to a multiple of ``y``."""
    return -(-x // multiple) * multiple


@functools.cache
def _theirs(name: str, cls: str | None = None) -> Callable[..., Any]:
    """Return a function of the package, or a method of one of its runners."""
    if cls is None:
        return evaluate(WEIGHT_ONLY if name == "_unswizzle_sf_128x4" else RUNNERS, name, torch=torch)[0]
    require = _theirs("_require_cutlass_tensor")
    return method(RUNNERS, cls, name, torch=torch, round_up=round_up, _require_cutlass_tensor=require)


def unswizzled(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the scales in linear order, by the package's own inverse."""
    result: torch.Tensor = _theirs("_unswizzle_sf_128x4")(scale, rows, columns)
    return result


def decoded(codes: torch.Tensor, scale: torch.Tensor, mx: bool) -> torch.Tensor:
    """Return codes ``[R, ..]`` under linear block scales, uint8, as float64 ``[R, K]``."""
    if mx:
        return scale_blocks(e4m3.decode(codes), ue8m0.decode(scale)).double()
    values = e2m1.decode(e2m1.unpack_codes(codes))
    return scale_blocks(values, e4m3.decode(scale.view(torch.float8_e4m3fn))).double()


def round_nvfp4(x: torch.Tensor, reciprocal: torch.Tensor) -> torch.Tensor:
    """Return ``cvt_warp_fp16_to_fp4`` with ``SFScaleVal = reciprocal``: float64 codes times block scale, no global scale."""
    blocks = x.to(torch.float32).unflatten(1, (-1, 16))
    amax = blocks.abs().amax(dim=2)
    scale = (
        (reciprocal * (amax * torch.tensor(1 / 6, dtype=torch.float32)))
        .clamp(max=448)
        .to(torch.float8_e4m3fn)
        .to(torch.float32)
    )
    factor = torch.where(amax != 0, 1.0 / (scale * (1.0 / reciprocal)), 0.0)
    codes = e2m1.decode(e2m1.encode(torch.nan_to_num(blocks * factor.unsqueeze(2))))
    return (codes * scale.unsqueeze(2)).flatten(1).double()


def round_mxfp8(x: torch.Tensor) -> torch.Tensor:
    """Return ``cvt_warp_fp16_to_mxfp8``: float64, block scales included."""
    blocks = x.to(torch.float32).unflatten(1, (-1, 32))
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(dim=2, keepdim=True).double() / 448))).clamp(2.0**-127)
    return ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale).flatten(1)


def check_weights(
    mx: bool, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, quant_scales: list[torch.Tensor]
) -> None:
    """Check prepared weights, and their order of scales, like the package's own runner."""
    cls = "CutlassMxfp8Runner" if mx else "CutlassNvfp4Runner"
    pack, order = _theirs("_pack_weight_inputs", cls), _theirs("_quant_scales", cls)
    if mx:
        keys = ("fc1_expert_scales", "fc1_input_scale", "fc2_expert_scales", "fc2_input_scale")
        given = {"fc1_expert_weights": gate_up, "fc2_expert_weights": down}
        names = (*given, "fc1_expert_scales", "fc2_expert_scales", "fc1_input_scale", "fc2_input_scale")
        bytes_of = quant_scales
    else:
        keys = tuple(
            f"fc{i}_{what}" for i in (1, 2) for what in ("act_global_scale", "weight_block_scale", "dequant_scale")
        )
        given = {"fc1_expert_weights": gate_up.view(torch.uint8), "fc2_expert_weights": down.view(torch.uint8)}
        names = (*given, *keys)
        bytes_of = [s.view(torch.uint8) if s.dtype == torch.int32 else s for s in quant_scales]
    runner = types.SimpleNamespace(
        config=types.SimpleNamespace(
            routing=types.SimpleNamespace(num_experts=gate_up.shape[0]),
            experts=types.SimpleNamespace(intermediate_size=gate_up.shape[1] // 2),
            activation=types.SimpleNamespace(is_gated=True),
        ),
        device=x.device,
        _required_weight_keys=names,
    )
    validate = _theirs("_validate_weight_storage", "_CutlassRunnerBase")
    runner._validate_weight_storage = lambda tensors: validate(runner, tensors)
    given |= dict(zip(keys, bytes_of, strict=True))
    packed = pack(runner, given, down.shape[1])
    again = order(runner, [None] * 4 + packed)  # behind the activations, the output and the routing
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again, quant_scales, strict=True))


def cutlass_fused_moe(*args: Any, **kwargs: Any) -> None:
    """Write into ``output``; tokens of no expert are zero."""
    names = list(parameters(function(CORE, "cutlass_fused_moe")))
    given = dict(zip(names, args, strict=False)) | kwargs
    x, choices, weights = (given[name] for name in ("input", "token_selected_experts", "token_final_scales"))
    gate_up, down, scales = (given[name] for name in ("fc1_expert_weights", "fc2_expert_weights", "quant_scales"))
    output, input_sf, dtype = given["output"], given["input_sf"], given["output_dtype"]
    mx = bool(given["use_mxfp8_act_scaling"])
    assert given["swizzled_input_sf"]
    assert not given["use_fused_finalize"]
    assert choices.dtype == torch.int32
    assert weights.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, choices, weights, output, gate_up, down, *scales))
    check_weights(mx, x, gate_up, down, scales)
    if mx:
        scale_1, alpha_1, scale_2, alpha_2 = scales
        assert x.dtype == torch.float8_e4m3fn
        assert input_sf is not None
    else:
        act_1, scale_1, alpha_1, act_2, scale_2, alpha_2 = scales
        gate_up, down = gate_up.view(torch.uint8), down.view(torch.uint8)
        assert (x.dtype == torch.uint8) == (input_sf is not None)
        assert act_1.dim() == 0 or input_sf is None, "a scale for each expert is for inputs that are not rounded"
    group, (inner, hidden) = (32 if mx else 16), (gate_up.shape[1] // 2, down.shape[1])
    output.zero_()
    total = torch.zeros(output.shape, dtype=torch.float32)
    for expert in range(gate_up.shape[0]):
        tokens, places = (choices == expert).nonzero(as_tuple=True)
        if input_sf is None:
            values = round_nvfp4(x, act_1 if act_1.dim() == 0 else act_1[expert])
        else:
            values = decoded(x, unswizzled(input_sf, len(x), hidden // group), mx)
        linear = unswizzled(scale_1[expert].view(torch.uint8), 2 * inner, hidden // group)
        h = values[tokens] @ decoded(gate_up[expert], linear, mx).T * alpha_1[expert].double()
        up, gate = h.to(dtype).float().chunk(2, dim=1)
        middle = (torch.nn.functional.silu(gate) * up).to(dtype)
        rounded = round_mxfp8(middle) if mx else round_nvfp4(middle, act_2 if act_2.dim() == 0 else act_2[expert])
        linear = unswizzled(scale_2[expert].view(torch.uint8), hidden, inner // group)
        y = (rounded @ decoded(down[expert], linear, mx).T * alpha_2[expert].double()).to(dtype)
        total.index_add_(0, tokens, y.float() * weights[tokens, places].unsqueeze(1))
    output.copy_(total.to(dtype))


def module() -> types.ModuleType:
    """Return a stand-in for the module ``flashinfer.fused_moe``."""
    made = types.ModuleType("flashinfer.fused_moe")
    made.cutlass_fused_moe = cutlass_fused_moe  # type: ignore[attr-defined]
    return made
