"""Attention of a Hugging Face model in plain PyTorch, with something done around it, such as the rounding of a KV cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats.kv_cache import KVRecipe, rotate

_NAME, _WATCHED = "sglang_modelopt_ext_reference", "sglang_modelopt_ext_watched"

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Plain attention: of queries, keys and values ``[B, H, T, D]`` to ``[B, T, H, D]``."""

Around = Callable[[int, Attend, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A function in its place: of the layer's number, plain attention, and queries, keys and values, to the output."""


def attention_modules(model: Any) -> list[Any]:
    """Return the attention modules of a model that cache keys and values."""
    return [module for module in model.modules() if hasattr(module, "num_key_value_groups")]


def replace_attention(model: Any, around: Around) -> None:
    """Make a model compute attention through ``around``.

    A model whose attention has a sink raises ModelOptExtError when it runs.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for module in attention_modules(model):
        module.sglang_modelopt_ext_around = around
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.config._attn_implementation = _NAME


@contextmanager
def attention_replaced(model: Any, around: Around) -> Iterator[None]:
    """Replace the attention of a model while the block runs; see :func:`replace_attention`."""
    before = model.config._attn_implementation
    replace_attention(model, around)
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for module in attention_modules(model):
            del module.sglang_modelopt_ext_around


@contextmanager
def attention_watched(model: Any, watch: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call ``watch`` with the layer's number, keys and values before the model's own attention, while the block runs."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    own = None if before == "eager" else ALL_ATTENTION_FUNCTIONS[before]

    def watched(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        watch(module.layer_idx, key, value)
        eager = sys.modules[type(module).__module__].eager_attention_forward if own is None else own
        return eager(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(_WATCHED, watched)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_WATCHED, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.config._attn_implementation = _WATCHED
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    if kwargs.get("s_aux") is not None:
        raise ModelOptExtError.at("model", "attention", "one without sinks", type(module).__name__)
    softcap = kwargs.get("softcap")

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores if mask is None else scores + mask
        dtype = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous()

    return module.sglang_modelopt_ext_around(module.layer_idx, attend, query, key, value), None


def as_cached(
    x: torch.Tensor,
    recipe: KVRecipe,
    scale: float,
    bias: torch.Tensor | None,
    around: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return ``x`` ``[B, H, T, D]`` written to a cache and read back.

    Args:
        x: the vectors.
        recipe: the cache's; of values, without the rotation.
        scale: the static scale.
        bias: ``[H, D]``, or None.
        around: called with the rounding and float32 vectors in its place; None for the rounding itself.
    """
    x32 = x.to(torch.float32)
    if recipe.rotate:
        x32 = rotate(x32)
    if bias is not None:
        x32 = x32 - bias[:, None]
    static = torch.tensor(scale, dtype=torch.float32, device=x.device)

    def read_back(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = recipe.format.decode(*recipe.format.encode(x, static), static)
        return found

    read = read_back(x32) if around is None else around(read_back, x32)
    if bias is not None:
        read = read + bias[:, None]
    return (rotate(read) if recipe.rotate else read).to(x.dtype)
