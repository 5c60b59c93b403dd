"""A layout proves itself on the machine at hand before it serves a layer there.

Kernels are tested on the hardware their authors had. A compiler that miscompiles for another architecture, a driver, or a library
that reads its arguments differently would otherwise show as wrong logits only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from sglang_modelopt_ext.layouts.base import Layout, LinearRequest, ShardWeight

N, K = 128, 512
TOKENS = (1, 24, 40, 80, 300)
"""One number of tokens, or more, for each way the layouts of ``dispatch.py`` choose by it."""
TOLERANCE = 2.0**-7
"""Relative, over a token's outputs: twice the rounding of a bf16 result. A misread scale or code errs by a tenth and more."""

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
    weight = random(N, K) * random(N, 1)
    stored = request.scheme.weight.quantize(weight.to(torch.bfloat16))
    shard = ShardWeight(
        request.scheme.weight, {name: tensor.to(device) for name, tensor in stored.items()}, request.math
    )
    decoded = ShardWeight(request.scheme.weight, stored, request.math).decode()
    expected_weight = decoded.unit.double() * decoded.out_scale.double()
    product = partial(_blocks_product, layout) if layout.takes_blocks else partial(_product, layout)
    try:
        prepared = layout.prepare([shard])
        for m in TOKENS:
            x, y = product(request, prepared, random, m, device)
            expected = x @ expected_weight.T
            error_of_token = float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())
            if not error_of_token < TOLERANCE:
                raise ValueError(f"is wrong on {device}: relative error {error_of_token:.2g} with {m} tokens")
    except ValueError:
        raise
    except Exception as error:
        # Kernels of other packages are compiled on first use, and fail in as many ways as there are packages.
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"does not run on {device}: {reason.splitlines()[0]}") from error
    _passed.add(key)


def _product(
    layout: Layout,
    request: LinearRequest,
    prepared: Mapping[str, torch.Tensor],
    random: Callable[[int, int], torch.Tensor],
    m: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations ``[m, K]`` and the layout's output for them, float64 on the CPU."""
    # E4M3 numbers are numbers of every type that activations come in.
    x = random(m, K).to(torch.float8_e4m3fn)
    row_scale = random(m, 1).abs() + 0.5
    values = x.to(device).to(torch.float32).to(layout.operand(request))
    y = layout.matmul(prepared, values, row_scale.to(device), None, request.dtype)
    return x.double() * row_scale.double(), y.double().cpu()


def _blocks_product(
    layout: Layout,
    request: LinearRequest,
    prepared: Mapping[str, torch.Tensor],
    random: Callable[[int, int], torch.Tensor],
    m: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Likewise for a layout that takes activations under block scales."""
    activation = request.scheme.activation
    if activation is None:
        raise ValueError("takes rounded activations")
    x = random(m, K) * (random(m, 1).abs() + 0.5)
    scale = torch.full((), 2.0**-8, dtype=torch.float32, device="cpu") if activation.tensors else None
    values, row_scale = activation.quantize(x, scale)
    rounded = activation.blocks(x.to(device), None if scale is None else scale.to(device))
    if rounded is None:
        raise ValueError(f"takes codes under block scales, which {activation.name} has not")
    y = layout.matmul_blocks(prepared, rounded, None, request.dtype)
    wide = values.double() if row_scale is None else values.double() * row_scale.double()
    return wide, y.double().cpu()
