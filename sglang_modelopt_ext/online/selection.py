"""The linear layers and experts of an unquantized checkpoint that ModelOpt's presets would quantize, by their stored names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.errors import ModelOptExtError

DISABLED = (
    "*block_sparse_moe.gate*",
    "*linear_attn.conv1d*",
    "*self_attention.conv1d*",
    "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*",
    "*lm_head*",
    "*mixer.conv1d*",
    "*mlp.gate.*",
    "*mlp.shared_expert_gate.*",
    "*output_layer*",
    "*proj_out.*",
    "*router*",
    "mtp.*",
    "output.*",
    "*embed_vision*",
    "*vision_tower*",
    "*visual*",
    "*vision_model*",
    "*multi_modal_projector*",
)
"""The quantizers that ModelOpt 0.47 leaves off by default (``configs/ptq/units/default_disabled_quantizers.yaml``)."""

BY_DEFAULT = "ModelOpt leaves it by default"
"""The reason of the layers of :data:`DISABLED`."""

_QUANTIZER = "weight_quantizer"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Selection:
    """The layers of a checkpoint, told apart.

    Attributes:
        quantized: the modules to quantize, by their stored names, sorted.
        left: linear layers that stay as they are, with the reason.
        excluded: the modules that the result declares as not quantized, sorted.
    """

    quantized: tuple[str, ...]
    left: dict[str, str]
    excluded: tuple[str, ...]


def select(folder: Path, stored: Mapping[str, StoredTensor], block: int, trust_remote_code: bool = False) -> Selection:
    """Choose the layers to quantize.

    Args:
        folder: an unquantized checkpoint that transformers knows.
        stored: its tensors.
        block: K elements of a block; a layer of another K is left as it is.
        trust_remote_code: whether the model's own code may build it.

    Raises:
        ModelOptExtError: transformers cannot build the model, its experts are packed, a layer has no floating-point weight, or
            there is nothing to quantize.
    """
    model = _model_on_meta(folder, trust_remote_code)
    targets = _targets(model, stored)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    mixtures = {name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in name}
    quantized: list[str] = []
    # Tied heads are not stored, and ModelOpt lists them.
    excluded = {"lm_head"} if "lm_head" in linears else set()
    left = dict.fromkeys(
        sorted(linears - {_module(name) for name in targets.values()} - {"lm_head"}), "it is not stored"
    )
    for name, tensor in stored.items():
        module, target = _module(name), targets[name]
        if len(tensor.shape) > 2 and target in mixtures:
            raise ModelOptExtError.at(tensor.file, name, "experts that are stored one by one", list(tensor.shape))
        if name != f"{module}.weight" or len(tensor.shape) < 2:
            continue
        if target in mixtures or _module(target) in linears:
            reason = _reason(_module(target), tensor, block)
            if reason is None:
                quantized.append(module)
                continue
            left[module] = reason
        excluded.add(module)
    if not quantized:
        raise ModelOptExtError.at(folder, "layers", f"a linear layer with K a multiple of {block}", "none")
    return Selection(tuple(sorted(quantized)), left, tuple(sorted(excluded)))


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _targets(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the parameter of the model that each stored tensor becomes, or becomes a part of, as transformers loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    parameters = model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)[0]
        for name in sorted(names, key=dot_natural_key)  # some rules depend on the names before
    }


def _reason(module: str, tensor: StoredTensor, block: int) -> str | None:
    """Return why a linear layer is not quantized, or None. Raises ModelOptExtError for a weight that is not floating-point."""
    if any(fnmatch.fnmatch(f"{module}.{_QUANTIZER}", pattern) for pattern in DISABLED):
        return BY_DEFAULT
    if tensor.dtype not in _DTYPES:
        raise ModelOptExtError.at(tensor.file, tensor.name, "an unquantized weight (bf16, fp16 or fp32)", tensor.dtype)
    k = tensor.shape[1]
    return f"K = {k} is not a multiple of {block}" if k % block else None


def _model_on_meta(folder: Path, trust_remote_code: bool) -> Any:
    """Return the model that transformers builds for a checkpoint, without weights."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        own = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel):
                return own(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # the many ways in which a model's configuration or code can be wrong
        got = f"{type(error).__name__}: {error}"[:300]
        raise ModelOptExtError.at(folder, "model", "one that transformers can build", got) from error
