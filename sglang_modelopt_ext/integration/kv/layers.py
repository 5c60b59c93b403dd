"""The attention layers of a model on one rank, and this rank's part of their KV cache's scales and biases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.kv_scales import Attention, KVLayer
from sglang_modelopt_ext.checkpoint.quant_config import canonical_name
from sglang_modelopt_ext.errors import ModelOptExtError


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield ``(name of the attention module, RadixAttention)`` for every attention layer of ``model`` on this rank."""
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, module in model.named_modules():
        if isinstance(module, RadixAttention):
            yield name.rpartition(".")[0], module


def served_attention(model: torch.nn.Module) -> Attention:
    """Return the attention layers of ``model`` on this rank, by the layer number under which their keys and values are cached.

    Several modules with one number read one cache (the shared layers of Gemma 3n and Gemma 4); it has the first one's name.
    """
    layers: dict[int, str] = {}
    for name, module in attention_layers(model):
        layers.setdefault(int(module.layer_id), name)
    own = {canonical_name(name).partition(".")[0] for name in layers.values()}
    parts = {canonical_name(name).partition(".")[0] for name, _ in model.named_modules() if name}
    return Attention(layers, parts - own)


SINKS = ("sinks", "attention_sink_bias")
"""The last parts of SGLang's names of attention sinks: learned logits in the denominator of every softmax."""


def check_sinks(model: torch.nn.Module, backends: Iterable[str]) -> None:
    """Raise ModelOptExtError for a model with attention sinks, unless all its attention is by this package's kernels.

    Args:
        model: the model that is served.
        backends: the attention backends, by SGLang's names. Its torch_native takes no sinks, and those with a bias or a rotation
            around them would not give the recipe's result (:mod:`sglang_modelopt_ext.integration.kv.wrapped`).
    """
    if all(backend == "triton" for backend in backends):
        return
    for name, _ in model.named_parameters():
        if name.rpartition(".")[2] in SINKS:
            expected = "triton for a quantized KV cache with attention sinks"
            raise ModelOptExtError.at("command line", "--attention-backend", expected, name)


def local_heads(bias: torch.Tensor, heads: int, rank: int, size: int, where: str) -> torch.Tensor:
    """Return this rank's part of a bias, ``[heads, D]``.

    Args:
        bias: the bias of all ranks, ``[H_kv, D]``.
        heads: KV heads on this rank; with fewer KV heads than ranks, each head is on several ranks.
        rank, size: this rank and the number of ranks in attention's tensor parallelism.
        where: the layer, for errors.

    Raises:
        ModelOptExtError: the checkpoint has another number of KV heads than the model.
    """
    total = bias.shape[0]
    if total * max(1, size // total) != heads * size or (total < size and heads != 1):
        raise ModelOptExtError.at(where, "k_bias, v_bias", f"biases of {heads * size} KV heads", total)
    first = rank * heads if total >= size else rank // (size // total)
    return bias[first : first + heads].contiguous()


def rank_layers(model: torch.nn.Module, layers: Mapping[int, KVLayer], rank: int, size: int) -> dict[int, KVLayer]:
    """Return this rank's part of the scales and biases, by layer number.

    Args:
        model: the model with this rank's attention layers.
        layers: the scales and biases of all ranks, by layer number.
        rank, size: this rank and the number of ranks in attention's tensor parallelism.

    Raises:
        ModelOptExtError: a bias does not have the model's KV heads or head_dim.
    """
    found: dict[int, KVLayer] = {}
    for name, module in attention_layers(model):
        layer = layers[module.layer_id]
        heads, head_dim = module.tp_k_head_num, module.head_dim
        biases = []
        for bias in (layer.k_bias, layer.v_bias):
            if bias is not None and bias.shape[1] != head_dim:
                raise ModelOptExtError.at(name, "k_bias, v_bias", f"head_dim {head_dim}", bias.shape[1])
            biases.append(None if bias is None else local_heads(bias, heads, rank, size, name))
        found.setdefault(module.layer_id, KVLayer(layer.k_scale, layer.v_scale, *biases))
    return found
