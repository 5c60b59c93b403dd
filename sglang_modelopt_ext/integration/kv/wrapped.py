"""The bias or rotation of a recipe around SGLang's own attention, over SGLang's own KV cache.

SGLang's FP8 and NVFP4 pools hold ``Q(x)``. Given ``k - b_k`` or ``k H``, and ``v - b_v``, they hold the codes of the recipe, and
attention over them gives the recipe's result:

- **Rotation.** H is orthogonal and symmetric: ``(q H) . (k H) = q . k``. Queries and keys are rotated; values never are.
- **Bias of the keys.** ``q . k = q . (k - b_k) + q . b_k``, and the last term is equal for all keys of a query. It cancels in the
  softmax if the bias is subtracted from *every* key. It is, because SGLang gets only keys without it: those that it writes to the
  pool and reads back (decode; a prefill of trtllm_mha), and those that it multiplies without storing them first (the current chunk
  in FlashInfer's ragged prefill: its log-sum-exp and that of the cached prefix both lack ``q . b_k`` when they are merged). A
  sliding window only skips keys.
- **Bias of the values.** The weights of the softmax sum to one: ``sum w v = sum w (v - b_v) + b_v``. The bias is added once, to the
  output, so that it is rounded neither with the weights nor, where the kernel's output is E4M3, with the output.
- **Not supported**: a logit cap (``cap(q . (k - b_k))`` is not ``cap(q . k)`` less a constant, and trtllm_mha ignores caps),
  attention sinks (their logits do not shift with the keys', and the weights do not sum to one), attention other than a decoder's.
  These raise an error. This package's own kernels add the bias back before the cap.

Keys and values are first clamped to the recipe's range (amax). SGLang's scale for NVFP4 on SM100, amax / 448, would pass values six
times as large; and ``Tensor.to``, by which SGLang writes FP8 for FlashInfer, turns values out of range into NaN in some versions of
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
"""The types of a model that SGLang's quantizing kernels support."""


@dataclass(frozen=True)
class Around:
    """The bias, rotation and limits around one layer's attention on this rank.

    Attributes:
        k_bias: the keys' bias, float32 ``[H_kv, D]`` or None.
        v_bias: the values' bias, float32 ``[H_kv, D]`` or None.
        out_bias: the values' bias for every query head, float32 ``[H_q * D]`` or None.
        rotate: whether keys and queries are rotated.
        k_limit, v_limit: the largest magnitudes that the cache can hold.
    """

    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    out_bias: torch.Tensor | None
    rotate: bool
    k_limit: float
    v_limit: float

    def queries(self, q: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Return the queries ``[T, H_q * D]`` or ``[T, H_q, D]`` for the stored keys, rotated in fp32 if these are, in q's type."""
        if not self.rotate:
            return q
        return rotate(q.reshape(len(q), -1, head_dim).to(torch.float32)).to(q.dtype).view(q.shape)

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        """Return the keys ``[T, H_kv, D]`` to store: rotated, without bias and clamped, computed in fp32, in k's type.

        The result is a new tensor, since SGLang divides it in place.
        """
        fp32 = k.to(torch.float32)
        if self.rotate:
            fp32 = rotate(fp32)
        if self.k_bias is not None:
            fp32 = fp32 - self.k_bias
        return fp32.clamp(-self.k_limit, self.k_limit).to(k.dtype)

    def values(self, v: torch.Tensor) -> torch.Tensor:
        """Return the values ``[T, H_kv, D]`` to store: without bias and clamped, computed in fp32, in v's type, a new tensor."""
        fp32 = v.to(torch.float32)
        if self.v_bias is not None:
            fp32 = fp32 - self.v_bias
        return fp32.clamp(-self.v_limit, self.v_limit).to(v.dtype)

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """Add the values' bias to attention's output ``[T, H_q * D]``, in place, since it may be a buffer of SGLang's."""
        return out if self.out_bias is None else out.add_(self.out_bias)


def around_layers(
    recipe: KVRecipe, layers: Mapping[int, KVLayer], model: torch.nn.Module, device: torch.device | str
) -> dict[int, Around]:
    """Return the :class:`Around` of every attention layer, by layer number.

    Args:
        recipe: the cache's recipe.
        layers: this rank's scales and biases, by layer number.
        model: the model with the attention layers, which have the numbers of heads.
        device: the device of attention.
    """
    place = torch.empty(0, device=device).device  # "cuda" alone has no index
    found = {}
    for _, module in attention_layers(model):
        layer = layers[module.layer_id]
        k_bias, v_bias = (None if bias is None else bias.to(place) for bias in (layer.k_bias, layer.v_bias))
        groups = module.tp_q_head_num // module.tp_k_head_num
        if recipe.rotate:
            # Allocate the cached matrix now: a CUDA graph must not capture its allocation.
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
    """``forward_decode`` or ``forward_extend`` of SGLang's attention backend, with each layer's :class:`Around` applied."""

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
        """Return attention's output for SGLang's arguments.

        Raises:
            ModelOptExtError: an optional argument is given, for which bias and rotation were not derived.
        """
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
    """Wrap the two forward methods of an attention backend, in place, since some code of SGLang tests the backend's class."""
    for name in ("forward_decode", "forward_extend"):
        setattr(backend, name, WrappedForward(getattr(backend, name), layers))


def check_range(recipe: KVRecipe, layers: Mapping[int, KVLayer], prefill: str) -> None:
    """Raise ModelOptExtError where FlashInfer's prefill would clip a cached NVFP4 prefix: it reads it as E4M3 without a scale."""
    if not recipe.format.block or prefill != "flashinfer":
        return
    for index, layer in layers.items():
        amax = max(layer.k_scale, layer.v_scale) * recipe.format.range
        if amax > E4M3_MAX * (
            1 + 2**-20
        ):  # the scale is a rounded quotient, so that an amax of 448 may come out above it
            raise ModelOptExtError.at(
                f"layer {index}",
                "k_scale, v_scale",
                f"an amax up to {E4M3_MAX:g} for flashinfer's prefill",
                f"{amax:g}",
            )


def check_attention(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raise ModelOptExtError for attention whose result a bias or rotation would change (see the module's docstring)."""
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
    """Write scales to the attention layers, where SGLang's FP8 cache reads them: as a tensor and as a Python float."""
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
    """Write scales to the cache's method, where SGLang's NVFP4 cache reads them, and set those of the attention layers to 1.

    FlashInfer's prefill reads a copy of the cached prefix that has the scale applied, and multiplies the logits by the layer's
    ``k_scale_float`` once more. On SM100 the scale is amax / 448, which SGLang says its kernel expects; elsewhere amax / 2688, the
    recipe's. SGLang's ``load_scales_from_model`` does this too, except for a scale of exactly 1.
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
    """Return a phrase for the log on the ``(prefill, decode)`` backends of SGLang's cache, and their own roundings."""
    return "; ".join(
        f"{phase} by {backend} of SGLang, {_rounding(recipe, phase, backend, sm100)}"
        for phase, backend in zip(("prefill", "decode"), backends, strict=True)
    )


def _rounding(recipe: KVRecipe, phase: str, backend: str, sm100: bool) -> str:
    """Return the rounding that a backend adds to the recipe's (``trtllm_mha_backend.py``, ``memory_pool.py`` of SGLang 0.5.23)."""
    fp4 = recipe.format.block > 0
    if backend == "flashinfer":
        workspace = fp4 and phase == "prefill"
        return f"cached prefix read as E4M3 without a scale (up to {E4M3_MAX:g})" if workspace else "queries unrounded"
    if sm100 and fp4:
        return "queries and outputs rounded to E4M3 without a scale"
    if sm100 or phase == "prefill":
        return "queries rounded to E4M3 without a scale"
    return "queries unrounded"
