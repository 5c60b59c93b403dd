"""The faults of SGLang 0.5.22 and 0.5.23 with ModelOpt checkpoints on a GPU: each rule describes one way in which they fail or err.

Read from the sources of their wheels (``layers/quantization/modelopt_quant.py``, ``configs/model_config.py``,
``model_loader/weight_utils.py``, ``models/``). No SGLang is imported here. Where the two differ, the
installed one counts (:func:`~sglang_modelopt_ext.schemes.versions.described_sglang`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.checkpoint.names import EMBEDDINGS, EXPERT, FUSED_SHARDS, is_vocabulary
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QuantConfig
from sglang_modelopt_ext.checkpoint.stock_models import (
    MODELS_THAT_RENAME_BLOCK_SCALES,
    MODELS_WITH_PACKED_EXPERTS,
    unmapped_in,
)
from sglang_modelopt_ext.checkpoint.tensors import read_json_object, stored_shape, tensor_names
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import PRE_QUANT_SCALE
from sglang_modelopt_ext.schemes.table import MIXED_PRECISION, SCHEMES
from sglang_modelopt_ext.schemes.versions import described_sglang

NVFP4_ALGOS = frozenset({"NVFP4", "W4A16_NVFP4"})
"""Without one of these in a mix, SGLang takes it for ``w4afp8``."""

BLOCK_FP8_ALGOS = frozenset({"MXFP8", "FP8_PB_WO", "FP8_BLOCK_SCALES"})
"""FP8 algorithms with block scales: SGLang's tensor is called ``weight_scale_inv``, ModelOpt 0.47 exports ``weight_scale``."""

MIX_ALGOS = NVFP4_ALGOS | BLOCK_FP8_ALGOS | {"FP8"}
"""Algorithms that ``ModelOptMixedPrecisionConfig`` supports; it takes a layer of any other for unquantized."""

GROUP_SIZE = 16
"""The only NVFP4 group size that SGLang serves."""

FP8_EXPERTS_CAPABILITY = 89
"""The compute capability from which SGLang serves FP8 experts: they run in Triton, which has no E4M3 below SM89.

FP8 linear layers run from SM80, in Marlin.
"""

FP8_INSTRUCTIONS_CAPABILITY = 89
"""The compute capability from which SGLang rounds the inputs of FP8 linear layers; before, they run in Marlin."""

_ATTENTION_LAYER = "model.layers.0.self_attn.q_proj"
_STOCK_DIMENSIONS = 2
_STOCK_SCALE, _MODELOPT_SCALE, _INPUT_SCALE = "weight_scale_inv", "weight_scale", "input_scale"


@dataclass(frozen=True)
class Subject:
    """A checkpoint and a GPU, as the rules see them.

    Attributes:
        config: the checkpoint's declared quantization.
        folder: the checkpoint's folder.
        gpu: the NVIDIA GPU of the server.
    """

    config: QuantConfig
    folder: Path
    gpu: Device

    @property
    def is_mix(self) -> bool:
        """Whether the checkpoint is MIXED_PRECISION, with an algorithm for each layer."""
        return self.config.algo == MIXED_PRECISION

    @cached_property
    def algos(self) -> frozenset[str]:
        """The algorithms of its layers."""
        layers = self.config.quantized_layers.values()
        return frozenset(layer.algo for layer in layers) if self.is_mix else frozenset({self.config.algo or ""})

    @cached_property
    def tensors(self) -> Collection[str] | None:
        """The names of its tensors, None where they cannot be known (yet)."""
        try:
            return tensor_names(self.folder) or None
        except ModelOptExtError:
            return None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, None where it cannot be known (yet)."""
        try:
            return stored_shape(self.folder, name)
        except ModelOptExtError:
            return None

    @cached_property
    def fields(self) -> Mapping[str, Any]:
        """The content of its config.json, empty without a readable one."""
        try:
            return read_json_object(self.folder / CONFIG_NAME)
        except ModelOptExtError:
            return {}

    @cached_property
    def model(self) -> str | None:
        """The architecture that SGLang builds, the first of config.json; None where there is none."""
        architectures = self.fields.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        return first if isinstance(first, str) else None


def stock_fault(config: QuantConfig, folder: Path, device: Device) -> str | None:
    """Return why SGLang does not serve the checkpoint correctly, None when it does.

    Args:
        config: its declared quantization; every algorithm is one of the scheme table or of :data:`MIX_ALGOS`.
        folder: the checkpoint's folder.
        device: a CPU, or an NVIDIA GPU.
    """
    if device.kind == "cpu":
        return "it has no CPU kernels for ModelOpt's formats"
    subject = Subject(config, folder, device)
    return next((fault for rule in RULES if (fault := rule(subject)) is not None), None)


def stores_stock_scales(folder: Path) -> bool:
    """Return whether a checkpoint names block scales ``weight_scale_inv``, as SGLang does; this package does not read that."""
    try:
        return any(name.endswith(f".{_STOCK_SCALE}") for name in tensor_names(folder))
    except ModelOptExtError:
        return False


def _algorithm(subject: Subject) -> str | None:
    if subject.is_mix:
        if not subject.algos & NVFP4_ALGOS:
            return "it takes a mix without an NVFP4 layer for w4afp8"
        if other := sorted(subject.algos - MIX_ALGOS):
            return f"it takes layers of {', '.join(other)} in a mix for unquantized ones"
        return None
    (algo,) = subject.algos
    capability = SCHEMES[algo].stock_capability
    if capability is None:
        return f"it does not serve {algo} as ModelOpt exports it"
    return f"it serves {algo} rightly from SM{capability} on" if subject.gpu.before(capability) else None


def _fp8_experts(subject: Subject) -> str | None:
    if not subject.is_mix or subject.gpu.at_least(FP8_EXPERTS_CAPABILITY):
        return None
    layers = subject.config.quantized_layers.items()
    found = any(layer.algo == "FP8" and ".experts" in f".{name}" for name, layer in layers)
    return f"it serves FP8 experts from SM{FP8_EXPERTS_CAPABILITY} on" if found else None


def _group_size(subject: Subject) -> str | None:
    layers = subject.config.quantized_layers.values()
    sizes = {layer.group_size for layer in layers if layer.algo in NVFP4_ALGOS}
    if not subject.is_mix and "NVFP4" in (subject.config.algo or ""):
        sizes = {subject.config.group_size}
    other = sorted(size for size in sizes if size not in (None, GROUP_SIZE))
    return f"it serves NVFP4 in groups of {GROUP_SIZE}, not {other[0]}" if other else None


def _experts_of_one_layer(subject: Subject) -> str | None:
    algos: dict[str, set[str]] = {}
    for name, layer in subject.config.quantized_layers.items():
        block, experts, _ = name.partition(".experts.")
        if experts:
            algos.setdefault(block, set()).add(layer.algo)
    if any(len(found) > 1 for found in algos.values()):
        return "it gives the experts of a layer one algorithm, these have several"
    stored: dict[str, dict[bool, str]] = {}
    tensors = subject.tensors or ()
    for name in tensors:
        module, _, last = name.rpartition(".")
        expert = EXPERT.fullmatch(module) if last == "weight" else None
        if expert is not None:
            is_quantized = any(f"{module}.{scale}" in tensors for scale in (_MODELOPT_SCALE, _STOCK_SCALE))
            stored.setdefault(expert["layer"], {})[is_quantized] = module
    plain = next((kinds[False] for kinds in stored.values() if len(kinds) > 1), None)
    return f"it takes {plain} for quantized, as other experts of its layer are" if plain else None


def _mixtral(subject: Subject) -> str | None:
    if subject.fields.get("model_type") != "mixtral" or subject.config.layer(_ATTENTION_LAYER):
        return None
    return "it fails on a Mixtral whose attention is not quantized"


def _packed_experts(subject: Subject) -> str | None:
    """Return the fault of a class that loads packed experts alone: under a name of ModelOpt's SGLang takes them one by one."""
    if subject.model not in MODELS_WITH_PACKED_EXPERTS:
        return None
    return f"it does not load the packed experts of {subject.model} under a quantization of ModelOpt's"


def _fused_shards(subject: Subject) -> str | None:
    """Return the fault of a mix whose model class has no ``packed_modules_mapping``: its fused layers are taken for unquantized.

    NVFP4 then fails an assertion on the weight's shape; FP8 codes are copied as if they were values, without their scales.
    """
    unmapped = unmapped_in(described_sglang()).get(subject.model or "", ())
    shards = {shard for layer in unmapped for shard in FUSED_SHARDS[layer]}
    names = (name for name in subject.config.quantized_layers if not EXPERT.fullmatch(name))
    shard = next((name for name in names if name.rpartition(".")[2] in shards), None)
    return f"it does not find {shard} in a mix of {subject.model}" if shard else None


def _embedding(subject: Subject) -> str | None:
    listed = {
        name: layer.algo
        for name, layer in subject.config.quantized_layers.items()
        if name.rpartition(".")[2] in EMBEDDINGS
    }
    wrong = next((name for name, algo in listed.items() if algo != "NVFP4"), None)
    if wrong is None and subject.tensors is not None:
        modules = (name.rpartition(".")[0] for name in subject.tensors if name.endswith(f".{_MODELOPT_SCALE}"))
        wrong = next((name for name in modules if name.rpartition(".")[2] in EMBEDDINGS and name not in listed), None)
    return f"it takes the quantized {wrong} for unquantized" if wrong else None


def _unrounded_head(subject: Subject) -> str | None:
    """Return the fault of an FP8 head that stores no scale of its input: SGLang rounds by the least float32 in its place."""
    if subject.tensors is None or subject.gpu.before(FP8_INSTRUCTIONS_CAPABILITY):
        return None
    for name, layer in subject.config.quantized_layers.items():
        scales = (f"{name}.{scale}" in subject.tensors for scale in (_MODELOPT_SCALE, _INPUT_SCALE))
        if layer.algo == "FP8" and is_vocabulary(name) and tuple(scales) == (True, False):
            return f"it rounds the input of {name}, which stores no {_INPUT_SCALE}"
    return None


def _smoothing(subject: Subject) -> str | None:
    if subject.algos == {"NVFP4_AWQ"} or subject.tensors is None:
        return None
    stored = any(name.endswith(f".{PRE_QUANT_SCALE.name}") for name in subject.tensors)
    return f"it multiplies by {PRE_QUANT_SCALE.name} for NVFP4_AWQ alone" if stored else None


def _block_scales(subject: Subject) -> str | None:
    """Return the fault of FP8 block scales under ModelOpt's name: most model classes drop them with a warning.

    The others fail an assertion on the shape of a tile's scales with a dimension of one entry behind each, ModelOpt 0.47's.
    """
    if not subject.algos & BLOCK_FP8_ALGOS or subject.tensors is None:
        return None
    seen: set[str] = set()  # a file is opened for each: all layers of an algorithm have scales of one form
    for name in subject.tensors:
        module, _, last = name.rpartition(".")
        layer = subject.config.listed(module) if last == _MODELOPT_SCALE else None
        if layer is None or layer.algo not in BLOCK_FP8_ALGOS - seen:
            continue
        seen.add(layer.algo)
        if subject.model not in MODELS_THAT_RENAME_BLOCK_SCALES:
            return f"it drops the block scales of {layer.algo} under ModelOpt's name for them, {name}"
        shape = subject.shape(name)
        if shape is not None and len(shape) > _STOCK_DIMENSIONS:
            return f"it takes block scales of {layer.algo} in {_STOCK_DIMENSIONS} dimensions, not {name} {list(shape)}"
    return None


RULES: tuple[Callable[[Subject], str | None], ...] = (
    _algorithm,
    _group_size,
    _experts_of_one_layer,
    _fp8_experts,
    _mixtral,
    _packed_experts,
    _fused_shards,
    _embedding,
    _unrounded_head,
    _smoothing,
    _block_scales,
)
"""The rules: each returns a fault, or None. The first fault found is reported."""
