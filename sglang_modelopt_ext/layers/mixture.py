"""The computation of a layer of experts from its input and routing, with both products prepared. It needs no SGLang."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.experts.base import Routing
from sglang_modelopt_ext.layers.experts import ExpertProduct, ExpertProducts
from sglang_modelopt_kernels.moe import activation as kernel
from sglang_modelopt_kernels.moe.activation import SWIGLU, Activation
from sglang_modelopt_kernels.moe.combine import combine


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


@dataclass(frozen=True)
class Biases:
    """The biases of this rank's experts.

    Attributes:
        first: of the first product, floats ``[E, columns]``, the gate before up.
        down: of the second product, floats ``[E, N]``; None where another rank adds it.
    """

    first: torch.Tensor
    down: torch.Tensor | None


def mix(
    layer: torch.nn.Module,
    first: ExpertProduct | ExpertProducts,
    down: ExpertProduct | ExpertProducts,
    x: torch.Tensor,
    choices: Choices,
    activation: Activation = SWIGLU,
    biases: Biases | None = None,
) -> torch.Tensor:
    """Return ``factor * sum_e w_e * (down_e(activation(first_e(x))) + bias_e)`` ``[T, N]`` for ``x`` ``[T, K]``, in its type.

    It is rounded to that type after the first product (with a bias, only once that is added and activated), after the activation,
    and at the end.

    Args:
        layer: the module both products were prepared on.
        first: the product before the activation, with a gate above up if it is gated.
        down: the product behind it.
        x: the input, float32, float16 or bf16.
        choices: its experts.
        activation: the function between the products.
        biases: those of both products, where ``activation`` has them.
    """
    top_k = choices.numbers.shape[1]
    routing = Routing(choices.numbers.reshape(-1).to(torch.int32), top_k)
    weights = choices.weights.to(torch.float32)
    if choices.weights_input:
        x = (x.repeat_interleave(top_k, dim=0).to(torch.float32) * weights.reshape(-1, 1)).to(x.dtype)
    h = first.apply(layer, x, routing, x.dtype if biases is None else torch.float32)
    if biases is None and activation == SWIGLU and down.rounds_gated(h):
        y = down.apply_gated(layer, h, routing, torch.float32)
    else:
        hidden = activate(h, activation, x.dtype, None if biases is None else biases.first, routing.experts)
        y = down.apply(layer, hidden, routing, torch.float32)
    bias = None
    if biases is not None and biases.down is not None:
        bias = weighted_bias(biases.down, choices)
    return add_choices(y, top_k, choices.factor, x.dtype, bias, None if choices.weights_input else weights)


def activate(
    h: torch.Tensor,
    activation: Activation = SWIGLU,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the activation of each row in float32, rounded once: ``[R, I]`` of ``out_dtype``, by default that of ``h``.

    Args:
        h: ``[R, 2 * I]``, the gate before up, or ``[R, I]`` without a gate.
        activation: what is computed.
        out_dtype: the type of the result.
        bias: the bias of each expert, floats ``[E, columns of h]``, that is added before; None without one.
        experts: int32 ``[R]``, the expert of each row, of which a negative one has no bias; unused without ``bias``.
    """
    if h.is_cuda:
        return kernel.activate(h, activation, out_dtype, bias, None if bias is None else experts)
    x = h.to(torch.float32)
    if bias is not None and experts is not None:
        rows = bias.to(torch.float32)[experts.clamp(min=0).long()]
        x = x + rows * (experts >= 0).unsqueeze(1)
    gate, up = x.chunk(2, dim=-1) if activation.gated else (x, None)
    if activation.limit is not None and not activation.limits_function:
        gate = gate.clamp(max=activation.limit)
    y = _function(gate, activation)
    if up is not None:
        if activation.limit is not None:
            y = y.clamp(max=activation.limit) if activation.limits_function else y
            up = up.clamp(-activation.limit, activation.limit)
        y = y * (up + activation.offset if activation.offset else up)
    return y.to(h.dtype if out_dtype is None else out_dtype)


def _function(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation.function == "silu":
        return torch.nn.functional.silu(x) if activation.alpha == 1.0 else x * torch.sigmoid(activation.alpha * x)
    if activation.function == "relu2":
        return torch.nn.functional.relu(x).square()
    return torch.nn.functional.gelu(x, approximate="tanh" if activation.function == "gelu_tanh" else "none")


def weighted_bias(bias: torch.Tensor, choices: Choices) -> torch.Tensor:
    """Return the sum of the biases ``[E, N]`` of each token's experts by their weights, float32 ``[T, N]``.

    Neither the host nor the sizes of allocations depend on the routing.
    """
    numbers = choices.numbers.long()
    weights = torch.ones_like(choices.weights) if choices.weights_input else choices.weights
    count = bias.shape[0]
    # A column of its own for choices that no expert of this rank serves.
    of_experts = torch.zeros(numbers.shape[0], count + 1, dtype=torch.float32, device=bias.device)
    of_experts.scatter_add_(1, torch.where(numbers < 0, count, numbers), weights.to(torch.float32))
    return of_experts[:, :count] @ bias.to(torch.float32)


def add_choices(
    y: torch.Tensor,
    top_k: int,
    factor: float | None,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``factor * (sum + bias)``, rounded once, for the weighted sum of each token's ``top_k`` rows of ``y``.

    Args:
        y: float32 ``[T * top_k, N]``.
        top_k: rows of a token.
        factor: None for 1.
        out_dtype: the type of the result ``[T, N]``.
        bias: float32 ``[T, N]``, None for zeros.
        weights: of the rows, float32 ``[T, top_k]``, None for ones.
    """
    if y.is_cuda:
        y = combine(y, top_k, weights, out_dtype if factor is None and bias is None else torch.float32)
    else:
        rows = y.view(-1, top_k, y.shape[-1])
        y = (rows if weights is None else rows * weights.unsqueeze(2)).sum(dim=1)
    if bias is not None:
        y = y + bias
    return (y if factor is None else y * factor).to(out_dtype)
