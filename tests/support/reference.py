"""An independent float32 reading of an exported checkpoint: what a server should answer.

Nothing here imports the packages under test. The numbers are decoded from the safetensors by the code below, straight
from the definition of the formats; the model around the linear layers is the Hugging Face one.

A further recipe is one row in :data:`RECIPES`: how its weight is decoded and how its input is rounded.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

Math = Literal["exact", "fp8"]
Activation = Literal["recipe", "per_tensor", "none"]
Parts = Mapping[str, torch.Tensor]
"""The stored tensors of one linear layer by the last part of their name."""

FP8_MAX = 448.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Weight:
    """``W = units * scale``; units are 4-bit codes times block scales, ``scale`` is the scale of the whole tensor."""

    units: torch.Tensor
    scale: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """The weight in float32."""
        return self.units * self.scale


@dataclass(frozen=True)
class Recipe:
    """One ``quant_algo``.

    Attributes:
        group: the block size where the configuration does not say it.
        decode: from the stored tensors and the block size to the weight.
        round_input: from the input and the stored tensors to ``(values, scale)``, input = values * scale.
        tensors: what must be stored, besides a bias.
    """

    group: int
    decode: Callable[[Parts, int], Weight]
    round_input: Callable[[torch.Tensor, Parts], tuple[torch.Tensor, torch.Tensor]]
    tensors: frozenset[str]


def decode_fp4(packed: torch.Tensor) -> torch.Tensor:
    """E2M1 codes, two to a byte, the low nibble first: float32 ``[N, K]`` from uint8 ``[N, K / 2]``."""
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=torch.float32)
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1)
    return values[nibbles.long()].flatten(start_dim=1)


def decode_nvfp4(parts: Parts, group: int) -> Weight:
    """E2M1 under E4M3 block scales and one float32 scale."""
    scales = parts["weight_scale"]
    if scales.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weight_scale of an NVFP4 layer is {scales.dtype}")
    units = _times_blocks(decode_fp4(parts["weight"]), scales.to(torch.float32), group)
    return Weight(units, _scalar(parts["weight_scale_2"]))


def decode_mxfp4(parts: Parts, group: int) -> Weight:
    """E2M1 under block scales that are powers of two, stored as the exponent + 127 in a byte.

    The tensor's scale is the power of two that puts the largest block just inside the range of E4M3.
    """
    exponents = parts["weight_scale"]
    if exponents.dtype != torch.uint8:
        raise ValueError(f"weight_scale of an MXFP4 layer is {exponents.dtype}")
    exponents = exponents.to(torch.float32) - 127.0
    shift = exponents.max() - 6.0
    return Weight(_times_blocks(decode_fp4(parts["weight"]), torch.exp2(exponents - shift), group), torch.exp2(shift))


def round_static_fp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 under the stored ``input_scale``, saturating."""
    scale = _scalar(parts["input_scale"])
    return to_e4m3(x / scale), scale


def round_token_fp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 under a scale of its own for each token: the largest magnitude of the row / 448."""
    return _round_by_amax(x, x.abs().amax(dim=-1, keepdim=True))


def round_tensor_fp8(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 under one dynamic scale for all tokens, the way ModelOpt simulates W4A8_MXFP4_FP8."""
    return _round_by_amax(x, x.abs().amax())


def round_nothing(x: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """The input as it is."""
    return x, torch.ones(())


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 number, ties to even, saturating at 448."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def _round_by_amax(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.where(amax > 0, amax / FP8_MAX, torch.ones_like(amax))
    return to_e4m3(x / scale), scale


def _times_blocks(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    n, k = codes.shape
    if scales.shape != (n, k // group) or k % group:
        raise ValueError(f"block scales {list(scales.shape)} for a weight {[n, k]} in groups of {group}")
    return (codes.view(n, k // group, group) * scales.unsqueeze(-1)).view(n, k)


def _scalar(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() != 1:
        raise ValueError(f"a scalar has shape {list(tensor.shape)}")
    return tensor.to(torch.float32).reshape(())


_NVFP4 = frozenset({"weight", "weight_scale", "weight_scale_2"})
RECIPES: dict[str, Recipe] = {
    "W4A8_NVFP4_FP8": Recipe(32, decode_nvfp4, round_static_fp8, _NVFP4 | {"input_scale"}),
    "W4A8_MXFP4_FP8": Recipe(32, decode_mxfp4, round_token_fp8, frozenset({"weight", "weight_scale"})),
}

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor, Parts], tuple[torch.Tensor, torch.Tensor]]] = {
    "per_tensor": round_tensor_fp8,
    "none": round_nothing,
}


class QuantLinear(nn.Module):
    """A linear layer that computes what the recipe says, in float32 whatever the model around it runs in.

    ``math="fp8"`` rounds the units of the weight to E4M3, as a kernel does that multiplies FP8 with FP8.
    """

    def __init__(self, recipe: Recipe, parts: Parts, group: int, math: Math, activation: Activation) -> None:
        super().__init__()
        weight = recipe.decode(parts, group)
        units = weight.units
        if math == "fp8":
            if bool(units.abs().amax() > FP8_MAX):
                raise ValueError("code * block scale exceeds 448: its rounding to E4M3 is not defined here")
            units = to_e4m3(units)
        # Plain attributes, not buffers: converting the model must not convert them.
        self.weight_parts = Weight(units, weight.scale)
        self.parts = parts
        self.bias_values = parts["bias"].to(torch.float32) if "bias" in parts else None
        self.round_input = recipe.round_input if activation == "recipe" else ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``round(x) W^T + bias``, rounded once to the dtype of ``x``."""
        values, scale = self.round_input(x.to(torch.float32), self.parts)
        y = (values @ self.weight_parts.units.T) * (scale * self.weight_parts.scale)
        return (y if self.bias_values is None else y + self.bias_values).to(x.dtype)


class Reference:
    """The reference model of a checkpoint; one without quantization is read as it is.

    Args:
        folder: the checkpoint.
        dtype: what everything but the quantized layers runs in: bfloat16 measures the noise of a bf16 server.
        math: see :class:`QuantLinear`.
        activation: the rounding of the recipe, or another one for comparison.

    Raises:
        ValueError: a tensor is missing, or is there and nothing reads it.
        NotImplementedError: a recipe without a row in :data:`RECIPES`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        math: Math = "exact",
        activation: Activation = "recipe",
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        self.weights: dict[str, torch.Tensor] = {}
        """The dequantized float32 weight of each quantized layer."""
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(path))
        section = quantization(folder)
        if section is not None:
            self._quantize(section, tensors, math, activation)
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        if config.tie_word_embeddings:
            missing = [name for name in missing if name != "lm_head.weight"]
        if missing or unexpected:
            raise ValueError(f"{folder}: missing {missing}, not read {unexpected}")

    def _quantize(self, section: dict[str, Any], tensors: dict[str, torch.Tensor], math: Math, act: Activation) -> None:
        algo = section["quant_algo"]
        if algo not in RECIPES:
            raise NotImplementedError(f"no reference for quant_algo {algo!r}")
        if section.get("kv_cache_quant_algo") or section.get("kv_cache_scheme"):
            raise NotImplementedError("no reference for a quantized KV cache")
        recipe = RECIPES[algo]
        exclude = section.get("exclude_modules", section.get("ignore")) or []
        linears = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        for name in linears:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
                continue
            prefix = name + "."
            stored = [full for full in tensors if full.startswith(prefix)]
            parts = {full.removeprefix(prefix): tensors.pop(full) for full in stored}
            if parts.keys() - {"bias"} != recipe.tensors:
                raise ValueError(f"{name}: {sorted(parts)} are stored, {algo} wants {sorted(recipe.tensors)}")
            layer = QuantLinear(recipe, parts, section.get("group_size") or recipe.group, math, act)
            if (self.model.get_submodule(name).bias is None) != (layer.bias_values is None):
                raise ValueError(f"{name}: a bias too many or too few")
            self.model.set_submodule(name, layer)
            self.weights[name] = layer.weight_parts.dequantized()

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 log probabilities ``[len(ids), V]``; row ``t`` is about the token that follows ``ids[t]``."""
        logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.to(torch.float32), dim=-1)

    def input_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """The log probability of each token but the first, given those before it: ``[len(ids) - 1]``."""
        return self.logprobs(ids)[:-1].gather(1, torch.tensor(list(ids[1:])).unsqueeze(1)).squeeze(1)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The ``count`` tokens that follow ``ids`` when the likeliest is always taken."""
        sequence = list(ids)
        for _ in range(count):
            sequence.append(int(self.logprobs(sequence)[-1].argmax()))
        return sequence[len(ids) :]


def quantization(folder: Path) -> dict[str, Any] | None:
    """The quantization section of a checkpoint: of hf_quant_config.json, else of config.json, else None."""
    path = folder / "hf_quant_config.json"
    section: dict[str, Any] | None
    if path.exists():
        section = json.loads(path.read_text(encoding="utf-8"))["quantization"]
    else:
        section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return section


@dataclass(frozen=True)
class Difference:
    """How far two tables of log probabilities ``[T, V]`` are apart.

    A rounding to FP8 that falls the other way, for a difference of 1e-7 before it, moves its own row and all later rows
    of the same prompt by tenths. Between correct float32 implementations most rows agree to 1e-5 and a few do not:
    judge those by ``median``, on several short prompts. In bf16 every row has such roundings.

    Attributes:
        largest: the largest absolute difference.
        mean: the mean absolute difference.
        median: the median over the rows of the largest absolute difference in a row.
        divergence: the mean Kullback-Leibler divergence of the actual from the expected, in nats.
        same_top: the share of rows with the same likeliest token.
    """

    largest: float
    mean: float
    median: float
    divergence: float
    same_top: float

    def __str__(self) -> str:
        return (
            f"max {self.largest:.1e} mean {self.mean:.1e} median row {self.median:.1e} "
            f"KL {self.divergence:.1e} same top {self.same_top:.3f}"
        )


def difference(actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Compares log probabilities ``[T, V]``. NaN makes everything but ``same_top`` NaN."""
    if actual.shape != expected.shape:
        raise ValueError(f"{list(actual.shape)} against {list(expected.shape)}")
    apart = (actual - expected).abs()
    return Difference(
        largest=float(apart.max()),
        mean=float(apart.mean()),
        median=float(apart.amax(dim=-1).median()),
        divergence=float((expected.exp() * (expected - actual)).sum(dim=-1).mean()),
        same_top=float((actual.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean()),
    )
