"""Exports of features beside the recipes: quantized before it is served, drafts, a multi-token prediction block, heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tests.conformance import families
from tests.support import edits
from tests.support.cache import cached_folder, digest, folder_digest, source_digest
from tests.support.drafts import eagle3, random
from tests.support.served_models import VOCABULARY

ONLINE_FLAG = "modelopt_w4a8"
ONLINE_ALGO = "W4A8_MXFP4_FP8"
"""The algorithm that the flag stands for without further settings."""

EAGLE3: dict[str, Any] = {
    "speculative_algorithm": "EAGLE3",
    "speculative_num_steps": 2,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 3,
}
STANDALONE = {**EAGLE3, "speculative_algorithm": "STANDALONE"}
NEXTN = {**EAGLE3, "speculative_algorithm": "NEXTN", "speculative_num_steps": 1, "speculative_num_draft_tokens": 2}


FAST: dict[str, Any] = {"load_format": "fastsafetensors", "model_loader_extra_config": '{"enable_gds": false}'}
"""Reads files straight into the GPU's memory, through the host: GPU Direct Storage is not everywhere."""


STREAMED: dict[str, Any] = {"load_format": "runai_streamer"}


def converted(model: Path) -> Path:
    """Return what quantization at load makes of an unquantized model, in a folder that the reading reads."""
    from sglang_modelopt_ext.online.convert import convert
    from sglang_modelopt_ext.online.recipe import recipe_for

    recipe = recipe_for(ONLINE_FLAG)
    if recipe.algo != ONLINE_ALGO:
        raise RuntimeError(f"{ONLINE_FLAG} makes {recipe.algo} here: unset the settings of quantization at load")
    key = digest(folder_digest(model), source_digest(Path(__file__)))

    def fill(target: Path) -> None:
        made = convert(model, recipe, target.with_name(f"{target.name}-cache"))
        target.rmdir()
        edits.copy_with(made.folder, target)

    return cached_folder("online", f"{ONLINE_ALGO}-{key}", fill)


def draft(positions: int) -> Path:
    """Return an unquantized EAGLE3 draft of a tiny Llama."""
    from tests.support import drafts

    def fill(target: Path) -> None:
        target.rmdir()
        eagle3(target, max_position_embeddings=positions)

    return cached_folder("models", f"eagle3-{digest(positions, source_digest(Path(drafts.__file__)))}", fill)


def with_block() -> Path:
    """Return the W4A8 export of DeepSeek-V3 with an unquantized block of multi-token prediction behind its two layers."""
    folder, plain = (families.folder_of("deepseek-v3", recipe) for recipe in ("w4a8-nvfp4", None))
    key = digest(folder_digest(folder), folder_digest(plain), source_digest(Path(__file__)))
    block = _block(edits.read_tensors(plain))

    def exclude(section: dict[str, Any], name: str) -> None:
        section[name] = [*section[name], "model.layers.2*"]

    changes = (
        edits.add_tensors(block),
        edits.edit_json(edits.QUANT_CONFIG, lambda content: exclude(content["quantization"], "exclude_modules")),
        edits.edit_json(edits.CONFIG, lambda content: exclude(content["quantization_config"], "ignore")),
        edits.set_fields(edits.CONFIG, {"num_nextn_predict_layers": 1}),
    )

    def fill(target: Path) -> None:
        target.rmdir()
        edits.copy_with(folder, target, changes)

    return cached_folder("edited", f"deepseek_v3-block-{key}", fill)


def _block(tensors: edits.Tensors) -> edits.Tensors:
    """Return a block out of a model's second layer, and what joins it to the model."""
    inside, prefix = "model.layers.1.", "model.layers.2."
    block = {prefix + name.removeprefix(inside): t.flip(0) for name, t in tensors.items() if name.startswith(inside)}
    (hidden,) = tensors["model.norm.weight"].shape
    for seed, norm in enumerate(("enorm", "hnorm", "shared_head.norm")):
        block[f"{prefix}{norm}.weight"] = random(hidden, seed=seed)
    block[f"{prefix}eh_proj.weight"] = random(hidden, 2 * hidden, seed=3)
    for name in ("embed_tokens", "shared_head.head"):
        block[f"{prefix}{name}.weight"] = random(VOCABULARY, hidden, seed=4)
    return {name: tensor.contiguous() for name, tensor in block.items()}


def with_head(preset: str) -> dict[str, Any]:
    """Return a preset of ModelOpt that quantizes ``lm_head`` too."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(getattr(mtq, preset))
    config["quant_cfg"] = [entry for entry in config["quant_cfg"] if "lm_head" not in entry["quantizer_name"]]
    return config
