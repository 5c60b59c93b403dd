"""A layout proves itself on the machine at hand before it serves a layer there.

Kernels are tested on the hardware their authors had. A compiler that miscompiles for another architecture, a driver, or a library
that reads its arguments differently would otherwise show as wrong logits only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from sglang_modelopt_ext.layouts.base import BlockLayout, Layout, LinearRequest, ShardWeight, round_to_blocks
from sglang_modelopt_ext.schemes.base import LORA_B

N, K = 128, 512
TOKENS = (1, 24, 40, 80, 300)
"""One number of tokens, or more, for each way the layouts of ``dispatch.py`` choose by it."""
SIZES = 16
"""Powers of two that the rows of the layer differ by."""
TOLERANCE = 2.0**-7
"""Relative, over a token's outputs and over an output's tokens: twice the rounding of a bf16 result. A misread scale or code
errs by a tenth and more."""

_passed: set[tuple[object, ...]] = set()


def check_layout(layout: Layout, request: LinearRequest, device: torch.device) -> None:
    """Compares ``layout`` with float64 on a small random layer of the request's formats, once for each in this process.

    Raises:
        ValueError: the outputs differ, or the kernel does not run.
    """
    key = (layout, request.scheme.weight.name, layout.operand(request), request.math, request.dtype, device)
    if key in _passed:
        return
    # SGLang prepares layers under a default type and device of its own: neither is left to the default here.
    random = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    # Rows of every size that block scales have, subnormal ones included, and outputs that float16 holds.
    sizes = torch.exp2(6.0 - torch.arange(N, device="cpu") % SIZES).to(torch.float32).unsqueeze(1)
    weight = random(N, K) * sizes
    stored = request.scheme.weight.quantize(weight.to(torch.bfloat16))
    if isinstance(layout, BlockLayout) and layout.takes_low_rank:
        stored[LORA_B] = (random(N, request.scheme.low_rank) * sizes).to(torch.bfloat16)
    shard = ShardWeight(
        request.scheme.weight, {name: tensor.to(device) for name, tensor in stored.items()}, request.math
    )
    decoded = ShardWeight(request.scheme.weight, stored, request.math).decode()
    expected_weight = decoded.unit.double() * decoded.out_scale.double()
    prepared: Mapping[str, torch.Tensor] = {}
    for m in TOKENS:
        # E4M3 numbers are numbers of every type that activations come in.
        x = random(m, K).to(torch.float8_e4m3fn).to(torch.float32)
        row_scale = random(m, 1).abs() + 0.5
        down = random(m, request.scheme.low_rank) if LORA_B in stored else None
        try:
            prepared = prepared or layout.prepare([shard])
            y, exact = _multiply(layout, request, prepared, x, row_scale, down, device)
            y = y.double().cpu()
        except ValueError:
            raise
        except Exception as error:
            # Kernels of other packages are compiled on first use, and fail in as many ways as there are packages.
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"does not run on {device}: {reason.splitlines()[0]}") from error
        expected = exact @ expected_weight.T
        if down is not None:
            expected += down.double() @ stored[LORA_B].double().T
        worst = _relative_error(y, expected, dim=1)
        if m >= N // 8:  # an output of fewer tokens may be small because its products cancel
            worst = torch.maximum(worst, _relative_error(y, expected, dim=0))
        if not bool(worst < TOLERANCE):
            raise ValueError(f"is wrong on {device}: relative error {float(worst):.2g} with {m} tokens")
    _passed.add(key)


def _relative_error(y: torch.Tensor, expected: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest error of a row or column of outputs, NaN where one is; relative to the row's or column's norm."""
    return ((y - expected).norm(dim=dim) / expected.norm(dim=dim)).max()


def _multiply(
    layout: Layout,
    request: LinearRequest,
    prepared: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    row_scale: torch.Tensor,
    down: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layout's product for E4M3 numbers ``x`` times ``row_scale``, and the activations it then stands for, float64.

    A layout that reads codes gets ``x`` as the format rounds it, under the first of ``row_scale`` where that has a static scale,
    and ``down`` for its low-rank branch, where it has one.
    """
    if not isinstance(layout, BlockLayout):
        values = x.to(device).to(layout.operand(request))
        y = layout.matmul(prepared, values, row_scale.to(device), None, request.dtype)
        return y, x.double() * row_scale.double()
    activation = request.scheme.activation
    if activation is None:
        raise ValueError(f"{layout.name} took a layer with unrounded activations")
    static = row_scale[0, 0] if activation.tensors else None
    scale = None if static is None else static.to(device)
    rounded = round_to_blocks(activation, x.to(device), None, scale, layout.swizzled)
    numbers, scale = activation.quantize(x, static)
    exact = numbers.double() if scale is None else numbers.double() * scale.double()
    if down is not None:
        return layout.matmul_low_rank(prepared, rounded, down.to(device), None, request.dtype), exact
    return layout.matmul_blocks(prepared, rounded, None, request.dtype), exact
