"""Real ModelOpt exports of small models, made once and kept.

ModelOpt runs in this process. Measured on two shared cores: importing it takes 4 s once, an export about 1 s (half of
it CPU time), while a process of its own would pay some 15 s for imports each time. A comparison of all module and class
attributes over an export showed that nothing stays changed in transformers: ModelOpt replaces the classes of the
modules of the one model it is given, and patches saving only while it saves. What remains is
``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, which nothing here uses. ``tests/unit/test_support_exports.py``
checks that a model computes the same before and after.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.workflow.common import modelopt_cpu
from sglang_modelopt_ext.workflow.quantize.packed_experts import blocks_along_k
from tests.support.cache import cached_folder, digest, folder_digest, one_thread, source_digest
from tests.support.edits import copy_with as copy_with

CALIBRATION_BATCHES = 4
CALIBRATION_SHAPE = (2, 64)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Variant:
    """Differences between exports of one model with one recipe.

    Attributes:
        calibration_seed: decides the random tokens of the calibration.
        kv_cache: a ModelOpt configuration or preset of the KV cache to merge, such as ``FP8_KV_CFG`` or ``fp8_cast``.
        algorithm: replaces the calibration algorithm of the recipe.
        exclude: patterns of module names to leave unquantized, such as ``*layers.0.mlp*``.
        max_shard_size: makes ModelOpt write several files, such as ``"300KB"``.
        along_k: packs experts that are stored packed in blocks along K, as ``quantize`` does and ModelOpt alone does not.
    """

    calibration_seed: int = 0
    kv_cache: str | None = None
    algorithm: str | None = None
    exclude: tuple[str, ...] = ()
    max_shard_size: str = "10GB"
    along_k: bool = False


DEFAULT = Variant()


def export(model_dir: Path, recipe: str | Mapping[str, Any], variant: Variant = DEFAULT) -> Path:
    """Return the folder of the checkpoint that ModelOpt makes of the model, with its tokenizer; made on the first call.

    Args:
        model_dir: a Hugging Face model.
        recipe: the name of a configuration in ``modelopt.torch.quantization``, such as ``"W4A8_NVFP4_FP8_CFG"``, or a
            configuration.
        variant: differences from the plain export.
    """
    name = recipe if isinstance(recipe, str) else "custom"
    key = digest(
        metadata.version("nvidia-modelopt"),
        recipe if isinstance(recipe, str) else dict(recipe),
        asdict(variant),
        folder_digest(model_dir),
        source_digest(Path(__file__), Path(modelopt_cpu.__file__)),
    )
    return cached_folder("exports", f"{name}-{key}", lambda folder: _export(model_dir, recipe, variant, folder))


def mixed_recipe(parts: Mapping[str, str], algorithm: str = "max") -> dict[str, Any]:
    """Return a configuration that quantizes each kind of layer by another one, all calibrated together.

    Args:
        parts: patterns of layers, such as ``*self_attn*``, and the names of the configurations for them.
        algorithm: the calibration algorithm of the whole model.
    """
    import modelopt.torch.quantization as mtq

    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for pattern, name in parts.items():
        for entry in getattr(mtq, name)["quant_cfg"]:
            if "cfg" in entry:
                entries.append({**entry, "quantizer_name": pattern + entry["quantizer_name"].removeprefix("*")})
    off = [entry for entry in mtq.FP8_DEFAULT_CFG["quant_cfg"][1:] if "cfg" not in entry]
    return {"quant_cfg": [*entries, *off], "algorithm": algorithm}


def calibration_tokens(vocab: int, seed: int) -> list[torch.Tensor]:
    """Return the batches of random tokens an export is calibrated with."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, CALIBRATION_SHAPE, generator=generator) for _ in range(CALIBRATION_BATCHES)]


def _export(model_dir: Path, recipe: str | Mapping[str, Any], variant: Variant, folder: Path) -> None:
    import modelopt.torch.quantization as mtq
    import transformers
    from modelopt.torch.export import export_hf_checkpoint

    modelopt_cpu.install("cpu")
    # Random choices of a calibration algorithm neither depend on nor disturb the caller.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), one_thread():
        torch.manual_seed(variant.calibration_seed)
        config = transformers.AutoConfig.from_pretrained(model_dir)
        model = getattr(transformers, config.architectures[0]).from_pretrained(model_dir, dtype="auto").eval()

        def calibrate(model: Any) -> None:
            for tokens in calibration_tokens(model.config.get_text_config().vocab_size, variant.calibration_seed):
                model(tokens)

        mtq.quantize(model, _configuration(mtq, recipe, variant), calibrate)
        with blocks_along_k() if variant.along_k else contextlib.nullcontext():
            export_hf_checkpoint(model, export_dir=folder, max_shard_size=variant.max_shard_size)
    for name in TOKENIZER_FILES:
        shutil.copy(model_dir / name, folder / name)


def _configuration(mtq: Any, recipe: str | Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, recipe) if isinstance(recipe, str) else dict(recipe))
    if variant.algorithm is not None:
        config["algorithm"] = variant.algorithm
    if variant.kv_cache is not None:
        from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

        config = update_quant_cfg_with_kv_cache_quant(config, _kv_configuration(mtq, variant.kv_cache)["quant_cfg"])
    config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in variant.exclude]
    return config


def _kv_configuration(mtq: Any, name: str) -> dict[str, Any]:
    """Return a KV cache by the name of its configuration, or of its preset: the ``_cast`` ones have no other."""
    from modelopt.recipe.presets import KV_QUANT_CFG_CHOICES

    found: dict[str, Any] = KV_QUANT_CFG_CHOICES[name] if name in KV_QUANT_CFG_CHOICES else getattr(mtq, name)
    return found
