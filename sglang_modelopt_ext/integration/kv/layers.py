"""The attention layers of a model as one rank sees them: which numbers of the plan are theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.kv_scales import Attention, KVLayer
from sglang_modelopt_ext.checkpoint.quant_config import canonical_name
from sglang_modelopt_ext.errors import ModelOptExtError


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """``(name of the attention module, RadixAttention)`` for every attention layer of ``model`` on this rank."""
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, module in model.named_modules():
        if isinstance(module, RadixAttention):
            yield name.rpartition(".")[0], module


def served_attention(model: torch.nn.Module) -> Attention:
    """Return the attention layers of ``model`` on this rank by their numbers, under which their keys and values are cached.

    Several modules of one number read one cache (the shared layers of Gemma 3n and Gemma 4); the first has its name.
    """
    layers: dict[int, str] = {}
    for name, module in attention_layers(model):
        layers.setdefault(int(module.layer_id), name)
    own = {canonical_name(name).partition(".")[0] for name in layers.values()}
    parts = {canonical_name(name).partition(".")[0] for name, _ in model.named_modules() if name}
    return Attention(layers, parts - own)


SINKS = ("sinks", "attention_sink_bias")
"""SGLang's names of the learned logits that take a share of every softmax."""


def check_sinks(model: torch.nn.Module) -> None:
    """Raises ModelOptExtError for a model with attention sinks, which nothing that reads a cache of ours adds."""
    for name, _ in model.named_parameters():
        if name.rpartition(".")[2] in SINKS:
            raise ModelOptExtError.at("command line", "--kv-cache-dtype", "auto or bf16 with attention sinks", name)


def local_heads(bias: torch.Tensor, heads: int, rank: int, size: int, where: str) -> torch.Tensor:
    """This rank's part of a bias.

    Args:
        bias: ``[H_kv, D]`` of all ranks.
        heads: KV heads on this rank; with fewer KV heads than ranks each head is on several of them.
        rank, size: of attention's tensor parallelism.
        where: the layer, for errors.

    Returns:
        ``[heads, D]``.

    Raises:
        ModelOptExtError: the checkpoint's heads and the model's do not agree.
    """
    total = bias.shape[0]
    if total * max(1, size // total) != heads * size or (total < size and heads != 1):
        raise ModelOptExtError.at(where, "k_bias, v_bias", f"biases of {heads * size} KV heads", total)
    first = rank * heads if total >= size else rank // (size // total)
    return bias[first : first + heads].contiguous()


def rank_layers(model: torch.nn.Module, numbers: Mapping[int, KVLayer], rank: int, size: int) -> dict[int, KVLayer]:
    """Return this rank's part of the numbers, by layer number. Raises ModelOptExtError where they do not fit."""
    found: dict[int, KVLayer] = {}
    for name, module in attention_layers(model):
        layer = numbers[module.layer_id]
        heads, head_dim = module.tp_k_head_num, module.head_dim
        biases = []
        for bias in (layer.k_bias, layer.v_bias):
            if bias is not None and bias.shape[1] != head_dim:
                raise ModelOptExtError.at(name, "k_bias, v_bias", f"head_dim {head_dim}", bias.shape[1])
            biases.append(None if bias is None else local_heads(bias, heads, rank, size, name))
        found.setdefault(module.layer_id, KVLayer(layer.k_scale, layer.v_scale, *biases))
    return found
