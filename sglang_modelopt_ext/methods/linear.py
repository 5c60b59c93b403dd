"""The one linear method: any scheme, any of SGLang's parallel linear layers.

A fused layer (qkv, gate_up) keeps every shard's own scales. Shards whose activations are rounded alike share one matrix product
and differ only in the output scale of their rows; shards whose activations differ are computed apart. No scale is ever replaced
by another shard's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from sglang_modelopt_ext.checkpoint.values import check_zero_blocks
from sglang_modelopt_ext.dispatch import Layout, LinearRequest, choose_layout
from sglang_modelopt_ext.env import W4A8Math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.methods.parameters import make_parameter, shard_tensor
from sglang_modelopt_ext.schemes.base import LORA_A, LORA_B, PRE_QUANT_SCALE, LayerScheme
from sglang_modelopt_kernels.formats.base import DecodedWeight, TensorSpec, ValueRule
from sglang_modelopt_kernels.formats.nvfp4 import round_unit_to_e4m3

INPUT_SCALE = "input_scale"


@dataclass(frozen=True)
class ShardGroup:
    """Adjacent shards computed by one matrix product.

    Attributes:
        prepared: the layout's names of its tensors, and the layer's names of them.
        inputs: likewise what is applied to the input: ``input_scale``, ``pre_quant_scale`` and the low-rank factors, as present.
        rows: output features of the group.
    """

    prepared: dict[str, str]
    inputs: dict[str, str]
    rows: int


class ModelOptExtLinearMethod(LinearMethodBase):
    """Serves one linear layer of a quantized checkpoint.

    Args:
        scheme: how the layer is quantized.
        where: the checkpoint's folder, for messages.
        prefix: the layer's name in SGLang's module tree, for messages.
        math: the numerics of NVFP4 weights with FP8 activations, where ``rounds_weight_to_fp8``.
        rounds_weight_to_fp8: whether ``math`` applies to the scheme.
        stored_n: output features of each shard as the checkpoint stores them, None when there is no checkpoint to ask.
        stored_k: likewise the input features.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        where: object,
        prefix: str,
        math: W4A8Math,
        rounds_weight_to_fp8: bool,
        stored_n: tuple[int, ...] | None,
        stored_k: int | None,
    ) -> None:
        self.scheme = scheme
        self.where = where
        self.prefix = prefix
        self.math = math if rounds_weight_to_fp8 else "exact"
        self.stored_n = stored_n
        self.stored_k = stored_k
        self.layout: Layout | None = None
        self.groups: tuple[ShardGroup, ...] = ()
        self.verified = False
        """Set by the strict loader once every tensor of the layer was loaded and checked."""
        self._create: Callable[[], None] | None = None
        self.params_dtype = torch.get_default_dtype()
        self._rank_amax: Callable[[torch.Tensor], torch.Tensor] | None = None
        """For a row-parallel layer: the maximum over the ranks that hold the other slices of the same tokens."""
        self._shard_sizes: list[int] = []
        self._k = 0

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers the checkpoint's tensors on ``layer``. Raises ModelOptExtError when they do not fit this rank."""
        del output_size  # sizes come from the partitions
        self.params_dtype = params_dtype
        self._check_sizes(layer, input_size, output_partition_sizes)
        self._rank_amax = _rank_maximum(layer) if input_size_per_partition != input_size else None
        self._shard_sizes, self._k = list(output_partition_sizes), input_size_per_partition
        weight_loader = extra_weight_attrs["weight_loader"]

        def create() -> None:
            for spec in self.scheme.tensors:
                try:
                    parameter = make_parameter(spec, self._shard_sizes, self._k, weight_loader)
                except ValueError as error:
                    raise ModelOptExtError.at(
                        self.where,
                        f"{self.prefix}.{spec.name}",
                        f"sizes per rank that hold whole blocks of {self.scheme.weight.name}",
                        error,
                    ) from error
                layer.register_parameter(spec.name, parameter)

        create()
        self._create = create

    def _check_sizes(self, layer: torch.nn.Module, input_size: int, partition_sizes: list[int]) -> None:
        """The model's sizes against the checkpoint's: on a CPU SGLang's loaders pad a short tensor with zeros."""
        if self.stored_k is not None and self.stored_k != input_size:
            raise ModelOptExtError.at(
                self.where, f"{self.prefix}.weight", f"{input_size} inputs, as config.json has it", self.stored_k
            )
        expected = full_shard_sizes(layer, partition_sizes)
        if self.stored_n is not None and expected is not None and list(self.stored_n) != expected:
            raise ModelOptExtError.at(
                self.where, f"{self.prefix}.weight", f"{expected} outputs, as config.json has it", list(self.stored_n)
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Decodes the weights once into the layout that serves them, and drops what the checkpoint stored."""
        if not self.verified:
            raise ModelOptExtError.at(
                self.where,
                f"{self.prefix}.weight",
                "a load through the strict reader",
                "a loader that bypasses it (see --load-format)",
            )
        weight = layer.get_parameter("weight")
        capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
        request = LinearRequest(
            self.scheme,
            weight.device.type,
            capability[0] * 10 + capability[1] if capability else None,
            sum(self._shard_sizes),
            self._k,
        )
        self.layout = choose_layout(request, self.prefix)
        try:
            self.groups = tuple(self._prepare_group(layer, group) for group in self._group_shards(layer))
        except ValueError as error:
            if isinstance(error, ModelOptExtError):
                raise
            expected = f"weights that {self.layout.name} with math {self.math} can hold"
            raise ModelOptExtError.at(self.where, f"{self.prefix}.weight", expected, error) from error
        for spec in self.scheme.tensors:
            delattr(layer, spec.name)
        if self._is_vocabulary(layer):
            # SGLang takes an lm_head without a `weight` for unquantized and multiplies by it itself.
            layer.register_parameter("weight", layer.get_parameter(next(iter(self.groups[0].prepared.values()))))

    @staticmethod
    def _is_vocabulary(layer: torch.nn.Module) -> bool:
        return hasattr(layer, "org_vocab_size")

    def _shard(self, layer: torch.nn.Module, index: int) -> dict[str, torch.Tensor]:
        return {
            spec.name: shard_tensor(spec, layer.get_parameter(spec.name), index, self._shard_sizes)
            for spec in self.scheme.tensors
        }

    def _group_shards(self, layer: torch.nn.Module) -> list[list[int]]:
        """Indices of adjacent shards that smooth and round their input alike."""
        groups: list[list[int]] = []
        previous: dict[str, torch.Tensor] = {}
        for index in range(len(self._shard_sizes)):
            shard = self._shard(layer, index)
            current = {name: shard[name] for name in (INPUT_SCALE, PRE_QUANT_SCALE.name) if name in shard}
            if groups and all(torch.equal(current[name], previous[name]) for name in current):
                groups[-1].append(index)
            else:
                groups.append([index])
            previous = current
        return groups

    def _prepare_group(self, layer: torch.nn.Module, indices: list[int]) -> ShardGroup:
        shards = [self._shard(layer, index) for index in indices]
        decoded = [self._decode(shard) for shard in shards]
        rows = [weight.out_scale.reshape(-1, 1).expand(weight.unit.shape[0], 1) for weight in decoded]
        merged = DecodedWeight(torch.cat([weight.unit for weight in decoded]), torch.cat(rows))
        assert self.layout is not None
        prefix = f"{self.layout.name}_{indices[0]}_"
        prepared = self.layout.prepare(merged)
        # Copies: a slice would keep the whole parameter of the checkpoint alive.
        inputs = {name: shards[0][name].clone() for name in (INPUT_SCALE, PRE_QUANT_SCALE.name) if name in shards[0]}
        if self.scheme.low_rank:
            inputs[LORA_A] = torch.cat([shard[LORA_A].to(torch.float32) for shard in shards])
            inputs[LORA_B] = torch.block_diag(*(shard[LORA_B].to(torch.float32) for shard in shards))
        for name, tensor in (prepared | inputs).items():
            layer.register_parameter(prefix + name, torch.nn.Parameter(tensor, requires_grad=False))
        return ShardGroup(
            prepared={name: prefix + name for name in prepared},
            inputs={name: prefix + name for name in inputs},
            rows=merged.unit.shape[0],
        )

    def _decode(self, shard: dict[str, torch.Tensor]) -> DecodedWeight:
        for spec in self.scheme.tensors:
            if spec.values is ValueRule.BLOCK_SCALE_E4M3:
                check_zero_blocks(self.where, f"{self.prefix}.{spec.name}", shard["weight"], shard[spec.name])
        decoded = self.scheme.weight.decode(shard)
        if not bool(torch.isfinite(decoded.unit).all()):
            raise ValueError("a code times its block scale is beyond float32")
        return round_unit_to_e4m3(decoded) if self.math == "fp8" else decoded

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Makes room for the checkpoint's tensors again, so that weights can be updated from disk."""
        if self._create is None or self.layout is None:
            return
        device = layer.get_parameter(next(iter(self.groups[0].prepared.values()))).device
        for group in self.groups:
            for name in (*group.prepared.values(), *group.inputs.values()):
                delattr(layer, name)
        if self._is_vocabulary(layer):
            delattr(layer, "weight")
        self.groups, self.layout, self.verified = (), None, False
        with torch.device(device):
            self._create()

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``y = Q(x) @ W^T + bias`` for ``x`` ``[..., K]`` in fp32, bf16 or fp16; the result has its type."""
        assert self.layout is not None, "apply before process_weights_after_loading"
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        outputs, row = [], 0
        for group in self.groups:
            part = None if bias is None else bias[row : row + group.rows]
            outputs.append(self._apply_group(layer, group, flat, part).to(x.dtype))
            row += group.rows
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _apply_group(
        self, layer: torch.nn.Module, group: ShardGroup, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.layout is not None
        prepared = {name: getattr(layer, attribute) for name, attribute in group.prepared.items()}
        inputs = {name: getattr(layer, attribute) for name, attribute in group.inputs.items()}
        if self.scheme.smoothing:
            x = x * inputs[PRE_QUANT_SCALE.name]
        values, row_scale = x, None
        if self.scheme.activation is not None:
            scale = inputs.get(INPUT_SCALE)
            amax = self.scheme.activation.token_amax(x) if self._rank_amax else None
            if self._rank_amax is not None and amax is not None:
                scale = self._rank_amax(amax)
            values, row_scale = self.scheme.activation.quantize(x, scale)
        y = self.layout.matmul(prepared, values, row_scale, bias)
        if self.scheme.low_rank:
            y = y + (x @ inputs[LORA_A].T) @ inputs[LORA_B].T
        return y

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Rows of a quantized embedding, ``[..., K]`` in the model's type, for token ids ``[...]``."""
        assert self.layout is not None, "embedding before process_weights_after_loading"
        prepared = {name: getattr(layer, attribute) for name, attribute in self.groups[0].prepared.items()}
        return self.layout.rows(prepared, input_).to(self.params_dtype)

    def fill_dummy(self, layer: torch.nn.Module) -> None:
        """Legal values for ``--load-format dummy``: random codes, every scale such that weights are small."""
        for spec in self.scheme.tensors:
            parameter = layer.get_parameter(spec.name)
            _fill(parameter.data, spec)
        self.verified = True


def _fill(tensor: torch.Tensor, spec: TensorSpec) -> None:
    if spec.values is ValueRule.CODES:
        tensor.random_(0, 256) if tensor.dtype == torch.uint8 else tensor.zero_()
    elif spec.values is ValueRule.BLOCK_SCALE_UE8M0:
        tensor.fill_(117)  # 2^-10
    elif spec.values is ValueRule.BLOCK_SCALE_E4M3:
        tensor.copy_(torch.ones(tensor.shape, device=tensor.device))
    else:
        tensor.fill_(2.0**-10)


def full_shard_sizes(layer: Any, partition_sizes: list[int]) -> list[int] | None:
    """Output features of each shard over all ranks, as the model's configuration has them; None for unknown layers."""
    if hasattr(layer, "total_num_kv_heads"):  # QKVParallelLinear; its output_sizes count replicated KV heads
        head, v_head = layer.head_size, layer.v_head_size
        return [layer.total_num_heads * head, layer.total_num_kv_heads * head, layer.total_num_kv_heads * v_head]
    if hasattr(layer, "org_vocab_size"):  # embeddings and lm_head, padded by SGLang
        return [layer.org_vocab_size]
    if hasattr(layer, "output_sizes"):
        return list(layer.output_sizes)
    return [layer.output_size] if len(partition_sizes) == 1 and hasattr(layer, "output_size") else None


def _rank_maximum(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def maximum(amax: torch.Tensor) -> torch.Tensor:
        # SGLang's own collective: it is the one that may run inside a captured CUDA graph.
        return layer.tp_group.all_gather(amax, dim=-1).amax(dim=-1, keepdim=True)

    return maximum
