"""RMSNorm and SwiGLU of SGLang's models, rounded to E4M3 in the same kernel where a product of ours takes the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.layers import handover
from sglang_modelopt_ext.layers.handover import LONGEST, Producer, observe, wants_handover

_PRODUCER = "_modelopt_ext_producer"
_TYPES = (torch.bfloat16, torch.float16)


def _producer_of(module: Any) -> Producer:
    producer: Producer | None = module.__dict__.get(_PRODUCER)
    if producer is None:
        producer = module.__dict__[_PRODUCER] = Producer()
    return producer


def _is_plain(x: torch.Tensor, longest: int) -> bool:
    return x.dim() == 2 and x.dtype in _TYPES and x.is_contiguous() and 0 < x.shape[1] <= longest and x.shape[0] > 0


def _is_plain_norm(
    module: Any, x: torch.Tensor, residual: torch.Tensor | None, addition: torch.Tensor | None, quant_linear: Any
) -> bool:
    """Return whether the fused kernel computes what SGLang's RMSNorm would: its plain case."""
    from sglang.srt.batch_invariant_ops.batch_invariant_ops import is_batch_invariant_mode_enabled

    return (
        addition is None
        and quant_linear is None
        and module.variance_size_override is None
        and not (module.cast_x_before_out_mul or module.fp32_residual)
        and module.override_orig_dtype is None
        and module.weight.shape == x.shape[1:]
        and _is_plain(x, LONGEST)
        and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype and residual.is_contiguous()))
        and not is_batch_invariant_mode_enabled()
    )


def rms_norm(
    original: Callable[..., Any],
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: Any = None,
) -> Any:
    """Normalize as SGLang's RMSNorm does, and round the result where a product takes it."""
    if not wants_handover() or not _is_plain_norm(self, x, residual, post_residual_addition, quant_linear):
        return original(self, x, residual, post_residual_addition, quant_linear)
    producer = _producer_of(self)
    if producer.wanted is None:
        result = original(self, x, residual, post_residual_addition, quant_linear)
        output = result[0] if isinstance(result, tuple) else result
        if isinstance(output, torch.Tensor):
            observe(output, producer)
        return result
    normed = handover.rms_norm(x, self.weight.data, self.variance_epsilon, residual, producer)
    return normed if residual is None else (normed, residual)


def silu_and_mul(original: Callable[..., Any], self: Any, x: torch.Tensor) -> Any:
    """Compute SwiGLU as SGLang's SiluAndMul does, and round the result where a product takes it."""
    if not wants_handover() or not _is_plain(x, 2 * LONGEST):
        return original(self, x)
    producer = _producer_of(self)
    if producer.wanted is None:
        output = original(self, x)
        observe(output, producer)
        return output
    return handover.swiglu(x, producer)


HOOKS = (
    Hook(
        "sglang.srt.layers.layernorm.RMSNorm.forward_cuda",
        ("self", "x", "residual", "post_residual_addition", "quant_linear"),
        "activations would be rounded in a launch of their own",
        rms_norm,
    ),
    Hook(
        "sglang.srt.layers.activation.SiluAndMul.forward_cuda",
        ("self", "x"),
        "activations would be rounded in a launch of their own",
        silu_and_mul,
    ),
)
