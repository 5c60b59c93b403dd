"""Bias and rotation around attention of SGLang's own, which reads a cache of SGLang's own.

SGLang's FP8 and NVFP4 pools hold ``Q(x)``. Given ``k - b_k`` or ``k H``, and ``v - b_v``, they hold what a recipe stores, and
attention over it is the recipe's:

- **Rotation.** H is orthogonal and symmetric: ``(q H) . (k H) = q . k``. Queries are turned as well; values never are.
- **Bias of the keys.** ``q . k = q . (k - b_k) + q . b_k``, and the last term is the same for every key of a query. The softmax
  does not see it, if *every* key it runs over has the bias off. They all have, because what SGLang is handed are keys without it:
  what it writes to the pool and reads back (decode; a prefill of trtllm_mha), and what it multiplies without storing it first (the
  current chunk in FlashInfer's ragged prefill, whose log-sum-exp and that of the cached prefix are both short of the same
  ``q . b_k`` when they are merged). A sliding window leaves out keys and changes nothing.
- **Bias of the values.** The weights sum to one, so that ``sum w v = sum w (v - b_v) + b_v``: it is added once, to the output. It
  does not pass through the rounding of the weights and, where the kernel's output is E4M3, not through that either.
- **Not so**: a logit cap (``cap(q . (k - b_k))`` is not ``cap(q . k)`` less a constant, and trtllm_mha leaves caps out), attention
  sinks (they keep their share of the softmax when the keys' logits shift, and the weights do not sum to one), attention that is
  not a decoder's. Those are refused; this package's own kernels add the bias back before the cap.

Keys and values are cut at what the recipe can hold (amax) first. SGLang's scale for NVFP4 on SM100, amax / 448, would let six times
that through; and ``Tensor.to``, by which SGLang writes FP8 for FlashInfer, makes NaN of what is out of range in some versions of
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.kv_scales import KVLayer
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv.layers import attention_layers
from sglang_modelopt_kernels.formats.e4m3 import MAX as E4M3_MAX
from sglang_modelopt_kernels.formats.kv_cache import KVRecipe, hadamard_block, hadamard_matrix, rotate

DTYPES = (torch.bfloat16, torch.float16)
"""Types of a model that SGLang's quantizing kernels take."""


@dataclass(frozen=True)
class Around:
    """What is done around one layer's attention on this rank.

    Attributes:
        k_bias: float32 ``[H_kv, D]`` or None.
        v_bias: float32 ``[H_kv, D]`` or None.
        out_bias: the values' bias for every query head, float32 ``[Hq * D]`` or None.
        rotate: whether keys and queries are rotated.
        k_limit, v_limit: the largest magnitude the cache holds.
    """

    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    out_bias: torch.Tensor | None
    rotate: bool
    k_limit: float
    v_limit: float

    def queries(self, q: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Queries for the stored keys: ``[T, Hq * D]`` or ``[T, Hq, D]``, computed in float32, of q's type."""
        if not self.rotate:
            return q
        return rotate(q.reshape(len(q), -1, head_dim).to(torch.float32)).to(q.dtype).view(q.shape)

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        """What to store of keys ``[T, H_kv, D]``: computed in float32, of k's type. A new tensor: SGLang divides it in place."""
        wide = k.to(torch.float32)
        if self.rotate:
            wide = rotate(wide)
        if self.k_bias is not None:
            wide = wide - self.k_bias
        return wide.clamp(-self.k_limit, self.k_limit).to(k.dtype)

    def values(self, v: torch.Tensor) -> torch.Tensor:
        """Likewise of values."""
        wide = v.to(torch.float32)
        if self.v_bias is not None:
            wide = wide - self.v_bias
        return wide.clamp(-self.v_limit, self.v_limit).to(v.dtype)

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """Adds the values' bias to attention's output ``[T, Hq * D]``, in place: it may be a buffer that SGLang handed out."""
        return out if self.out_bias is None else out.add_(self.out_bias)


def around_layers(
    recipe: KVRecipe, layers: Mapping[int, KVLayer], model: torch.nn.Module, device: torch.device | str
) -> dict[int, Around]:
    """What is done around every attention layer, by layer id.

    Args:
        recipe: of the cache.
        layers: this rank's numbers of each layer.
        model: with the attention layers, whose query heads are asked for.
        device: of attention.
    """
    place = torch.empty(0, device=device).device  # with its index, which "cuda" has not
    found = {}
    for _, module in attention_layers(model):
        layer = layers[module.layer_id]
        k_bias, v_bias = (None if bias is None else bias.to(place) for bias in (layer.k_bias, layer.v_bias))
        groups = module.tp_q_head_num // module.tp_k_head_num
        if recipe.rotate:
            # Made now: a CUDA graph must not capture its allocation.
            hadamard_matrix(hadamard_block(module.head_dim), place)
        found[module.layer_id] = Around(
            k_bias=k_bias,
            v_bias=v_bias,
            out_bias=None if v_bias is None else v_bias.repeat_interleave(groups, dim=0).flatten(),
            rotate=recipe.rotate,
            k_limit=layer.k_scale * recipe.format.range,
            v_limit=layer.v_scale * recipe.format.range,
        )
    return found


class WrappedForward:
    """``forward_decode`` or ``forward_extend`` of a backend of SGLang's, with each layer's :class:`Around` around it."""

    def __init__(self, forward: Callable[..., torch.Tensor], layers: Mapping[int, Around]) -> None:
        self.forward = forward
        self.layers = layers

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """SGLang's call. Raises ModelOptExtError for an argument that was not worked out under a bias or a rotation."""
        asked = sorted(name for name, value in kwargs.items() if value is not None)
        if asked:
            raise ModelOptExtError.at(
                "KV cache", "attention", "a call without extras under a bias or a rotation", ", ".join(asked)
            )
        around = self.layers[layer.layer_id]
        out = self.forward(
            around.queries(q, layer.head_dim),
            None if k is None else around.keys(k),
            None if v is None else around.values(v),
            layer,
            forward_batch,
            save_kv_cache=save_kv_cache,
        )
        return around.output(out)


def wrap(backend: Any, layers: Mapping[int, Around]) -> None:
    """Wraps the two entries of an attention backend. It keeps its class, which SGLang asks for in places."""
    for name in ("forward_decode", "forward_extend"):
        setattr(backend, name, WrappedForward(getattr(backend, name), layers))


def check_range(recipe: KVRecipe, layers: Mapping[int, KVLayer], prefill: str) -> None:
    """Raises ModelOptExtError where FlashInfer's prefill would cut a cached prefix, which it reads as E4M3 without a scale."""
    if not recipe.format.block or prefill != "flashinfer":
        return
    for index, layer in layers.items():
        amax = max(layer.k_scale, layer.v_scale) * recipe.format.range
        if amax > E4M3_MAX * (1 + 2**-20):  # the product of a rounded quotient
            raise ModelOptExtError.at(
                f"layer {index}",
                "k_scale, v_scale",
                f"an amax up to {E4M3_MAX:g} for flashinfer's prefill",
                f"{amax:g}",
            )


def check_attention(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raises ModelOptExtError for attention that is not the same under a bias or a rotation, see the module's text."""
    from sglang.srt.layers.radix_attention import AttentionType

    where = "command line"
    expected = "triton, torch_native on a CPU, for a quantized KV cache with"
    if dtype not in DTYPES:
        raise ModelOptExtError.at(
            where, "--attention-backend", f"triton for a model of {dtype}", "SGLang's own kernels"
        )
    for name, module in attention_layers(model):
        if module.logit_cap:
            raise ModelOptExtError.at(where, "--attention-backend", f"{expected} a logit cap", name)
        if module.attn_type is not AttentionType.DECODER or module.is_cross_attention:
            raise ModelOptExtError.at(where, "--attention-backend", f"{expected} attention that is no decoder's", name)


def set_layer_scales(model: torch.nn.Module, layers: Mapping[int, KVLayer]) -> None:
    """Writes scales where SGLang's FP8 cache has them: on its attention layers, as tensors and as numbers."""
    for _, module in attention_layers(model):
        for name, scale in (("k_scale", layers[module.layer_id].k_scale), ("v_scale", layers[module.layer_id].v_scale)):
            stored = getattr(module, name)
            if isinstance(stored, torch.nn.Parameter):
                stored.data.fill_(scale)
            else:
                device = next(model.parameters()).device
                setattr(module, name, torch.tensor(scale, dtype=torch.float32, device=device))
            setattr(module, f"{name}_float", scale)


def set_nvfp4_scales(method: Any, model: torch.nn.Module, layers: Mapping[int, KVLayer], sm100: bool) -> None:
    """Writes scales where SGLang's NVFP4 cache has them: in its method. On the layers they become 1.

    FlashInfer's prefill reads a copy of the cached prefix with the scale already in it, and multiplies the logits by
    ``k_scale_float`` of the layer once more. On SM100 the scale is amax / 448, which SGLang says its kernel expects; elsewhere it
    is the recipe's amax / 2688. ``load_scales_from_model`` does so too, except to a scale of exactly 1.
    """
    from sglang.srt.layers.quantization.kvfp4_tensor import E2M1_MAX

    factor = E2M1_MAX if sm100 else 1.0
    for index, layer in layers.items():
        pairs = (("k_scales", layer.k_scale * factor), ("v_scales", layer.v_scale * factor))
        for name, scale in pairs:
            getattr(method, f"{name}_float")[index] = scale
            getattr(method, f"{name}_gpu")[index] = scale
    set_layer_scales(model, dict.fromkeys(layers, KVLayer(1.0, 1.0)))


def attention_note(recipe: KVRecipe, backends: tuple[str, str], sm100: bool) -> str:
    """What the log says of the ``(prefill, decode)`` backends that serve a wrapped cache, their own roundings included."""
    return "; ".join(
        f"{phase} by {backend} of SGLang, {_rounding(recipe, phase, backend, sm100)}"
        for phase, backend in zip(("prefill", "decode"), backends, strict=True)
    )


def _rounding(recipe: KVRecipe, phase: str, backend: str, sm100: bool) -> str:
    """What a backend rounds that the recipe does not (``trtllm_mha_backend.py`` and ``memory_pool.py`` of SGLang 0.5.23)."""
    fp4 = recipe.format.block > 0
    if backend == "flashinfer":
        workspace = fp4 and phase == "prefill"
        return f"cached prefix read as E4M3 without a scale (up to {E4M3_MAX:g})" if workspace else "queries unrounded"
    if sm100 and fp4:
        return "queries and outputs rounded to E4M3 without a scale"
    if sm100 or phase == "prefill":
        return "queries rounded to E4M3 without a scale"
    return "queries unrounded"
