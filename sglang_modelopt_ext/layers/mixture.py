"""The computation of a layer of experts from its input and routing, with both products prepared. It needs no SGLang."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.experts.base import Routing
from sglang_modelopt_ext.layers.experts import ExpertProduct
from sglang_modelopt_kernels.moe.combine import combine
from sglang_modelopt_kernels.moe.swiglu import swiglu


@dataclass(frozen=True)
class Choices:
    """The experts of each token.

    Attributes:
        numbers: integers ``[T, top_k]``: this rank's index of the expert, or :data:`NO_EXPERT`.
        weights: the router's weights, floats ``[T, top_k]``.
        weights_input: whether the input of an expert is multiplied by its weight (Llama 4), instead of its output.
        factor: the factor of the sum over a token's experts, None for 1.
    """

    numbers: torch.Tensor
    weights: torch.Tensor
    weights_input: bool = False
    factor: float | None = None


def mix(
    layer: torch.nn.Module, gate_up: ExpertProduct, down: ExpertProduct, x: torch.Tensor, choices: Choices
) -> torch.Tensor:
    """Return ``factor * sum_e w_e * down_e(silu(gate_e(x)) * up_e(x))`` ``[T, N]`` for ``x`` ``[T, K]``, in its type.

    It is rounded to that type after gate and up, after their product, and at the end.

    Args:
        layer: the module both products were prepared on.
        gate_up: the first product, gate above up.
        down: the second product.
        x: the input, float32, float16 or bf16.
        choices: its experts.
    """
    top_k = choices.numbers.shape[1]
    routing = Routing(choices.numbers.reshape(-1).to(torch.int32), top_k)
    weights = choices.weights.reshape(-1, 1).to(torch.float32)
    if choices.weights_input:
        x = (x.repeat_interleave(top_k, dim=0).to(torch.float32) * weights).to(x.dtype)
    hidden = activate(gate_up.apply(layer, x, routing, x.dtype))
    y = down.apply(layer, hidden, routing, torch.float32, None if choices.weights_input else weights)
    return add_choices(y, top_k, choices.factor, x.dtype)


def activate(h: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` for ``h = [gate, up]`` ``[R, 2 * I]``: ``[R, I]`` of its type, in float32, rounded once."""
    if h.is_cuda:
        return swiglu(h)
    gate, up = h.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.to(torch.float32)) * up.to(torch.float32)).to(h.dtype)


def add_choices(y: torch.Tensor, top_k: int, factor: float | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return ``factor`` times the sum of each token's ``top_k`` rows of float32 ``y`` ``[T * top_k, N]``, rounded once."""
    if y.is_cuda:
        y = combine(y, top_k, None, out_dtype if factor is None else torch.float32)
    else:
        y = y.view(-1, top_k, y.shape[-1]).sum(dim=1)
    return (y if factor is None else y * factor).to(out_dtype)
