"""A tiny checkpoint in the layout of SGLang's ``w4afp8``, for which ModelOpt has no preset, and the same weights in ModelOpt's own.

Hand-written: experts of INT4 codes under the scales of 128 inputs each, whose inputs are rounded to E4M3 by one stored scale, and
attention layers of E4M3 codes under the scales of 128 x 128 tiles, whose inputs SGLang rounds by token and 128 inputs. So is the
published DeepSeek-R1-W4AFP8, from which SGLang's ``layers/quantization/w4afp8.py`` comes. Its ``hf_quant_config.json`` names
``MIXED_PRECISION`` and no layers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support import edits
from tests.support.models import Family, TinyModel
from tests.support.moe import mixed_checkpoint, tiny

FAMILY: Family = "qwen3_moe"
SIZES = {"hidden": 512, "intermediate": 256, "layers": 1}
"""Inputs of experts by which SGLang's product takes both of its tiles: 512, and 128 where the size is no multiple of that."""

GROUP, LARGEST_CODE = 128, 7
EXPERTS, ATTENTION = "FP8_DEFAULT_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"
"""The exports that the codes are made of: the first has the scales of the experts' inputs."""


def model(max_position: int) -> TinyModel:
    """Return the model."""
    return tiny(FAMILY, max_position=max_position, **SIZES)


def served_layout(target: Path, max_position: int) -> Path:
    """Write the checkpoint as SGLang reads it to the new folder ``target``."""
    folder = mixed_checkpoint(FAMILY, target, EXPERTS, ATTENTION, max_position=max_position, **SIZES)
    edits.edit_tensors(_to_sglang)(folder)
    edits.edit_json(edits.QUANT_CONFIG, lambda content: content["quantization"].pop("quantized_layers"))(folder)
    return folder


def read_layout(target: Path, max_position: int) -> Path:
    """Write the same weights to the new folder ``target``, by algorithms that a reading knows."""
    folder = mixed_checkpoint(FAMILY, target, EXPERTS, ATTENTION, max_position=max_position, **SIZES)
    edits.edit_tensors(_to_modelopt)(folder)
    experts, blocks = {"quant_algo": "W4A8_AWQ", "group_size": GROUP}, {"quant_algo": "FP8_BLOCK_SCALES"}

    def declare(content: dict[str, dict[str, dict[str, object]]]) -> None:
        layers = content["quantization"]["quantized_layers"]
        layers.update({name: experts if name.endswith(".experts") else blocks for name in layers})

    edits.edit_json(edits.QUANT_CONFIG, declare)(folder)
    return folder


def _to_sglang(tensors: edits.Tensors) -> None:
    for module, codes, scale, input_scale in _experts(tensors):
        nibbles = codes & 15
        tensors[f"{module}.weight"] = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
        tensors[f"{module}.weight_scale_inv"] = scale
        tensors[f"{module}.input_scale"] = input_scale.to(torch.bfloat16)
    for name in edits.matching(tensors, "*.self_attn.*.weight_scale"):
        rows, _, columns, _ = tensors[name].shape
        tensors[f"{name}_inv"] = tensors.pop(name).reshape(rows, columns)


def _to_modelopt(tensors: edits.Tensors) -> None:
    for module, codes, scale, input_scale in _experts(tensors):
        nibbles = codes & 15
        tensors[f"{module}.weight"] = (nibbles[0::2] | nibbles[1::2] << 4).to(torch.uint8)
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_scale_2"] = torch.ones(())
        tensors[f"{module}.input_scale"] = input_scale


def _experts(tensors: edits.Tensors) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Take the experts' layers out of an FP8 export: name, INT4 codes, their scales ``[N, K / 128]`` and that of the inputs.

    Scales are values of bf16, to which SGLang rounds them; inputs have one scale in all experts of a layer, SGLang's largest.
    """
    names = [name.removesuffix(".weight") for name in edits.matching(tensors, "*.experts.*.weight")]
    scales: dict[str, torch.Tensor] = {}
    for name in names:
        kind = _kind(name)
        scales[kind] = torch.maximum(scales.get(kind, torch.zeros(())), tensors[f"{name}.input_scale"])
    found = []
    for name in names:
        weight = tensors.pop(f"{name}.weight").to(torch.float32) * tensors.pop(f"{name}.weight_scale")
        del tensors[f"{name}.input_scale"]
        groups = weight.unflatten(1, (-1, GROUP))
        scale = _bf16(groups.abs().amax(dim=-1) / LARGEST_CODE)
        codes = (groups / scale.unsqueeze(-1)).round().clamp(-LARGEST_CODE - 1, LARGEST_CODE)
        found.append((name, codes.flatten(1).to(torch.int32), scale, _bf16(scales[_kind(name)])))
    return found


def _kind(name: str) -> str:
    """Return the layers that share a scale: gate and up of all experts of a layer, or their down."""
    block, _, rest = name.partition(".experts.")
    return f"{block}.{rest.endswith('.down_proj')}"


def _bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(torch.float32)
