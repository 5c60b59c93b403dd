"""An independent float32 reading of an exported checkpoint: the expected answers of a server.

Nothing here imports the packages under test. Weights are decoded by :mod:`tests.support.recipes`; the model around the
linear layers is the Hugging Face one.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import kv, reference_experts
from tests.support.recipes import (
    ACTIVATIONS,
    FP4_ROUNDINGS,
    FP8_MAX,
    OPTIONAL,
    RECIPES,
    Activation,
    Math,
    Parts,
    Recipe,
    Weight,
    to_e4m3,
)
from tests.support.reference_experts import QuantExperts

MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

VISION = ("vision_model.", "multi_modal_projector.")
"""Parts that no prompt of tokens reaches: a checkpoint may lack them."""

KV_CACHE_TENSORS = (".k_scale", ".v_scale", ".k_bias", ".v_bias")


class QuantLinear(nn.Module):
    """A linear layer that computes the recipe in float32, whatever the dtype of the model around it.

    ``math="fp8"`` rounds the units of the weight to E4M3, like a kernel that multiplies FP8 by FP8.
    """

    def __init__(self, recipe: Recipe, parts: Parts, group: int, math: Math, activation: Activation) -> None:
        super().__init__()
        weight = recipe.decode(parts, group)
        units = weight.units
        if math == "fp8":
            if bool(units.abs().amax() > FP8_MAX):
                raise ValueError("code * block scale exceeds 448: its rounding to E4M3 is not defined here")
            units = to_e4m3(units)
        # Plain attributes, not buffers, so that converting the model does not convert them.
        self.weight_parts = Weight(units, weight.scale)
        self.parts = parts
        self.bias_values = parts["bias"].to(torch.float32) if "bias" in parts else None
        keep = activation == "keep_fp4" and recipe.round_input in FP4_ROUNDINGS
        by_recipe = activation in ("recipe", "keep_fp4") and not keep
        self.round_input = recipe.round_input if by_recipe else ACTIVATIONS["none" if keep else activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``round(x * smoothing) W^T + low rank + bias``, rounded once to the dtype of ``x``."""
        smoothed = x.to(torch.float32)
        if "pre_quant_scale" in self.parts:
            smoothed = smoothed * self.parts["pre_quant_scale"].to(torch.float32)
        values, scale = self.round_input(smoothed, self.parts)
        y = (values @ self.weight_parts.units.T) * scale * self.weight_parts.scale.reshape(-1)
        if "svdquant_lora_a" in self.parts:
            low_rank = smoothed @ self.parts["svdquant_lora_a"].to(torch.float32).T
            y = y + low_rank @ self.parts["svdquant_lora_b"].to(torch.float32).T
        return (y if self.bias_values is None else y + self.bias_values).to(x.dtype)


class Reference:
    """The reference model of a checkpoint, on torch's default device; an unquantized one is read unchanged.

    Args:
        folder: the checkpoint.
        dtype: dtype of everything but the quantized layers: bfloat16 measures the noise of a bf16 server.
        math: see :class:`QuantLinear`.
        activation: the rounding of the recipe, or another one for comparison.
        kv_cache: the recipe that rounds keys and values; ``"unquantized"`` for ``--kv-cache-dtype bf16``; ``"none"`` for a
            checkpoint without a quantized cache.
        unrounded: patterns of layers whose inputs are not rounded, whatever the recipe.

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
        kv_cache: str = "none",
        unrounded: Sequence[str] = (),
    ) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        cls = getattr(transformers, config.architectures[0])
        config._experts_implementation = "eager"
        self.unrounded = tuple(unrounded)
        self.model: Any = cls._from_config(config, dtype=dtype, attn_implementation="eager").eval()
        self.weights: dict[str, torch.Tensor] = {}
        """The dequantized float32 weight of each quantized layer."""
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            stored = load_file(path, device=str(torch.get_default_device()))
            tensors.update({self._name(name): tensor for name, tensor in stored.items()})
        section = quantization(folder)
        cached: dict[str, torch.Tensor] = {}
        if section is not None:
            if section.get("kv_cache_quant_algo") or section.get("kv_cache_scheme"):
                if kv_cache == "none":
                    raise ValueError("a quantized KV cache: say how it is to be read")
                cached = {name: t for name, t in tensors.items() if name.endswith(KV_CACHE_TENSORS)}
                tensors = {name: t for name, t in tensors.items() if name not in cached}
            if section.get("quant_algo"):
                self._quantize(section, tensors, math, activation)
                self._decode_embedding(section, tensors)
        self._stack_experts(tensors)
        if kv_cache not in ("none", "unquantized"):
            kv.install(self.model, kv_cache, cached, _kv_layers(folder))
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        if config.tie_word_embeddings:
            missing = [name for name in missing if name != "lm_head.weight"]
        missing = [name for name in missing if not name.startswith(VISION)]
        if missing or unexpected:
            raise ValueError(f"{folder}: missing {missing}, not read {unexpected}")

    def _name(self, name: str) -> str:
        """Return the name of a stored tensor or layer, or a pattern of such, in Hugging Face's modules."""
        name = _common_name(name)
        if self.model.config.model_type != "qwen2_5_vl":
            return name
        if name.startswith("visual"):
            return f"model.{name}"
        # transformers stores the text part under the names of a model without a vision tower.
        return (
            name
            if name == "lm_head" or name.startswith("lm_head.")
            else name.replace("model.", "model.language_model.", 1)
        )

    def _quantize(self, section: dict[str, Any], tensors: dict[str, torch.Tensor], math: Math, act: Activation) -> None:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear):
                layer = self._read(section, tensors, name, math, act)
                if layer is None:
                    continue
                if (module.bias is None) != (layer.bias_values is None):
                    raise ValueError(f"{name}: a bias too many or too few")
                self.model.set_submodule(name, layer)
            elif name.endswith(".experts"):
                experts = self._read_experts(section, tensors, name, module, math, act)
                if experts:
                    self.model.set_submodule(name, reference_experts.in_place_of(module, experts))

    def _read_experts(
        self,
        section: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        name: str,
        module: Any,
        math: Math,
        act: Activation,
    ) -> list[list[torch.nn.Module]]:
        """Return the layers of each expert, an empty list when none is quantized."""
        parts = reference_experts.parts_of(module)
        if reference_experts.is_packed(tensors, name):
            parts = reference_experts.unpack(tensors, name, module.num_experts)
        names = [[f"{name}.{number}.{part}" for part in parts] for number in range(module.num_experts)]
        whole = {part for expert in names for part in expert if reference_experts.is_whole(tensors, part)}
        if len(whole) == len(parts) * module.num_experts:
            return []
        experts = [
            [
                reference_experts.PlainLinear(tensors.pop(f"{part}.weight"))
                if part in whole
                else self._read(section, tensors, part, math, act)
                for part in expert
            ]
            for expert in names
        ]
        read = [[layer for layer in expert if layer is not None] for expert in experts]
        if any(len(expert) != len(parts) for expert in read):
            raise ValueError(f"{name}: some of the experts' layers are declared as quantized, others are not")
        return read

    def _read(
        self, section: dict[str, Any], tensors: dict[str, torch.Tensor], name: str, math: Math, act: Activation
    ) -> QuantLinear | None:
        """Return the layer ``name`` out of ``tensors``, None when it is not quantized."""
        exclude = section.get("exclude_modules", section.get("ignore")) or []
        layer_section = section
        if "quantized_layers" in section:
            listed = {self._name(layer): entry for layer, entry in section["quantized_layers"].items()}
            # ModelOpt lists all experts of a layer under one name.
            layer_section = listed.get(name, listed.get(name.rpartition(".experts.")[0] + ".experts"))
        if layer_section is None or any(fnmatch.fnmatchcase(name, self._name(pattern)) for pattern in exclude):
            return None
        algo = layer_section["quant_algo"].upper()
        if algo not in RECIPES:
            raise NotImplementedError(f"no reference for quant_algo {algo!r}")
        prefix = name + "."
        stored = [full for full in tensors if full.startswith(prefix)]
        if (name, algo) == ("lm_head", "FP8") and "lm_head.input_scale" not in stored:
            algo = "FP8 weights"
        recipe = RECIPES[algo]
        parts = {_short(full.removeprefix(prefix)): tensors.pop(full) for full in stored}
        if parts.keys() - OPTIONAL - recipe.optional != recipe.tensors - recipe.optional:
            raise ValueError(f"{name}: {sorted(parts)} are stored, {algo} wants {sorted(recipe.tensors)}")
        act = "none" if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.unrounded) else act
        layer = QuantLinear(recipe, parts, layer_section.get("group_size") or recipe.group, math, act)
        self.weights[name] = layer.weight_parts.dequantized()
        return layer

    def _stack_experts(self, tensors: dict[str, torch.Tensor]) -> None:
        """Stack unquantized experts that are stored one by one."""
        for name, module in self.model.named_modules():
            if not name.endswith(".experts") or isinstance(module, QuantExperts):
                continue
            if f"{name}.down_proj" not in tensors:
                reference_experts.stack(tensors, name, module)

    def _decode_embedding(self, section: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        layer = section.get("quantized_layers", {}).get("model.embed_tokens")
        if layer is None:
            return
        prefix = "model.embed_tokens."
        if f"{prefix}weight_scale" not in tensors and tensors[f"{prefix}weight"].is_floating_point():
            return  # listed and not quantized: what ModelOpt exports of a head that is tied to it
        parts = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        recipe = RECIPES[layer["quant_algo"].upper()]
        tensors[f"{prefix}weight"] = recipe.decode(parts, layer.get("group_size") or recipe.group).dequantized()

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Return float32 log probabilities ``[len(ids), V]``; row ``t`` is for the token after ``ids[t]``."""
        logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.to(torch.float32), dim=-1)

    def input_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the log probability of each token but the first, given those before it: ``[len(ids) - 1]``."""
        return self.logprobs(ids)[:-1].gather(1, torch.tensor(list(ids[1:])).unsqueeze(1)).squeeze(1)

    @torch.no_grad()
    def class_scores(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the scores that a sequence classifier gives its classes for the whole of ``ids``, in float32."""
        scores: torch.Tensor = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return scores.to(torch.float32)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the ``count`` tokens of the greedy continuation of ``ids``."""
        sequence = list(ids)
        for _ in range(count):
            sequence.append(int(self.logprobs(sequence)[-1].argmax()))
        return sequence[len(ids) :]


def _common_name(name: str) -> str:
    """Return a checkpoint's name in Hugging Face's modules: Mixtral's experts in Qwen's spelling, Nemotron-H's ``backbone``.

    ModelOpt 0.47 leaves a mark of its own, which begins with a NUL, behind names of Nemotron-H that it excludes.
    """
    name = name.partition(".\0")[0]
    parts = ["mlp" if part == "block_sparse_moe" else part for part in name.split(".")]
    if "experts" in parts:
        parts = [MIXTRAL_PARTS.get(part, part) for part in parts]
    if parts[0] == "backbone":
        parts[0] = "model"
    return ".".join(parts)


def _short(name: str) -> str:
    """Return a layer's tensor without the prefix ModelOpt leaves before the low-rank factors."""
    return name.removeprefix("weight_quantizer._")


def quantization(folder: Path) -> dict[str, Any] | None:
    """Return the quantization section of hf_quant_config.json, else of config.json, else None."""
    path = folder / "hf_quant_config.json"
    section: dict[str, Any] | None
    if path.exists():
        section = json.loads(path.read_text(encoding="utf-8"))["quantization"]
    else:
        section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return section


def _kv_layers(folder: Path) -> dict[str, str]:
    """Return the recipes of layers whose KV cache has another one than the rest, by the layer's number."""
    path = folder / "hf_quant_config.json"
    record = json.loads(path.read_text(encoding="utf-8")).get("sglang_modelopt_ext", {}) if path.exists() else {}
    return dict(record.get("kv_cache_layers", {}))


@dataclass(frozen=True)
class Difference:
    """The distance of two tables of log probabilities ``[T, V]``.

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
    """Compare log probabilities ``[T, V]``. NaN makes everything but ``same_top`` NaN."""
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
