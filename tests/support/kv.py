"""A KV cache's rounding, written from the definition of the recipes, and a Hugging Face model that has it.

Independent of the packages under test. Every key, after its position embedding, and every value is rounded before it is
used, like attention reads back all tokens from a cache, the newest included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.support.recipes import round_nvfp4, to_e4m3

ATTENTION = "test_kv_rounded"
CAST_SCALE = torch.tensor(1.0)


def hadamard(size: int) -> torch.Tensor:
    """Return the normalised Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    for _ in range(size.bit_length() - 1):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / size**0.5


def round_vectors(x: torch.Tensor, recipe: str, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x`` ``[B, H, T, D]`` read back from a cache; ``scale`` is amax / 448, ``bias`` ``[1, H, 1, D]``."""
    rotation = hadamard(x.shape[-1]) if recipe == "nvfp4_rotate" else torch.eye(x.shape[-1])
    shift = torch.zeros(()) if bias is None else bias.to(torch.float32)
    x32 = x.to(torch.float32) @ rotation - shift
    if recipe.startswith("fp8"):
        rounded = to_e4m3(x32 / scale) * scale
    else:
        values, step = round_nvfp4(x32, {"input_scale": scale.to(torch.float32) * 448 / 2688})
        rounded = values * step
    return ((rounded + shift) @ rotation).to(x.dtype)


def install(
    model: Any, recipe: str, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, str] | None = None
) -> None:
    """Make ``model`` round its keys and values.

    ``tensors`` are the KV tensors of the checkpoint by name, maybe none; ``layers`` the recipes of layers with another one than
    ``recipe``, by their number.

    ``model.config.kv_rounding["raw_from"]``: for each token, the first key that it reads unrounded: the start of
    its chunk in a prefill whose chunk is not read back, its successor for a decoded one, and by default none.
    ``["narrow_decode"]`` takes the oldest key of its window from a decoded token, as SGLang's Triton attention does in classes that
    name their window. ``["fp8_queries"]`` rounds queries to E4M3, and ``["fp8_weights"]`` the softmax weights, like attention that
    multiplies FP8 by FP8.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        prefix = f"model.layers.{module.layer_idx}.self_attn."
        rounding = module.config.kv_rounding
        of_layer = rounding["layers"].get(str(module.layer_idx), rounding["recipe"])

        def rounded(x: torch.Tensor, side: str) -> torch.Tensor:
            stored = rounding["tensors"]
            scale = stored.get(f"{prefix}{side}_proj.{side}_scale", CAST_SCALE)
            part = stored[f"{prefix}{side}_proj.{side}_bias"] if of_layer.endswith("_affine") else None
            # Only the rotated cache rotates keys; values never are.
            name = of_layer if side == "k" else of_layer.replace("_rotate", "")
            return round_vectors(x, name, scale, part).repeat_interleave(module.num_key_value_groups, dim=1)

        if rounding["fp8_queries"]:
            query = to_e4m3(query.to(torch.float32)).to(query.dtype)
        keys, values = rounded(key, "k"), rounded(value, "v")
        raw_keys, raw_values = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        positions = torch.arange(query.shape[2])
        start = positions + 1 if rounding["raw_from"] is None else torch.tensor(rounding["raw_from"])
        raw = positions[None, :] >= start[:, None]
        if rounding["narrow_decode"] and kwargs.get("sliding_window"):
            oldest = positions[None, :] == (positions - kwargs["sliding_window"] + 1)[:, None]
            decoded = (start > positions)[:, None]  # such a token reads its own key rounded
            mask = mask.masked_fill(oldest & decoded, torch.finfo(mask.dtype).min)
        scores = torch.where(raw, query @ raw_keys.transpose(2, 3), query @ keys.transpose(2, 3))
        scores = scores * kwargs["scaling"] + mask
        sinks = kwargs.get("s_aux")
        if sinks is not None:  # the logit of one more key, without a value
            scores = torch.cat((scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]]
        if rounding["fp8_weights"]:
            largest = weights.amax(dim=-1, keepdim=True)  # the unnormalised weight of the largest score is 2^8
            weights = to_e4m3(weights / largest * 256.0) * largest / 256.0
        weights = weights.to(query.dtype)
        out = (weights * raw) @ raw_values + (weights * ~raw) @ values
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.config.kv_rounding = {"recipe": recipe, "layers": dict(layers or {}), "tensors": dict(tensors)}
    model.config.kv_rounding |= {"raw_from": None, "narrow_decode": False, "fp8_queries": False, "fp8_weights": False}
    model.config._attn_implementation = ATTENTION
