"""Checks of arguments, and arithmetic that the formats share."""

from __future__ import annotations

import torch


def check_weight(weight: torch.Tensor, block: int = 1) -> None:
    """Raise ValueError unless ``weight`` is a finite floating-point matrix ``[N, K]`` with ``block`` dividing K."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight is a floating-point matrix [N, K], not {weight.dtype} {list(weight.shape)}")
    if weight.shape[1] % block:
        raise ValueError(f"K = {weight.shape[1]} is not a multiple of {block}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity, for which these formats have no code")


def check_activation(x: torch.Tensor, block: int = 1) -> None:
    """Raise ValueError unless ``x`` is float32 ``[M, K]`` with ``block`` dividing K."""
    if x.dim() != 2 or x.dtype != torch.float32:
        raise ValueError(f"an activation is float32 [M, K], not {x.dtype} {list(x.shape)}")
    if x.shape[1] % block:
        raise ValueError(f"K = {x.shape[1]} is not a multiple of {block}")


def static_scale(scale: torch.Tensor | None, rows: int) -> torch.Tensor:
    """Return the scale of a static format as float32: ``[]``, or ``[rows, 1]`` where each of the rows has its own.

    Raises ValueError when there is none, or another number of them.
    """
    if scale is None:
        raise ValueError("a static activation format needs the input_scale of the checkpoint")
    fp32 = scale.to(torch.float32)
    if scale.numel() == 1:
        return fp32.reshape(())
    if scale.shape != (rows, 1):
        raise ValueError(
            f"a static activation format takes one input_scale or one for each row, not {list(scale.shape)}"
        )
    return fp32


def check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError, with what was expected and given, unless ``tensor`` has that dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def check_mxfp4(codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise ValueError unless a stored weight is MXFP4: ``codes`` uint8 ``[N, K / 2]`` and ``scale`` uint8 ``[N, K / 32]``."""
    n, k = codes.shape[0], 2 * codes.shape[-1]
    if k % 32:
        raise ValueError(f"MXFP4: expected K in blocks of 32, got {k}")
    check_tensor("MXFP4 codes", codes, torch.uint8, (n, k // 2))
    check_tensor("MXFP4 block scales (UE8M0, blocks of 32)", scale, torch.uint8, (n, k // 32))


def no_scale(scale: torch.Tensor | None) -> None:
    """Raise ValueError when a dynamic format is handed a static scale, which it would otherwise drop silently."""
    if scale is not None:
        raise ValueError("a dynamic activation format computes its own scales and takes none")


def split_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return ``[..., K]`` as ``[..., K / block, block]``."""
    return torch.unflatten(x, -1, (-1, block))


def block_amax(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return the largest magnitude of each block of ``x`` ``[..., K]``: float32 ``[..., K / block]``. NaN propagates."""
    return split_blocks(x, block).abs().amax(dim=-1).to(torch.float32)


def scale_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 ``[..., K]`` times one float32 scale ``[..., K / block]`` for each block."""
    block = values.shape[-1] // scales.shape[-1]
    return (split_blocks(values, block) * scales.unsqueeze(-1)).flatten(-2)


def divide(x: torch.Tensor, number: float) -> torch.Tensor:
    """Return ``x / number``, correctly rounded on every device, shape unchanged.

    On CUDA, PyTorch's own division of a tensor by a Python number multiplies by the reciprocal and may be one unit in
    the last place off, which is enough to move a value across a rounding boundary.
    """
    return x / torch.full_like(x, number)


def positive_amax(amax: torch.Tensor, maxbound: float) -> torch.Tensor:
    """Return the calibrated ``amax`` as ModelOpt exports it: float32, and never zero.

    A zero becomes ``maxbound``, so that the exported scale is 1. What is below the smallest normal number of the dtype
    of ``amax`` is raised to it, which matters in fp16: pass ``amax`` in the dtype that ModelOpt's calibrator keeps.

    Source: ModelOpt 0.47, ``TensorQuantizer.export_amax`` and ``_sanitize_export_amax``.
    """
    sanitized = torch.where(amax == 0, torch.full_like(amax, maxbound), amax)
    return sanitized.clamp(min=torch.finfo(amax.dtype).tiny).to(torch.float32)
