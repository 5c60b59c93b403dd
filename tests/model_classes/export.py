"""A ModelOpt export of a model class without its values: names, types and shapes, in sparse files.

Hugging Face's class is built on the meta device with the default sizes of its configuration and few layers. ModelOpt itself inserts
its quantizers, which says what is quantized, writes the configuration, and maps names back to those of the hub. Only the packing is
left out: the tensors of a quantized layer are those that this package's table lists for the algorithm.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang_modelopt_ext.checkpoint.packed import DOWN, GATE_UP
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_ext.workflow.quantize.checks import PACKED_EXPERTS
from sglang_modelopt_kernels.formats.base import TensorSpec
from tests.model_classes.configs import save
from tests.support.sparse import SIZES, Header, write_sparse

TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int64: "I64",
}
BYTES = 2**31
"""Most bytes in one file: SGLang maps files whole, and a map counts as memory."""


NO_SMOOTHED = "ModelOpt 0.47 exports no smoothed experts"


class NoExport(Exception):
    """An export cannot be described; the message is the reason."""


@dataclass(frozen=True)
class Recipe:
    """What is exported.

    Attributes:
        algo: the algorithm of every quantized layer.
        preset: its configuration in ``modelopt.torch.quantization``.
        smoothing: whether every layer has a ``pre_quant_scale``.
    """

    algo: str
    preset: str
    smoothing: bool = False

    def specs(self) -> tuple[TensorSpec, ...]:
        """Return the tensors of one of its linear layers."""
        row = SCHEMES[self.algo]
        weight = row.weight_format(row.group_sizes[0], self.algo, "group_size")
        return LayerScheme(self.algo, weight, row.activation_format(), self.smoothing).tensors


RECIPES = (
    Recipe("W4A8_NVFP4_FP8", "W4A8_NVFP4_FP8_CFG"),
    Recipe("W4A8_AWQ", "W4A8_AWQ_BETA_CFG", smoothing=True),
    Recipe("FP8_PB_WO", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
)
"""Recipes whose tensors differ in kind: scales of a tensor, of blocks of a row, of squares, with an input scale, and smoothed."""


def write(folder: Path, model: nn.Module, recipe: Recipe | None) -> None:
    """Write the export of ``model`` into ``folder``; of the unquantized model for None."""
    tensors, section = quantized(model, recipe) if recipe else (unquantized(model), None)
    folder.mkdir(parents=True)
    _write_files(folder, {name: (TYPES[one.dtype], tuple(one.shape)) for name, one in tensors.items()})
    save(model.config, folder)
    if section is not None:
        content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": section}
        (folder / "hf_quant_config.json").write_text(json.dumps(content))


def unquantized(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that transformers saves."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(_plain(model, set())))
    return reverted


def quantized(model: nn.Module, recipe: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of an export with an NVFP4 KV cache where ModelOpt knows the attention, and the quantization section.

    The model keeps ModelOpt's quantizers.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_aware_conversion import (
        QuantConversionUnsupportedError,
        build_reverse_name_mapper,
        revert_quant_config_names,
        revert_weight_conversion_quant_aware,
    )
    from modelopt.torch.export.quant_utils import get_quant_config

    preset = copy.deepcopy(getattr(mtq, recipe.preset))
    preset["algorithm"] = None
    model = mtq.quantize(model, preset)
    section = get_quant_config(model)["quantization"]
    tensors: dict[str, torch.Tensor] = dict(_state(model, recipe))
    with suppress(QuantConversionUnsupportedError):  # ModelOpt then exports the names in memory, and so is done here
        mapper = build_reverse_name_mapper(model)
        tensors = revert_weight_conversion_quant_aware(model, tensors)
        revert_quant_config_names(section, mapper)
    return tensors, section


def _state(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the state of the quantized ``model`` in memory, its experts one by one."""
    replaced: set[str] = set()
    for name, module in model.named_modules():
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False) and module.weight.dim() == 2:
            replaced.add(f"{name}.weight")
            yield from _layer(name, *module.weight.shape, recipe)
        if getattr(getattr(module, "gate_up_proj_weight_quantizer", None), "is_enabled", False):
            replaced.update(f"{name}.{key}" for key in (GATE_UP, DOWN))
            yield from _packed_experts(name, module, recipe)
        first = getattr(module, "_first_proj_attr", None)
        if first is not None:
            is_quantized = getattr(module, f"{first}_weight_quantizers")[0].is_enabled
            if is_quantized and recipe.smoothing:
                raise NoExport(NO_SMOOTHED)
            replaced.update((f"{name}.{first}", f"{name}.down_proj"))
            yield from _experts(name, module, first, recipe if is_quantized else None)
    yield from _plain(model, replaced)


def _plain(model: nn.Module, replaced: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of ``model`` that are stored as they are."""
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if is_tied else set()
    for name, tensor in model.state_dict().items():
        if name not in replaced and name not in tied and "_quantizer" not in name:
            yield name, tensor


def _experts(name: str, module: Any, first: str, recipe: Recipe | None) -> Iterator[tuple[str, torch.Tensor]]:
    _, rows, hidden = getattr(module, first).shape
    projections = ("gate_proj", "up_proj") if module._is_gated else ("up_proj",)
    for expert in range(module.num_experts):
        for projection in projections:
            yield from _layer(f"{name}.{expert}.{projection}", rows // len(projections), hidden, recipe)
        yield from _layer(f"{name}.{expert}.down_proj", *module.down_proj.shape[1:], recipe)


def _packed_experts(name: str, module: Any, recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of packed experts as ``quantize`` exports them, ``[E, K, N]``."""
    if recipe.smoothing:
        raise NoExport(NO_SMOOTHED)
    if recipe.algo not in PACKED_EXPERTS:
        raise NoExport(f"packed experts are not exported in {recipe.algo}")
    for key in (GATE_UP, DOWN):
        count, k, n = getattr(module, key).shape
        for spec in recipe.specs():
            shape = spec.shape(n, k)
            stored = (count, shape[1], shape[0]) if len(shape) == 2 else shape
            tensor = torch.empty(stored, dtype=spec.dtypes[0], device="meta")
            yield f"{name}.{key}" + ("" if spec.name == "weight" else f"_{spec.name}"), tensor


def _layer(name: str, n: int, k: int, recipe: Recipe | None) -> Iterator[tuple[str, torch.Tensor]]:
    if recipe is None:
        yield f"{name}.weight", torch.empty(n, k, dtype=torch.bfloat16, device="meta")
        return
    for spec in recipe.specs():
        yield f"{name}.{spec.name}", torch.empty(spec.shape(n, k), dtype=spec.dtypes[0], device="meta")


def _write_files(folder: Path, tensors: Mapping[str, Header]) -> None:
    files: list[dict[str, Header]] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        more = math.prod(shape) * SIZES[dtype]
        if size + more > BYTES and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = (dtype, shape)
        size += more
    index = {}
    for number, part in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        write_sparse(folder / file, part, 0.5)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
