"""The activation as one PyTorch operator. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.early import early

from .function import SWIGLU, Activation
from .kernel import activation_kernel

BLOCK = 1024

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("modelopt_ext::activate", mutates_args=())
def _activate(
    h: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor | None,
    function: str,
    gated: bool,
    alpha: float,
    offset: float,
    limit: float | None,
    limits_function: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    rows, inner = h.shape[0], h.shape[1] // (2 if gated else 1)
    y = torch.empty((rows, inner), dtype=out_dtype, device=h.device)
    if y.numel():
        block = min(BLOCK, triton.next_power_of_2(inner))
        activation_kernel[(rows, triton.cdiv(inner, block))](
            h.contiguous(),
            # A pointer stands for an absent tensor; the kernel never reads through it.
            h if bias is None else bias.contiguous(),
            h if experts is None else experts.contiguous(),
            y,
            inner,
            FUNCTION=function,
            GATED=gated,
            ALPHA=alpha,
            OFFSET=offset,
            LIMIT=0.0 if limit is None else limit,
            HAS_LIMIT=limit is not None,
            LIMITS_FUNCTION=limits_function,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            **early(h.device),
        )
    return y


@_activate.register_fake
def _(
    h: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor | None,
    function: str,
    gated: bool,
    alpha: float,
    offset: float,
    limit: float | None,
    limits_function: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del bias, experts, function, alpha, offset, limit, limits_function
    return h.new_empty((h.shape[0], h.shape[1] // (2 if gated else 1)), dtype=out_dtype)


def activate(
    h: torch.Tensor,
    activation: Activation = SWIGLU,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute ``activation`` of each row, in fp32, rounded once.

    Args:
        h: the first product's output in fp32, fp16 or bf16: ``[R, 2 * I]``, the gate before up, or ``[R, I]`` without a gate.
        activation: what is computed.
        out_dtype: type of the result; None for that of ``h``.
        bias: the bias of each expert, in fp32, fp16 or bf16 ``[E, columns of h]``; None without one.
        experts: int32 ``[R]``, the expert of each row, needed with a bias; a negative one has no bias.

    Returns:
        ``[R, I]`` of ``out_dtype``.

    Raises:
        ValueError: a shape or type that the kernel does not read, or a bias where ``activation`` has none.
    """
    if h.dim() != 2 or h.shape[1] % activation.parts or h.dtype not in FLOATS:
        columns = "2 * I" if activation.gated else "I"
        raise ValueError(f"h must be [R, {columns}] in fp32, fp16 or bf16, got {tuple(h.shape)} {h.dtype}")
    if (bias is not None) != activation.bias or (experts is None) != (bias is None):
        raise ValueError(f"{activation}: bias and experts must be given together, and only where it has a bias")
    if bias is not None and (bias.dim() != 2 or bias.shape[1] != h.shape[1] or bias.dtype not in FLOATS):
        raise ValueError(f"bias must be [E, {h.shape[1]}] floats, got {tuple(bias.shape)} {bias.dtype}")
    if experts is not None and (experts.dtype != torch.int32 or experts.shape != (h.shape[0],)):
        raise ValueError(f"experts must be int32 [{h.shape[0]}], got {tuple(experts.shape)} {experts.dtype}")
    y: torch.Tensor = _activate(
        h,
        bias,
        experts,
        activation.function,
        activation.gated,
        activation.alpha,
        activation.offset,
        activation.limit,
        activation.limits_function,
        h.dtype if out_dtype is None else out_dtype,
    )
    return y
