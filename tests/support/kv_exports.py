"""Exports with a quantized KV cache: every preset, alone or on quantized layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.exports import Variant, export
from tests.support.models import Family, TinyModel, model_dir

PRESETS = {
    "fp8": "FP8_KV_CFG",
    "fp8_affine": "FP8_AFFINE_KV_CFG",
    "nvfp4": "NVFP4_KV_CFG",
    "nvfp4_affine": "NVFP4_AFFINE_KV_CFG",
    "nvfp4_rotate": "NVFP4_KV_ROTATE_CFG",
}
"""ModelOpt's configuration of each recipe."""

CAST_PRESETS = {"fp8": "fp8_cast", "nvfp4": "nvfp4_cast"}
"""The recipes that have a preset without calibration, which stores no scales."""

UNQUANTIZED: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
"""A configuration that quantizes nothing, to merge a KV cache into."""


def kv_export(recipe: str, family: Family = "llama", weights: str | None = None, **fields: Any) -> Path:
    """Return the export of a tiny model with that KV recipe; ``weights`` is the preset of its layers, None for none."""
    return _export(PRESETS[recipe], family, weights, **fields)


def cast_export(recipe: str, family: Family = "llama", weights: str | None = None) -> Path:
    """Return the export of a model by the preset without calibration."""
    return _export(CAST_PRESETS[recipe], family, weights)


def _export(preset: str, family: Family, weights: str | None, **fields: Any) -> Path:
    model = model_dir(TinyModel(family, **fields))
    return export(model, UNQUANTIZED if weights is None else weights, Variant(kv_cache=preset))
