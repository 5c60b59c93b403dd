"""The quantization config that SGLang builds for a checkpoint of this package: its detection, and the method of each layer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from sglang_modelopt_ext.backends.select import rounds_fp4
from sglang_modelopt_ext.checkpoint.experts import ExpertLayer, ExpertSet, check_shared, projections_of
from sglang_modelopt_ext.checkpoint.kv_cache import STOCK_FLAGS
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.ownership import owned_family
from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    QUANT_CONFIG_NAME,
    QuantConfig,
    canonical_name,
    parse_quant_config,
)
from sglang_modelopt_ext.checkpoint.reader import (
    FUSED_SHARDS,
    Checkpoint,
    assumption,
    check_scalar_values,
    layer_scheme,
)
from sglang_modelopt_ext.checkpoint.unserved import read_for_serving
from sglang_modelopt_ext.env import w4a8_math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.devices import server_device
from sglang_modelopt_ext.integration.drafts import check_unquantized, inherits_flag, is_part_of_a_model
from sglang_modelopt_ext.integration.folders import config_folder, weights_folder
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.linear_method import ModelOptExtLinearMethod
from sglang_modelopt_ext.integration.moe_method import ExtFusedMoEMethod
from sglang_modelopt_ext.integration.session import Session
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import FAMILIES, MIXED_PRECISION, SCHEMES, UMBRELLA, find_scheme, math_of

if TYPE_CHECKING:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

logger = logging.getLogger(__name__)

MIXTRAL_BLOCK, COMMON_BLOCK = "block_sparse_moe", "mlp"
"""The name of the block around the experts in Mixtral, and in all other models."""

SERVED_LOAD_FORMATS = ("auto", "safetensors", "fastsafetensors", "runai_streamer", "dummy")
"""``--load-format`` values that are supported: their weights pass through the strict reader, and ``dummy`` reads none."""


class ModelOptExtConfig(QuantizationConfig):
    """The quantization of one checkpoint, which SGLang asks for the method of every layer.

    Attributes:
        weight_block_size: SGLang's name for the blocks of its own FP8 layers, None here; DeepSeek's classes ask for it.

    Args:
        family: the ``--quantization`` name that it is served under.
        config: the checkpoint's declared quantization.
        checkpoint: the checkpoint's tensors, None for ``--load-format dummy``.
        packed_modules_mapping: the model's fused layers and their shards, in addition to the usual ones.
    """

    weight_block_size: None = None

    def __init__(
        self,
        family: str,
        config: QuantConfig,
        checkpoint: Checkpoint | None,
        packed_modules_mapping: Mapping[str, list[str]] | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        self.config = config
        self.checkpoint = checkpoint
        self.packed_modules_mapping = {**FUSED_SHARDS, **(packed_modules_mapping or {})}
        self.linears: dict[str, QuantizedLinear] = dict(checkpoint.linears) if checkpoint else {}
        self.experts: dict[str, ExpertLayer] = dict(checkpoint.experts) if checkpoint else {}
        self.without_tensors: list[tuple[torch.nn.Module, ModelOptExtError]] = []
        """The linear layers that are declared as quantized and have no quantized tensors by their names, with the error of each."""
        self.padded_sizes: Mapping[int, int] = {}
        """Sizes of unquantized layers that SGLang enlarged, and what they are in the checkpoint."""
        self.used: frozenset[str] | None = None
        """The stored tensors that this rank loaded, None before it did."""
        self.session: Session | None = None
        """The open session of weight updates, None outside of one."""
        self.math = w4a8_math()
        # SGLang reads this under --kv-cache-dtype auto. A cache of ours was declared before, so that auto means SGLang's FP8.
        self.kv_cache_quant_algo = config.kv_cache_algo

    def get_name(self) -> str:
        """Return the ``--quantization`` name."""
        return self.family

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the types of models that are supported, which are all of SGLang's."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the smallest supported compute capability times ten: 80, Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the name of the configuration file that ModelOpt writes."""
        return [QUANT_CONFIG_NAME]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Build the config from a configuration file's content alone, for callers without a folder of tensors.

        Raises:
            ModelOptExtError: a malformed field, or an unknown algorithm.
        """
        parsed = parse_quant_config(config, Path(CONFIG_NAME))
        if parsed.algo is None and parsed.kv_cache_algo is None:
            raise ModelOptExtError.at(CONFIG_NAME, "quant_algo", f"one of {', '.join(sorted(SCHEMES))}", parsed.algo)
        if parsed.algo is None or parsed.algo == MIXED_PRECISION:
            return cls(UMBRELLA, parsed, None)
        return cls(find_scheme(parsed.algo, CONFIG_NAME).flag, parsed, None)

    def update_packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        """Add the fused layers that a model's class names while it is built."""
        self.packed_modules_mapping |= mapping

    def get_scaled_act_names(self) -> list[str]:
        """Return no names: smoothing scales belong to the linear layers here."""
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Add SGLang's names of layers to the checkpoint's, in descriptions and declarations, for models that rename modules."""
        self.config = self.config.renamed(hf_to_sglang_mapper._map_name)
        for linear in list(self.linears.values()):
            renamed = hf_to_sglang_mapper._map_name(linear.name)
            if renamed is not None:
                self.linears.setdefault(canonical_name(renamed), linear)
        for experts in list(self.experts.values()):
            renamed = hf_to_sglang_mapper._map_name(experts.name)
            if renamed is not None:
                self.experts.setdefault(canonical_name(renamed), experts)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of ``layer`` by its name in SGLang, ``prefix``; None where SGLang's default applies.

        Raises:
            ModelOptExtError: the shards of a fused layer have different schemes, or experts are declared as quantized and are not.
        """
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
        from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix) or UnquantizedLinearMethod()
        if isinstance(layer, FusedMoE):
            method = self._experts_method(layer, prefix)
            if method is None:
                # Under a configuration with "modelopt" in its name SGLang does not load unquantized experts that are packed.
                layer.quant_config = None
            return method
        if isinstance(layer, VocabParallelEmbedding):  # lm_head too
            linear = self.linears.get(canonical_name(prefix))
            return self.method_of(prefix, [linear]) if linear else None
        if isinstance(layer, RadixAttention) and self._has_stock_kv_scales():
            return BaseKVCacheMethod(self)
        return None

    def get_cache_scale(self, name: str) -> None:
        """Return no parameter for a stored KV-cache scale, which some classes ask for: :mod:`integration.kv.scales` loads them."""
        del name

    def _has_stock_kv_scales(self) -> bool:
        """Return whether attention layers need the ``k_scale`` and ``v_scale`` of SGLang's own quantized caches."""
        from sglang.srt.runtime_context import get_model

        return self.config.kv_cache_algo is not None and get_model().kv_cache_dtype in ("auto", *STOCK_FLAGS)

    def _shards(self, prefix: str) -> list[str]:
        parent, _, name = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{shard}" if parent else shard for shard in shards]

    def _linear_method(self, layer: torch.nn.Module, prefix: str) -> ModelOptExtLinearMethod | None:
        if self.checkpoint is None:
            return self._dummy_method(prefix)
        whole = self.linears.get(canonical_name(prefix))
        if whole is not None:  # stored as SGLang builds it, whatever its name
            return self.method_of(prefix, [whole])
        shards = self._shards(prefix)
        stored = [self.linears.get(canonical_name(shard)) for shard in shards]
        if any(stored):
            self._same(prefix, {linear.scheme if linear else None for linear in stored})
            return self.method_of(prefix, [linear for linear in stored if linear is not None])
        quantized = next((shard for shard in shards if self.config.layer(shard)), None)
        if quantized:
            # The model's own loading code may know the layer under another name, see integration.mapping.
            expected = f"a {self.config.algo} layer, or it in exclude_modules"
            error = ModelOptExtError.at(self.checkpoint.folder, f"{quantized}.weight", expected, "neither")
            self.without_tensors.append((layer, error))
        return None

    def _dummy_method(self, prefix: str) -> ModelOptExtLinearMethod | None:
        declared = [self.config.layer(name) for name in self._shards(prefix)]
        scheme = self._same(prefix, {layer_scheme(self.config, layer) if layer else None for layer in declared})
        if scheme is None:
            return None
        return self._method(scheme, self.config.file, prefix, None)

    def can_fuse_shared_expert(self) -> bool:
        """Return whether every shared expert is quantized like the routed ones; SGLang's DeepSeek classes fuse it only then."""
        try:
            for experts in self.experts.values():
                check_shared(experts, self.linears)
        except ModelOptExtError:
            return False
        return True

    def _experts_method(self, layer: FusedMoE, prefix: str) -> ExtFusedMoEMethod | None:
        names = expert_names(prefix)
        stored = next((self.experts[name] for name in names if name in self.experts), None)
        where = self.checkpoint.folder if self.checkpoint else self.config.file
        if stored is not None:
            if layer.moe_runner_config.num_fused_shared_experts:
                check_shared(stored, self.linears)
            return ExtFusedMoEMethod(stored.gate_up, stored.down, where, prefix, self.math, stored)
        # A mix lists layers under one of their names. An exclusion under any of the names excludes the layer.
        declared = [
            tuple(self.config.layer(f"{name}.0.{projection}") for projection in projections)
            for name in names
            for projections in projections_of(layer.moe_runner_config.is_gated)
        ]
        mixed = self.config.algo == MIXED_PRECISION
        quantized = next((layers for layers in declared if any(layers)), None)
        if quantized is None or not (mixed or all(all(layers) for layers in declared)):
            return None
        if self.checkpoint is not None:
            expected = f"experts of {self.config.algo}, or them in exclude_modules"
            raise ModelOptExtError.at(where, prefix, expected, "neither")
        *first, down = (layer_scheme(self.config, entry) if entry else None for entry in quantized)
        gate_up = self._same(prefix, set(first))
        if gate_up is None or down is None:
            raise ModelOptExtError.at(
                where, prefix, "gate, up and down of the experts all quantized", "only some of them"
            )
        return ExtFusedMoEMethod((ExpertSet(gate_up),), (ExpertSet(down),), where, prefix, self.math, None)

    def _same(self, prefix: str, schemes: set[LayerScheme | None]) -> LayerScheme | None:
        if len(schemes) > 1:
            names = sorted(scheme.describe() if scheme else "unquantized" for scheme in schemes)
            raise ModelOptExtError.at(
                self.config.file, prefix, "one scheme for every shard of a fused layer", ", ".join(names)
            )
        return next(iter(schemes))

    def method_of(self, prefix: str, stored: Sequence[QuantizedLinear]) -> ModelOptExtLinearMethod:
        """Return the method of SGLang's layer ``prefix``, made of the checkpoint's layers ``stored``, in the order of its rows.

        Raises:
            ModelOptExtError: they differ in their schemes.
        """
        scheme = self._same(prefix, {linear.scheme for linear in stored})
        assert scheme is not None, "a stored layer has a scheme"
        where = self.checkpoint.folder if self.checkpoint else self.config.file
        return self._method(scheme, where, prefix, stored)

    def _method(
        self, scheme: LayerScheme, where: Path, prefix: str, stored: Sequence[QuantizedLinear] | None
    ) -> ModelOptExtLinearMethod:
        method = ModelOptExtLinearMethod(scheme, where, prefix, math_of(scheme, self.math), stored)
        method.quant_config = self
        return method


def expert_names(prefix: str) -> list[str]:
    """Return the canonical names that SGLang's expert layer ``prefix`` may have in a checkpoint: ModelOpt has two for Mixtral's."""
    name = canonical_name(prefix)
    return [name, name.replace(f".{MIXTRAL_BLOCK}.", f".{COMMON_BLOCK}.")] if f".{MIXTRAL_BLOCK}." in name else [name]


def _verify_quantization(original: Callable[..., None], self: ModelConfig) -> None:
    folder = config_folder(self.model_path, self.revision)
    flag = self.quantization.lower() if self.quantization else None
    try:
        owned = owned_family(folder, flag, server_device()) if folder is not None else None
    except ModelOptExtError:
        if not inherits_flag(self):
            raise
        assert folder is not None, "an error is one of a checkpoint"
        owned = owned_family(folder, None, server_device())
    if owned is None:
        if inherits_flag(self):
            self.quantization = None
        return original(self)
    self.quantization = owned[0]
    return None


def _parse_modelopt_quant_config(
    original: Callable[..., dict[str, Any] | None], self: ModelConfig, quant_config_dict: dict[str, Any]
) -> dict[str, Any] | None:
    if self.quantization not in FAMILIES:
        return original(self, quant_config_dict)
    section = quant_config_dict.get("quantization", quant_config_dict)
    return {"quant_method": self.quantization, "quant_algo": section.get("quant_algo")}


def _get_quant_config(
    original: Callable[..., QuantizationConfig | None],
    model_config: ModelConfig,
    load_config: LoadConfig,
    packed_modules_mapping: dict[str, list[str]],
    remap_prefix: dict[str, str] | None = None,
) -> QuantizationConfig | None:
    if model_config.quantization not in FAMILIES:
        return original(model_config, load_config, packed_modules_mapping, remap_prefix)
    load_format = str(getattr(load_config.load_format, "value", load_config.load_format))
    if load_format not in SERVED_LOAD_FORMATS:
        raise ModelOptExtError.at(
            "--load-format",
            load_format,
            f"one of {', '.join(SERVED_LOAD_FORMATS)}",
            "a format that bypasses the strict reader",
        )
    folder = config_folder(model_config.model_path, model_config.revision)
    owned = owned_family(folder, model_config.quantization, server_device()) if folder is not None else None
    if owned is None:
        raise ModelOptExtError.at(
            model_config.model_path, "quant_algo", f"a checkpoint of {model_config.quantization}", "none"
        )
    family, config = owned
    if is_part_of_a_model(model_config):
        if load_format != "dummy":
            check_unquantized(model_config, weights_folder(model_config, load_config))
        model_config.quantization = None
        return None
    assumed = assumption(config)
    if assumed:
        _warn_once_on_rank0(assumed)
    if load_format == "dummy":
        return ModelOptExtConfig(family, config, None, packed_modules_mapping)
    checkpoint = read_served(weights_folder(model_config, load_config), config)
    return ModelOptExtConfig(family, config, checkpoint, packed_modules_mapping)


def read_served(folder: Path, config: QuantConfig) -> Checkpoint:
    """Return the checkpoint in ``folder``, read and checked for the device at hand.

    Raises:
        ModelOptExtError: the checkpoint is wrong or not supported.
    """
    checkpoint, problems = read_for_serving(folder, config, rounds_fp4=rounds_fp4(server_device()))
    if problems:
        raise problems[0]
    check_scalar_values(checkpoint)
    return checkpoint


@functools.cache
def _warn_once_on_rank0(message: str) -> None:
    """Log a warning on the first tensor-parallel rank, once for each message."""
    from sglang.srt.runtime_context import get_parallel

    try:
        rank = get_parallel().tp_rank
    except RuntimeError:  # there is no group where a configuration is read outside a server
        rank = 0
    if rank == 0:
        logger.warning("modelopt_ext: %s", message)


def _get_model_architecture(original: Callable[..., Any], model_config: ModelConfig) -> Any:
    quantization = model_config.quantization
    if quantization not in FAMILIES:
        return original(model_config)
    try:
        model_config.quantization = None
        return original(model_config)
    finally:
        model_config.quantization = quantization


HOOKS = (
    Hook(
        "sglang.srt.model_loader.utils.get_model_architecture",
        ("model_config",),
        "Mixtral would be built from a linear layer for each expert, by a class whose loader knows one of its names",
        _get_model_architecture,
    ),
    Hook(
        "sglang.srt.configs.model_config.ModelConfig._verify_quantization",
        ("self",),
        "--quantization would be replaced by whatever SGLang makes of the algorithm's name",
        _verify_quantization,
    ),
    Hook(
        "sglang.srt.configs.model_config.ModelConfig._parse_modelopt_quant_config",
        ("self", "quant_config_dict"),
        "the log would call every algorithm with FP4 in its name modelopt_fp4",
        _parse_modelopt_quant_config,
    ),
    Hook(
        "sglang.srt.model_loader.weight_utils.get_quant_config",
        ("model_config", "load_config", "packed_modules_mapping", "remap_prefix"),
        "a checkpoint described by hf_quant_config.json alone would be read by ModelOptFp4Config",
        _get_quant_config,
    ),
)


def register_methods() -> None:
    """Add this package's names to SGLang's registries of quantization methods."""
    from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
    from sglang.srt.server_args import add_quantization_method_choices

    for family in FAMILIES:
        if family not in QUANTIZATION_METHODS:
            QUANTIZATION_METHODS[family] = ModelOptExtConfig
            CPU_QUANTIZATION_METHODS[family] = ModelOptExtConfig
            add_quantization_method_choices([family])
