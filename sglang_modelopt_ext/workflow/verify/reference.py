"""The reference model of a checkpoint: exported values decoded into a Hugging Face model, without SGLang and kernels.

Every quantized layer is computed from this package's number formats alone: the weight decoded, the input smoothed and
rounded by the recipe, a plain matrix product. Keys and values are rounded where the KV cache is quantized. All weights
are held in the reference's dtype, 4 bytes per weight in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sglang_modelopt_ext.backends.base import ShardWeight
from sglang_modelopt_ext.backends.select import served_scheme
from sglang_modelopt_ext.checkpoint.kv_cache import KVCachePlan
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.quant_config import canonical_name, read_quant_config
from sglang_modelopt_ext.checkpoint.reader import Checkpoint, is_kv_cache_tensor, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_headers, read_tensors
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LORA_A, LORA_B, PRE_QUANT_SCALE
from sglang_modelopt_ext.schemes.table import math_of
from sglang_modelopt_ext.workflow.common.attention import Attend, as_cached, replace_attention

_NOT_WEIGHTS = ("rotary_emb.inv_freq",)
_HEAD = "lm_head.weight"

TIE = 8 * 2.0**-23
"""Relative distance to the middle of two codes within which float32 may round either way: 8 units in the last place.

At least 90 % of the float32 error in the inputs of quantized layers lies within it
(``tests/unit/test_workflow_verify.py`` measures it).
"""


class DecodedLinear(nn.Module):
    """``y = Q(x * smoothing) W^T + low rank + bias``, with the input rounded from float32 and the rest in ``dtype``.

    Args:
        linear: the layer.
        target: the device of the compared server, which decides whether FP4 activations are rounded.
        dtype: of the matrix products, at least float32.
        ties: round like :func:`other_side`.
    """

    def __init__(self, linear: QuantizedLinear, target: Device, dtype: torch.dtype, ties: bool = False) -> None:
        super().__init__()
        self.ties = ties
        tensors = {stored.name: tensor for stored, tensor in read_tensors(list(linear.stored.values()))}
        parts = {name: tensors[stored.name] for name, stored in linear.stored.items()}
        self.scheme = served_scheme(linear.scheme, target)
        self.inner = torch.promote_types(dtype, torch.float32)
        # Plain attributes, so that converting the model does not convert them.
        self.matrix = decode_weight(linear, parts).to(self.inner)
        self.input_scale = parts.get("input_scale")
        self.smoothing = parts[PRE_QUANT_SCALE.name].to(torch.float32) if self.scheme.smoothing else None
        self.low_rank = [parts[name].to(self.inner) for name in (LORA_A, LORA_B)] if self.scheme.low_rank else None
        self.bias_values = parts["bias"].to(self.inner) if "bias" in parts else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of ``x``, ``[..., K]`` to ``[..., N]`` in the dtype of ``x``."""
        flat = x.reshape(-1, x.shape[-1])
        smoothed = flat if self.smoothing is None else flat.to(torch.float32) * self.smoothing
        y = self._rounded(smoothed) @ self.matrix.T
        if self.low_rank is not None:
            y = y + (smoothed.to(self.inner) @ self.low_rank[0].T) @ self.low_rank[1].T
        if self.bias_values is not None:
            y = y + self.bias_values
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        activation = self.scheme.activation
        if activation is None:
            return x.to(self.inner)

        def read_back(x: torch.Tensor) -> torch.Tensor:
            values, scale = activation.quantize(x, self.input_scale)
            return values.to(self.inner) if scale is None else values.to(self.inner) * scale.to(self.inner)

        x32 = x.to(torch.float32)
        return other_side(read_back, x32) if self.ties else read_back(x32)


def other_side(read_back: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return ``read_back(x)``, a rounding to a format, with values within :data:`TIE` of a tie rounded the other way.

    Blocks whose scale is within :data:`TIE` of another scale are rounded under that one. ``x`` is float32.
    """
    exact, larger, smaller = read_back(x), read_back(x * (1 + TIE)), read_back(x * (1 - TIE))
    return torch.where((larger - exact).abs() >= (smaller - exact).abs(), larger, smaller)


def decode_weight(linear: QuantizedLinear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight ``[N, K]`` in fp32, under the numerics that the environment sets for a server."""
    math = math_of(linear.scheme)
    try:
        return ShardWeight(linear.scheme.weight, parts, math).decode().dequantize()
    except ValueError as error:
        raise ModelOptExtError.at(
            linear.stored["weight"].file, f"{linear.name}.weight", f"a weight that math {math} can hold", error
        ) from error


class ReferenceModel:
    """The model of a checkpoint, quantized or not, in plain PyTorch on the CPU.

    Args:
        folder: the checkpoint.
        dtype: of everything but the quantized layers, which compute in at least float32: bfloat16 shows the size of a
            bfloat16 server's rounding errors.
        target: the device of the compared server.
        kv_cache: the rounding of keys and values; None for none.
        ties: round activations, keys and values like :func:`other_side`: the most a correct float32 server can differ.

    Raises:
        ModelOptExtError: a tensor is missing, a tensor has no layer, or transformers does not know the model.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        target: Device | None = None,
        kv_cache: KVCachePlan | None = None,
        ties: bool = False,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder = folder
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            options = {"dtype": dtype, "attn_implementation": "eager", "trust_remote_code": False}
            self.model: Any = AutoModelForCausalLM.from_config(config, **options).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelOptExtError.at(folder, "model", "one that transformers knows", error) from error
        quantization = read_quant_config(folder)
        checkpoint = None
        if quantization is not None and quantization.algo is not None:
            checkpoint = read_checkpoint(folder, quantization)
        tensors = self._load_quantized(checkpoint, target or Device.cpu(), dtype, ties) if checkpoint else {}
        self._load_others(checkpoint, tensors, config.tie_word_embeddings)
        if kv_cache is not None:
            round_cached_vectors(self.model, kv_cache, ties)

    def _load_quantized(
        self, checkpoint: Checkpoint, target: Device, dtype: torch.dtype, ties: bool
    ) -> dict[str, torch.Tensor]:
        """Replace the quantized linear layers. Returns the decoded weights of layers of another kind, the embedding."""
        modules = {canonical_name(name): name for name, _ in self.model.named_modules()}
        decoded = {}
        for canonical, linear in checkpoint.linears.items():
            name = modules.get(canonical)
            module = self.model.get_submodule(name) if name else None
            shape = getattr(module, "weight", torch.empty(0)).shape
            if name is None or tuple(shape) != (linear.n, linear.k):
                got = f"{list(shape)} in the model" if name else "no such layer in the model"
                raise ModelOptExtError.at(self.folder, linear.name, f"a layer [{linear.n}, {linear.k}]", got)
            if isinstance(module, nn.Linear):
                self.model.set_submodule(name, DecodedLinear(linear, target, dtype, ties))
            else:
                parts = {n: next(read_tensors([stored]))[1] for n, stored in linear.stored.items()}
                decoded[f"{name}.weight"] = decode_weight(linear, parts)
        return decoded

    def _load_others(self, checkpoint: Checkpoint | None, decoded: Mapping[str, torch.Tensor], tied: bool) -> None:
        """Load every other tensor, one at a time."""
        owned = (
            {s.name for linear in checkpoint.linears.values() for s in linear.stored.values()} if checkpoint else set()
        )
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names = {canonical_name(name): name for name in parameters}
        headers = checkpoint.tensors if checkpoint else read_headers(self.folder)
        wanted = [t for t in headers.values() if t.name not in owned and not is_kv_cache_tensor(t.name)]
        if tied:  # SGLang does not read a head that is tied to the embedding
            wanted = [t for t in wanted if t.name != _HEAD]
        loaded = set()
        with torch.no_grad():
            for name, weight in decoded.items():
                parameters[name].copy_(weight)
                loaded.add(name)
            for stored, tensor in read_tensors([t for t in wanted if not t.name.endswith(_NOT_WEIGHTS)]):
                parameter = names.get(canonical_name(stored.name))
                if parameter is None or parameters[parameter].shape != tensor.shape:
                    got = "none" if parameter is None else f"shape {list(parameters[parameter].shape)}"
                    raise ModelOptExtError.at(
                        stored.file, stored.name, f"a parameter {list(tensor.shape)} of the model", got
                    )
                parameters[parameter].copy_(tensor)
                loaded.add(parameter)
        missing = sorted(set(parameters) - loaded - ({_HEAD} if tied else set()))
        if missing:
            raise ModelOptExtError.at(self.folder, missing[0], "a tensor for every parameter of the model", "none")

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return log probabilities ``[len(ids) - 1, V]`` over the vocabulary: row ``t`` is for the token after ``ids[t]``."""
        logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0, :-1]
        # At least float32, like the server: bf16 log probabilities would round away the differences.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        found: NDArray[np.float32] = torch.log_softmax(logits.to(dtype), dim=-1).to(torch.float32).numpy()
        return found


def round_cached_vectors(model: Any, plan: KVCachePlan, ties: bool = False) -> None:
    """Make a Hugging Face model attend over keys and values read back from the cache of ``plan``, the newest included.

    ``ties``: round them like :func:`other_side`.
    """
    around = other_side if ties else None

    def rounded(
        number: int, attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        layer, recipe = plan.layer(number), plan.recipes.of(number)
        key = as_cached(key, recipe, layer.k_scale, layer.k_bias, around)
        # Only keys are rotated.
        plain = dataclasses.replace(recipe, rotate=False)
        return attend(query, key, as_cached(value, plain, layer.v_scale, layer.v_bias, around))

    replace_attention(model, rounded)
