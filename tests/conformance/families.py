"""Exports of families that SGLang 0.5.23 runs on a GPU only, each beside its unquantized twin.

A twin that fails, or is wrong, says that a fault is SGLang's: it is served without this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import edits
from tests.support.cache import cached_folder, digest, folder_digest, source_digest
from tests.support.exports import Variant, export
from tests.support.kv_exports import UNQUANTIZED
from tests.support.reference import VISION
from tests.support.served_models import served_dir

STATES: dict[str, Any] = {"disable_radix_cache": True}
"""Keeps the states of linear attention of running requests only; SGLang gives them half of the GPU's memory otherwise."""

OURS: dict[str, Any] = {"quantization": "modelopt_ext"}
"""Asks for this package where SGLang serves the checkpoint too."""

W4A8 = {
    "w4a8-nvfp4": ("W4A8_NVFP4_FP8", "W4A8_NVFP4_FP8_CFG"),
    "w4a8-mxfp4": ("W4A8_MXFP4_FP8", "W4A8_MXFP4_FP8_CFG"),
}
BLOCK_FP8 = {"fp8-blocks": ("FP8_PB_WO", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")}
PACKED = {"nvfp4": ("NVFP4", "NVFP4_DEFAULT_CFG"), "fp8": ("FP8", "FP8_DEFAULT_CFG")}
"""Recipes that ModelOpt exports right for packed experts, and SGLang serves too."""
CHANNEL_FP8 = {"fp8-channel-token": ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PER_CHANNEL_PER_TOKEN_CFG")}

BLOCK_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
"""Nemotron-H's kinds of layers: by transformers 5's name, the one of published checkpoints, which SGLang knows."""


def _deepseek_fields(config: dict[str, Any]) -> None:
    config.update({"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"})


def _nemotron_block_types(config: dict[str, Any]) -> None:
    for name in ("layers_block_type", "mtp_layers_block_type"):
        config[name] = [BLOCK_TYPES.get(kind, kind) for kind in config[name]]


def _without_vision(tensors: edits.Tensors) -> None:
    for name in [name for name in tensors if name.startswith(VISION)]:
        del tensors[name]


PUBLISHED: dict[str, edits.Edit] = {
    "deepseek_v3": edits.edit_json(edits.CONFIG, _deepseek_fields),
    "nemotron_h": edits.edit_json(edits.CONFIG, _nemotron_block_types),
    "minimax_m2": edits.set_fields(
        edits.CONFIG,
        {"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer"},
    ),
    # SGLang serves Llama 4 without its vision tower unless it is asked for.
    "llama4_vl": edits.edit_tensors(_without_vision),
}
"""By model: changes to what published checkpoints have and SGLang reads, where transformers 5 writes something else."""


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        model: its name in :mod:`tests.support.served_models`.
        recipes: by the beginning of a case's name, algorithm and preset of ModelOpt.
        mixture: whether it has experts.
        args: arguments of its engines.
        twin: further arguments of the unquantized twin's.
        unquantized: by recipe, patterns of layers that it leaves unquantized.
        packed: whether its experts are stored packed: their W4A8 is exported as ``quantize`` does, ModelOpt alone does not.
        ours: recipes that are served by this package when it is asked for, and by SGLang alone in a case of its own.
        prefixes: whether prompts with a cached prefix are sent.
    """

    model: str
    recipes: Mapping[str, tuple[str, str]]
    mixture: bool = False
    args: Mapping[str, Any] = field(default_factory=dict)
    twin: Mapping[str, Any] = field(default_factory=dict)
    unquantized: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packed: bool = False
    ours: tuple[str, ...] = ()
    prefixes: bool = True


ARCHITECTURES: dict[str, Architecture] = {
    "gpt-oss": Architecture(
        "gpt_oss", PACKED | CHANNEL_FP8 | W4A8, mixture=True, ours=tuple(PACKED), packed=True, prefixes=False
    ),
    "qwen3-next": Architecture("qwen3_next", W4A8, mixture=True, args=STATES, prefixes=False),
    "qwen3-5": Architecture("qwen3_5", W4A8, args=STATES, prefixes=False),
    "deepseek-v3": Architecture("deepseek_v3", W4A8 | BLOCK_FP8, mixture=True),
    # SGLang's choice for an unquantized Nemotron-H is compiled when it starts, for minutes.
    "nemotron-h": Architecture(
        "nemotron_h", W4A8, mixture=True, args=STATES, twin={"moe_runner_backend": "triton"}, prefixes=False
    ),
    # SGLang's class reorders the rows of q's and k's weights when it loads them, and alone not those of their scales.
    "llama4": Architecture(
        "llama4_vl",
        PACKED | CHANNEL_FP8 | W4A8,
        mixture=True,
        unquantized=dict.fromkeys(("nvfp4", "fp8-channel-token"), ("*self_attn*",)),
        ours=tuple(PACKED),
        packed=True,
        prefixes=False,
    ),
    "gemma3": Architecture("gemma3", W4A8),
    "minimax-m2": Architecture("minimax_m2", W4A8, mixture=True),
    # SGLang fuses its shared expert into the routed ones on a GPU.
    "glm4-moe": Architecture("glm4_moe", W4A8, mixture=True),
    # Text alone: with images SGLang asks for the processor of a published model.
    "qwen2-5-vl": Architecture("qwen2_5_vl", W4A8, args={"enable_multimodal": False}),
    "qwen3-vl": Architecture("qwen3_vl", W4A8, args={"enable_multimodal": False}),
}


def with_cache(name: str, kv_cache: Any) -> Path:
    """Return the export of a family with a quantized KV cache, by ModelOpt's preset, and unquantized layers."""
    return export(served_dir(ARCHITECTURES[name].model), UNQUANTIZED, Variant(kv_cache=kv_cache))


def folder_of(name: str, recipe: str | None = None) -> Path:
    """Return the export of a family by a recipe of it, or the unquantized model, as SGLang reads it."""
    of = ARCHITECTURES[name]
    model, folder = of.model, served_dir(of.model)
    if recipe is not None:
        along_k = of.packed and recipe in W4A8
        folder = export(folder, of.recipes[recipe][1], Variant(exclude=of.unquantized.get(recipe, ()), along_k=along_k))
    return published(model, folder)


def published(model: str, folder: Path) -> Path:
    """Return a folder of a model as published checkpoints have it, itself where nothing differs."""
    change = PUBLISHED.get(model)
    if change is None:
        return folder
    key = digest(folder_digest(folder), source_digest(Path(__file__)))

    def fill(target: Path) -> None:
        target.rmdir()
        edits.copy_with(folder, target, (change,))

    return cached_folder("edited", f"{model}-{key}", fill)
