"""Checkpoints of tiny mixtures of experts that several tests share."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from tests.support import edits
from tests.support.exports import export
from tests.support.models import Family, TinyModel, model_dir

EXPERTS, TOP_K = 4, 2


def tiny(family: Family, **fields: int) -> TinyModel:
    """Return a mixture small enough to export in a second, whose halves are whole blocks of every format."""
    return TinyModel(family, **{"intermediate": 256, "experts": EXPERTS, "top_k": TOP_K} | fields)  # type: ignore[arg-type]


def mixed_checkpoint(
    family: Family,
    target: Path,
    experts: str = "W4A8_NVFP4_FP8_CFG",
    attention: str = "FP8_DEFAULT_CFG",
    **fields: int,
) -> Path:
    """Return a MIXED_PRECISION checkpoint of two exports: the experts of one, the attention layers of the other."""
    folders = {
        part: export(model_dir(tiny(family, **fields)), recipe) for part, recipe in (("e", experts), ("a", attention))
    }
    sections = {
        part: json.loads((folder / edits.QUANT_CONFIG).read_text(encoding="utf-8"))["quantization"]
        for part, folder in folders.items()
    }
    other = edits.read_tensors(folders["a"])
    layers: dict[str, dict[str, object]] = {}

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".self_attn." in name]:
            del tensors[name]
        tensors.update({name: tensor for name, tensor in other.items() if ".self_attn." in name})
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            section = sections["a" if ".self_attn." in name else "e"]
            module = name.removesuffix(".weight_scale")
            experts = module.partition(".experts.")  # ModelOpt lists all experts of a layer as one
            group_size = section.get("group_size")
            layers[experts[0] + ".experts" if experts[1] else module] = {
                "quant_algo": section["quant_algo"],
                **({} if group_size is None else {"group_size": group_size}),
            }

    folder = edits.copy_with(folders["e"], target, [edits.drop_embedded_config, edits.edit_tensors(mix)])
    section = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "exclude_modules": edits.REMOVE}
    edits.set_file_config(section)(folder)
    return folder


def one_expert_off(recipe: str) -> dict[str, Any]:
    """Return ModelOpt's configuration ``recipe`` without the weights of expert 2."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, recipe))
    off = [{"quantizer_name": f"*experts{name}", "enable": False} for name in ("*_weight_quantizers.2", ".2.*")]
    return {**config, "quant_cfg": [*config["quant_cfg"], *off]}


def swap_format(folder: Path, projection: str, experts: range) -> None:
    """Replace a projection of experts in layer 0 by that of an MXFP8 export, in the tensors and in the configuration."""
    other = edits.read_tensors(export(model_dir(tiny("qwen3_moe")), "MXFP8_DEFAULT_CFG"))
    modules = [f"model.layers.0.mlp.experts.{number}.{projection}" for number in experts]

    def swap(tensors: edits.Tensors) -> None:
        for module in modules:
            for name in [name for name in tensors if name.startswith(module + ".")]:
                del tensors[name]
            tensors.update({name: tensor for name, tensor in other.items() if name.startswith(module + ".")})

    def declare(content: dict[str, dict[str, dict[str, object]]]) -> None:
        for module in modules:
            content["quantization"]["quantized_layers"][module] = {"quant_algo": "MXFP8", "group_size": 32}

    edits.edit_tensors(swap)(folder)
    edits.edit_json(edits.QUANT_CONFIG, declare)(folder)


def unquantize(folder: Path, *patterns: str) -> None:
    """Decode layers of W4A8_NVFP4_FP8 to bf16, in the tensors alone, as ModelOpt exports an expert that a recipe leaves out."""
    form = WEIGHT_FORMATS["nvfp4_w4a8"]

    def change(tensors: edits.Tensors) -> None:
        for pattern in patterns:
            for name in edits.matching(tensors, f"{pattern}.weight"):
                prefix = name.removesuffix("weight")
                parts = {part.removeprefix(prefix): part for part in list(tensors) if part.startswith(prefix)}
                stored = {part: tensors.pop(full) for part, full in parts.items()}
                tensors[name] = form.decode(stored).dequantize().to(torch.bfloat16)

    edits.edit_tensors(change)(folder)
