"""The exports of the conformance run by name: model, preset of ModelOpt, and later changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.conformance import families, features
from tests.support import edits, w4afp8
from tests.support.cache import REPOSITORY, cached_folder, digest, folder_digest, source_digest
from tests.support.exports import Variant, export, mixed_recipe
from tests.support.hybrid_models import hybrid_export
from tests.support.kv_exports import CAST_PRESETS, PRESETS, UNQUANTIZED
from tests.support.models import FUSED_FAMILIES, Family, TinyModel, model_dir
from tests.support.moe import mixed_checkpoint, one_expert_off, tiny
from tests.support.served_models import served_dir

POSITIONS = 4096
"""Room for the long prompts of the run."""

LARGER = {"hidden": 512, "intermediate": 1536, "heads": 8, "layers": 1, "tied": True}
"""A model whose products use other kernel configurations than those of the tiny one."""

WRONG_SCALE = 1.25

HYBRID_WINDOW = 128
"""Keys that a token sees in layers with a window: fewer than a prefill chunk of the cases has."""

NVFP4, MXFP4 = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"


@dataclass(frozen=True)
class Export:
    """One checkpoint of the run.

    Attributes:
        algo: its row of the support matrix, ``MIXED_PRECISION``, or ``none``.
        family: of the model.
        make: makes the folder, or finds it in the cache.
        kv: the recipe of its KV cache.
        mixture: whether it has experts.
        large: whether it is made by :mod:`tests.conformance.large` where it is served, instead of exported.
    """

    algo: str
    family: str
    make: Callable[[], Path]
    kv: str = "none"
    mixture: bool = False
    large: bool = False


def _dense(family: Family, recipe: Any, variant: Variant, **fields: Any) -> Path:
    return export(model_dir(TinyModel(family, max_position=POSITIONS, **fields)), recipe, variant)


def _mixture(family: Family, recipe: Any, variant: Variant, layers: int) -> Path:
    made = recipe() if callable(recipe) else recipe
    return export(model_dir(tiny(family, max_position=POSITIONS, layers=layers)), made, variant)


def dense(algo: str, family: Family, recipe: Any, kv: str = "none", merge: str | None = None, **fields: Any) -> Export:
    """Return a decoder without experts; ``merge`` is ModelOpt's name of the KV cache that is merged into its recipe."""
    return Export(algo, family, partial(_dense, family, recipe, Variant(kv_cache=merge), **fields), kv)


def mixture(
    algo: str, family: Family, recipe: Any, kv: str = "none", merge: str | None = None, layers: int = 1
) -> Export:
    """Return a mixture of experts."""
    return Export(algo, family, partial(_mixture, family, recipe, Variant(kv_cache=merge), layers), kv, mixture=True)


def _edited(source: Export, *changes: edits.Edit, name: str) -> Path:
    folder = source.make()
    key = digest(name, folder_digest(folder), source_digest(Path(__file__)))
    return cached_folder("edited", f"{name}-{key}", lambda target: _fill(folder, target, changes))


def _fill(source: Path, target: Path, changes: tuple[edits.Edit, ...]) -> None:
    target.rmdir()
    edits.copy_with(source, target, changes)


def _searched(family: Family, formats: str, bits: str) -> Path:
    """Return the result of ``auto-quantize`` for a tiny model: a mix by its own search."""
    from sglang_modelopt_ext.cli.main import main

    model = model_dir(TinyModel(family, max_position=POSITIONS))
    text = REPOSITORY / "examples/stdlib_lm/heldout.txt"

    def make(folder: Path) -> None:
        sizes = ["--samples", "12", "--score-samples", "8", "--sequence-length", "48", "--device", "cpu"]
        command = ["auto-quantize", str(model), "--formats", formats, "--bits", bits, "--data", str(text), *sizes]
        folder.rmdir()
        if main([*command, "--output", str(folder)]) != 0:
            raise RuntimeError(f"auto-quantize {formats} at {bits} bits failed")

    return cached_folder("searched", f"{family}-{digest(formats, bits, folder_digest(model))}", make)


def _mixed_experts(experts: str, attention: str) -> Path:
    """Return a mix on Qwen3-MoE, whose class names its fused layers, so that SGLang finds them."""
    key = digest(experts, attention, folder_digest(model_dir(tiny("qwen3_moe", max_position=POSITIONS))))

    def make(folder: Path) -> None:
        folder.rmdir()
        mixed_checkpoint("qwen3_moe", folder, experts, attention, max_position=POSITIONS)

    return cached_folder("mixed", f"{experts}-{attention}-{key}", make)


def mixed(experts: str, attention: str) -> Export:
    """Return a mix of experts in one format and attention layers in another."""
    return Export("MIXED_PRECISION", "qwen3_moe", partial(_mixed_experts, experts, attention), mixture=True)


def _parts(model: str, parts: Mapping[str, str], *unquantized: str) -> Path:
    return families.published(model, export(served_dir(model), mixed_recipe(parts), Variant(exclude=unquantized)))


def mixed_gemma3(attention: str) -> Export:
    """Return a mix without experts on Gemma 3: attention layers in one format, the others in NVFP4.

    SGLang serves it: of the dense decoders here, Gemma's class alone names its fused layers.
    """
    parts = {"*self_attn*": attention, "*mlp*": "NVFP4_DEFAULT_CFG"}
    return Export("MIXED_PRECISION", "gemma3", partial(_parts, "gemma3", parts))


def _mixed_deepseek() -> Path:
    """Return a mix on DeepSeek V3: FP8 blocks, and one layer in NVFP4.

    The experts, whose NVFP4 kernel SGLang compiles for minutes, and ``kv_b_proj`` are not quantized: SGLang rounds the inputs of
    that where a prompt is prefilled, and multiplies its weight into others where a token is decoded.
    """
    parts = {"*self_attn*": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "*mlp.down_proj*": "NVFP4_DEFAULT_CFG"}
    return _parts("deepseek_v3", parts, "*kv_b_proj*")


def _w4afp8(write: Callable[[Path, int], Path]) -> Path:
    key = digest(source_digest(Path(w4afp8.__file__)), folder_digest(model_dir(w4afp8.model(POSITIONS))))

    def make(folder: Path) -> None:
        folder.rmdir()
        write(folder, POSITIONS)

    return cached_folder("edited", f"w4afp8-{write.__name__}-{key}", make)


def _flatten_block_scales(tensors: edits.Tensors) -> None:
    """Store FP8 block scales in the shape that SGLang takes: ModelOpt 0.47's have a dimension of one entry behind each."""
    for name in [name for name in tensors if ".self_attn." in name and name.endswith(".weight_scale")]:
        rows, _, columns, _ = tensors[name].shape
        tensors[name] = tensors[name].reshape(rows, columns)


def _publish_block_scales(tensors: edits.Tensors) -> None:
    """Store FP8 block scales as most published checkpoints do: ``weight_scale_inv`` ``[N / 128, K / 128]``."""
    _flatten_block_scales(tensors)
    for name in [name for name in tensors if ".self_attn." in name and name.endswith(".weight_scale")]:
        tensors[f"{name}_inv"] = tensors.pop(name)


def _round_block_inputs(content: dict[str, Any]) -> None:
    """Declare layers of FP8 blocks by the algorithm that rounds inputs in blocks too: SGLang rounds them in every such layer."""
    for layer in content["quantization"]["quantized_layers"].values():
        if layer["quant_algo"].upper() == "FP8_PB_WO":
            layer["quant_algo"] = "FP8_BLOCK_SCALES"


def _list_unknown(content: dict[str, Any]) -> None:
    content["quantization"]["quantized_layers"]["lm_head"] = {"quant_algo": "NVFP9"}


def _trained(model: str, recipe: Any, variant: Variant) -> Path:
    """Return an export of a shipped model, with room for long prompts; rounding moves it less than a random model."""
    source = REPOSITORY / "examples/stdlib_lm" / model
    room = edits.set_fields(edits.CONFIG, {"max_position_embeddings": POSITIONS})
    key = digest(POSITIONS, folder_digest(source))
    folder = cached_folder("models", f"{model}-{key}", lambda target: _fill(source, target, (room,)))
    return export(folder, recipe, variant)


def trained(algo: str, recipe: Any, kv: str = "none", merge: str | None = None) -> Export:
    """Return an export of the shipped decoder, a Llama of four layers."""
    return Export(algo, "llama", partial(_trained, "model", recipe, Variant(kv_cache=merge)), kv)


def _elsewhere() -> Path:
    raise NotImplementedError("made where it is served")


def _llama() -> Path:
    return model_dir(TinyModel("llama", max_position=POSITIONS))


def _headed() -> Path:
    return export(_llama(), features.with_head(NVFP4), Variant())


EXPORTS: dict[str, Export] = {
    "bf16": Export("none", "llama", _llama),
    # Every algorithm on a dense model; the two W4A8 recipes on every family.
    **{f"w4a8-nvfp4-{f}": dense("W4A8_NVFP4_FP8", f, NVFP4) for f in ("llama", "mistral", "qwen2", "qwen3")},
    **{f"w4a8-mxfp4-{f}": dense("W4A8_MXFP4_FP8", f, MXFP4) for f in ("llama", "mistral", "qwen2", "qwen3")},
    "w4a8-awq": dense("W4A8_AWQ", "llama", "W4A8_AWQ_BETA_CFG"),
    "int4-awq": dense("W4A16_AWQ", "qwen2", "INT4_AWQ_CFG"),
    "nvfp4": dense("NVFP4", "llama", "NVFP4_DEFAULT_CFG"),
    "nvfp4-awq": dense("NVFP4_AWQ", "qwen2", "NVFP4_AWQ_LITE_CFG"),
    "nvfp4-svd": dense("NVFP4_SVD", "qwen3", "NVFP4_SVDQUANT_DEFAULT_CFG", layers=1),
    "w4a16-nvfp4": dense("W4A16_NVFP4", "llama", "W4A16_NVFP4_CFG"),
    "w4a16-nvfp4-mlp32": dense("W4A16_NVFP4", "mistral", "NVFP4_MLP_WEIGHT_ONLY_CFG", layers=1),
    "mxfp4": dense("MXFP4", "mistral", "MXFP4_DEFAULT_CFG"),
    "mxfp8": dense("MXFP8", "qwen3", "MXFP8_DEFAULT_CFG", layers=1),
    "fp8": dense("FP8", "llama", "FP8_DEFAULT_CFG"),
    "fp8-channel-token": dense("FP8_PER_CHANNEL_PER_TOKEN", "qwen2", "FP8_PER_CHANNEL_PER_TOKEN_CFG", layers=1),
    "fp8-blocks": dense("FP8_PB_WO", "llama", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", layers=1),
    "int8-smoothquant": dense("W8A8_SQ_PER_CHANNEL", "qwen3", "INT8_SMOOTHQUANT_CFG", layers=1),
    "int8-weight-only": dense("W8A16", "mistral", "INT8_WEIGHT_ONLY_CFG", layers=1),
    # Wider layers.
    "w4a8-nvfp4-wide": dense("W4A8_NVFP4_FP8", "llama", NVFP4, **LARGER),
    "w4a8-mxfp4-wide": dense("W4A8_MXFP4_FP8", "llama", MXFP4, **LARGER),
    # Layers of an 8B model's sizes.
    **{
        f"large-{algo.lower().replace('_', '-')}": Export(algo, "llama", _elsewhere, large=True)
        for algo in ("W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "W4A8_AWQ", "W4A16_AWQ")
    },
    # The shipped models, trained on text: rounding moves their answers a fraction of those of random weights.
    "trained-w4a8-nvfp4": trained("W4A8_NVFP4_FP8", NVFP4),
    "trained-w4a8-mxfp4": trained("W4A8_MXFP4_FP8", MXFP4),
    "trained-w4a8-nvfp4-kv-nvfp4": trained("W4A8_NVFP4_FP8", NVFP4, "nvfp4", PRESETS["nvfp4"]),
    # Mixes.
    "mix-searched-qwen2": Export("MIXED_PRECISION", "qwen2", partial(_searched, "qwen2", "NVFP4,FP8", "8")),
    "mix-w4a8-llama": Export(
        "MIXED_PRECISION", "llama", partial(_searched, "llama", "W4A8_NVFP4_FP8,FP8,NVFP4_AWQ", "6")
    ),
    "mix-nvfp4-w4a16": mixed("NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG"),
    "mix-nvfp4-fp8": mixed("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"),
    "mix-nvfp4-w4a16-gemma3": mixed_gemma3("W4A16_NVFP4_CFG"),
    "mix-nvfp4-fp8-gemma3": mixed_gemma3("FP8_DEFAULT_CFG"),
    "mix-fp8-experts": mixed("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"),
    "mix-block-fp8": mixed("NVFP4_DEFAULT_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "mix-block-fp8-deepseek-v3": Export("MIXED_PRECISION", "deepseek-v3", _mixed_deepseek, mixture=True),
    # A mix that names no layers, in a layout that ModelOpt has no preset for, and the same in ModelOpt's to be read.
    "w4afp8": Export("MIXED_PRECISION", "qwen3_moe", partial(_w4afp8, w4afp8.served_layout), mixture=True),
    "w4afp8-read": Export("MIXED_PRECISION", "qwen3_moe", partial(_w4afp8, w4afp8.read_layout), mixture=True),
    "mix-fp8-mha": dense("MIXED_PRECISION", "llama", "NVFP4_FP8_MHA_CONFIG", kv="fp8"),
    # Experts: every algorithm that ModelOpt exports for them.
    "moe-w4a8-nvfp4-qwen3_moe": mixture("W4A8_NVFP4_FP8", "qwen3_moe", NVFP4, layers=2),
    "moe-w4a8-mxfp4-qwen3_moe": mixture("W4A8_MXFP4_FP8", "qwen3_moe", MXFP4, layers=2),
    **{f"moe-w4a8-nvfp4-{f}": mixture("W4A8_NVFP4_FP8", f, NVFP4) for f in ("mixtral", "qwen2_moe")},
    "moe-w4a8-mxfp4-mixtral": mixture("W4A8_MXFP4_FP8", "mixtral", MXFP4),
    "moe-w4a8-mxfp4-without-an-expert": mixture("W4A8_MXFP4_FP8", "qwen3_moe", partial(one_expert_off, MXFP4)),
    "moe-nvfp4": mixture("NVFP4", "qwen3_moe", "NVFP4_DEFAULT_CFG"),
    "moe-w4a16-nvfp4": mixture("W4A16_NVFP4", "mixtral", "W4A16_NVFP4_CFG"),
    "moe-w4a16-nvfp4-mlp32": mixture("W4A16_NVFP4", "qwen3_moe", "NVFP4_MLP_WEIGHT_ONLY_CFG"),
    "moe-mxfp4": mixture("MXFP4", "qwen3_moe", "MXFP4_DEFAULT_CFG"),
    "moe-mxfp8": mixture("MXFP8", "qwen3_moe", "MXFP8_DEFAULT_CFG"),
    "moe-fp8": mixture("FP8", "qwen3_moe", "FP8_DEFAULT_CFG"),
    "moe-fp8-channel-token": mixture("FP8_PER_CHANNEL_PER_TOKEN", "mixtral", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "moe-fp8-blocks": mixture("FP8_PB_WO", "mixtral", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "moe-int8-smoothquant": mixture("W8A8_SQ_PER_CHANNEL", "mixtral", "INT8_SMOOTHQUANT_CFG"),
    "moe-int8-weight-only": mixture("W8A16", "qwen3_moe", "INT8_WEIGHT_ONLY_CFG"),
    # KV caches: every recipe under unquantized layers, where the noise is smallest, and some under quantized ones.
    **{
        f"kv-{recipe.replace('_', '-')}": dense("none", "llama", UNQUANTIZED, recipe, name)
        for recipe, name in PRESETS.items()
    },
    **{f"kv-{recipe}-cast": dense("none", "llama", UNQUANTIZED, recipe, name) for recipe, name in CAST_PRESETS.items()},
    "w4a8-nvfp4-kv-nvfp4-affine": dense("W4A8_NVFP4_FP8", "mistral", NVFP4, "nvfp4_affine", PRESETS["nvfp4_affine"]),
    "w4a8-mxfp4-kv-fp8-affine": dense("W4A8_MXFP4_FP8", "qwen2", MXFP4, "fp8_affine", PRESETS["fp8_affine"]),
    "moe-w4a8-nvfp4-kv-nvfp4": mixture("W4A8_NVFP4_FP8", "qwen3_moe", NVFP4, "nvfp4", PRESETS["nvfp4"], layers=2),
    "moe-w4a8-mxfp4-kv-nvfp4-affine": mixture(
        "W4A8_MXFP4_FP8", "mixtral", MXFP4, "nvfp4_affine", PRESETS["nvfp4_affine"]
    ),
    "fp8-kv-fp8": dense("FP8", "llama", "FP8_DEFAULT_CFG", "fp8", PRESETS["fp8"]),
    # Features: quantized before it is served, drafts and what they draft for, a head that scores, and a quantized lm_head.
    "online": Export(features.ONLINE_ALGO, "llama", lambda: features.converted(_llama())),
    "draft-eagle3": Export("none", "llama", partial(features.draft, POSITIONS)),
    "w4a8-nvfp4-deepseek-v3-mtp": Export("W4A8_NVFP4_FP8", "deepseek-v3", features.with_block, mixture=True),
    "w4a8-nvfp4-classifier": dense("W4A8_NVFP4_FP8", "classifier", NVFP4),
    "w4a8-nvfp4-lm-head": Export("W4A8_NVFP4_FP8", "llama", _headed),
    # Families whose checkpoints store layers fused, and those that SGLang runs on a GPU only, with their unquantized twins.
    **{f"w4a8-nvfp4-{f}": dense("W4A8_NVFP4_FP8", f, NVFP4) for f in FUSED_FAMILIES},
    **{f"w4a8-mxfp4-{f}": dense("W4A8_MXFP4_FP8", f, MXFP4) for f in FUSED_FAMILIES},
    **{
        f"{recipe or 'bf16'}-{name}": Export(algo, name, partial(families.folder_of, name, recipe), mixture=of.mixture)
        for name, of in families.ARCHITECTURES.items()
        for recipe, algo in {None: "none", **{recipe: algo for recipe, (algo, _) in of.recipes.items()}}.items()
    },
}
"""Every export by name; the folder in the pack has the same name."""

EXPORTS["wrong-scale"] = Export(
    "W4A8_NVFP4_FP8",
    "llama",
    partial(
        _edited,
        EXPORTS["trained-w4a8-nvfp4"],
        edits.scale_tensors({"model.layers.0.mlp.down_proj.weight_scale_2": WRONG_SCALE}),
        name="wrong-scale",
    ),
)
"""A control: the judge must tell a server of this folder from one of the original folder."""
for _name, _source, _edit in (
    ("mix-block-fp8-inv", "mix-block-fp8", edits.edit_tensors(_publish_block_scales)),
    ("mix-block-fp8-rounded", "mix-block-fp8", edits.edit_json(edits.QUANT_CONFIG, _round_block_inputs)),
    ("mix-block-fp8-flat-deepseek-v3", "mix-block-fp8-deepseek-v3", edits.edit_tensors(_flatten_block_scales)),
    (
        "mix-block-fp8-rounded-deepseek-v3",
        "mix-block-fp8-deepseek-v3",
        edits.edit_json(edits.QUANT_CONFIG, _round_block_inputs),
    ),
    ("mix-unknown", "mix-nvfp4-fp8", edits.edit_json(edits.QUANT_CONFIG, _list_unknown)),
):
    _make = partial(_edited, EXPORTS[_source], _edit, name=_name)
    EXPORTS[_name] = Export("MIXED_PRECISION", EXPORTS[_source].family, _make, mixture=True)

EXPORTS["kv-nvfp4-and-fp8"] = Export(
    "none",
    "llama",
    partial(
        _edited,
        EXPORTS["kv-nvfp4"],
        edits.set_fields(edits.QUANT_CONFIG, {"sglang_modelopt_ext": {"kv_cache_layers": {"1": "fp8"}}}),
        name="kv-nvfp4-and-fp8",
    ),
    "nvfp4",
)
"""A cache in NVFP4 whose second layer is in FP8, as a search over the layers of a cache makes."""

# Hybrid pools: windows and attention sinks, and attention beside linear attention, whose state is not quantized.
for _name, _kind, _recipe in (
    ("kv-windows-fp8-affine", "granite_swa", "fp8_affine"),
    ("kv-windows-nvfp4", "granite_swa", "nvfp4"),
):
    _make = partial(hybrid_export, _kind, _recipe, POSITIONS, HYBRID_WINDOW)
    EXPORTS[_name] = Export("none", _kind, _make, _recipe)
# SGLang's Qwen3-Next has experts in every layer; its Qwen3.5 is dense.
_make = partial(families.with_cache, "qwen3-5", PRESETS["nvfp4_affine"])
EXPORTS["kv-linear-nvfp4-affine"] = Export("none", "qwen3_5", _make, "nvfp4_affine")
