"""The experts of a mixture in the independent reading: their tensors out of a checkpoint, and modules in Hugging Face's places.

What is between an expert's products is the function of Hugging Face's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

GATED, GATELESS = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")
PACKED = ("gate_up_proj", "down_proj")


def parts_of(experts: Any) -> tuple[str, ...]:
    """Return the layers of each expert of a Hugging Face module, by the names that checkpoints store one by one."""
    return GATED if hasattr(experts, "gate_up_proj") else GATELESS


def is_packed(tensors: Mapping[str, torch.Tensor], name: str) -> bool:
    """Return whether a checkpoint holds one quantized tensor for all experts called ``name``."""
    return f"{name}.{PACKED[0]}_weight_scale" in tensors


def unpack(tensors: dict[str, torch.Tensor], name: str, experts: int) -> tuple[str, ...]:
    """Replace packed tensors of experts called ``name`` by those of each expert, and return the names of an expert's layers."""
    for part in PACKED:
        layer = f"{name}.{part}"
        for expert in range(experts):
            for suffix, tensor in unpacked(tensors, layer, expert, experts).items():
                tensors[f"{name}.{expert}.{part}.{suffix}"] = tensor
        for full in [full for full in tensors if full == layer or full.startswith(f"{layer}_")]:
            del tensors[full]
    return PACKED


def unpacked(tensors: Mapping[str, torch.Tensor], name: str, expert: int, experts: int) -> dict[str, torch.Tensor]:
    """Return one expert's tensors out of those of ``experts`` ones that are packed as ``[E, K, N]``."""
    parts = {}
    for full, tensor in tensors.items():
        if full == name or full.startswith(f"{name}_"):
            own = tensor[expert] if tensor.dim() and tensor.shape[0] == experts else tensor
            parts[full.removeprefix(name).removeprefix("_") or "weight"] = own.T.contiguous() if own.dim() == 2 else own
    if parts["weight"].dtype == torch.float8_e4m3fn and tensors[f"{name}_weight_scale"].shape == (experts,):
        parts["weight_scale"] = parts["weight_scale"].expand(parts["weight"].shape[0])  # one for each expert
    return parts


def is_whole(tensors: Mapping[str, torch.Tensor], layer: str) -> bool:
    """Return whether a layer of an expert is stored in the model's type, without scales."""
    stored = [name for name in tensors if name.startswith(f"{layer}.")]
    floats = (torch.bfloat16, torch.float16, torch.float32)
    return stored == [f"{layer}.weight"] and tensors[stored[0]].dtype in floats


class PlainLinear(nn.Module):
    """An unquantized layer of an expert beside quantized ones: float32, and its input is not rounded."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(torch.float32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight^T``, rounded once to the dtype of ``x``."""
        return (x.to(torch.float32) @ self.weight.T).to(x.dtype)


class QuantExperts(nn.Module):
    """The experts of a mixture, one after the other, in place of the Hugging Face module of the same name.

    Args:
        experts: the layers of each: those before the activation, whose outputs are put side by side, and the last.
        replaced: Hugging Face's module.
    """

    def __init__(self, experts: Sequence[Sequence[nn.Module]], replaced: Any) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.ModuleList(expert) for expert in experts)
        self.activation: Callable[[torch.Tensor], torch.Tensor] = (
            replaced._apply_gate if parts_of(replaced) == GATED else replaced.act_fn
        )

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return ``[T, H]`` from ``[T, H]``, given each token's experts and their weights."""
        y = torch.zeros_like(x)
        for number in range(len(self.members)):
            token, choice = torch.where(chosen == number)
            if len(token) == 0:
                continue
            y.index_add_(0, token, (self.of(number, x[token]) * weights[token, choice, None]).to(x.dtype))
        return y

    def of(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return the output of one expert for rows ``x``."""
        *first, down = self.members[number]  # type: ignore[misc]
        output: torch.Tensor = down(self.activation(torch.cat([layer(x) for layer in first], dim=-1)))
        return output


class EveryExpert(QuantExperts):
    """The experts of Llama 4, each of which is given all tokens, weighted by the router: most by 0."""

    def __init__(self, experts: Sequence[Sequence[nn.Module]], replaced: Any) -> None:
        nn.Module.__init__(self)
        self.members = nn.ModuleList(nn.ModuleList(expert) for expert in experts)
        self.act_fn = replaced.act_fn
        self.activation = self._gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return ``[E * T, H]`` from the tokens of each expert, one expert's after the other's."""
        rows = x.view(len(self.members), -1, x.shape[-1])
        return torch.cat([self.of(number, rows[number]) for number in range(len(rows))])

    def _gated(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        gated: torch.Tensor = up * self.act_fn(gate)
        return gated


def in_place_of(replaced: Any, experts: Sequence[Sequence[nn.Module]]) -> QuantExperts:
    """Return the module of ``experts`` that takes the place of a Hugging Face module of experts."""
    kind = QuantExperts if hasattr(replaced, "_apply_gate") else EveryExpert
    return kind(experts, replaced)


def stack(tensors: dict[str, torch.Tensor], name: str, replaced: Any) -> None:
    """Stack unquantized experts called ``name``, stored one by one, to the tensors of Hugging Face's module."""

    def stacked(part: str) -> torch.Tensor:
        return torch.stack([tensors.pop(f"{name}.{number}.{part}.weight") for number in range(replaced.num_experts)])

    if parts_of(replaced) == GATED:
        tensors[f"{name}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
    else:
        tensors[f"{name}.up_proj"] = stacked("up_proj")
    tensors[f"{name}.down_proj"] = stacked("down_proj")
