"""The computation of a quantized linear layer, from its stored shards to its output. Needs no SGLang.

A fused layer (qkv, gate_up) keeps every shard's own scales. Shards whose activations are rounded alike share one matrix product
and differ only in the output scale of their rows; shards whose activations differ are computed apart. No scale is ever replaced
by another shard's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    BlockBackend,
    LinearRequest,
    PreparedWeight,
    ShardWeight,
    round_to_blocks,
    tensors_of,
    without_tensors,
)
from sglang_modelopt_ext.backends.select import candidates, prepare_first, served_scheme
from sglang_modelopt_ext.backends.self_test import check_backend
from sglang_modelopt_ext.backends.timings import gpu_of
from sglang_modelopt_ext.checkpoint.values import check_zero_blocks
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import W4A8Math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.handover import Rounding, announce_product, take
from sglang_modelopt_ext.schemes.base import LORA_A, LORA_B, PRE_QUANT_SCALE, LayerScheme
from sglang_modelopt_kernels.formats.base import ActivationFormat, BlockActivation, ValueRule
from sglang_modelopt_kernels.quantize import blocks, fp8, int8

logger = logging.getLogger(__name__)

INPUT_SCALE = "input_scale"

Shard = Mapping[str, torch.Tensor]
"""The tensors of one shard, by the last part of their names."""


@dataclass(frozen=True)
class ShardGroup:
    """Adjacent shards computed by one matrix product.

    Attributes:
        build: builds the prepared weight from its tensors, by field. It holds the static metadata and no tensor: the module's
            parameters are the only copy, whatever device they are moved to.
        prepared: the layer's name of each tensor of the prepared weight, by field.
        inputs: the layer's name of what is applied to the input: ``input_scale``, ``pre_quant_scale`` and the low-rank factors, as
            present.
        rows: output features of the group.
    """

    build: Callable[..., PreparedWeight]
    prepared: dict[str, str]
    inputs: dict[str, str]
    rows: int

    def weight(self, layer: torch.nn.Module) -> PreparedWeight:
        """Return the prepared weight over the parameters of ``layer``."""
        return self.build(**{name: getattr(layer, attribute) for name, attribute in self.prepared.items()})


class LinearProduct:
    """One quantized linear layer, prepared; its tensors are parameters of the module it is prepared on.

    Args:
        scheme: how the layer is quantized.
        where: the checkpoint's folder, for messages.
        prefix: the layer's name, for messages.
        math: the numerics of its weights.
        dtype: the model's type.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        where: object,
        prefix: str,
        math: W4A8Math = "exact",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.scheme = scheme
        self.where = where
        self.prefix = prefix
        self.math = math
        self.dtype = dtype
        self.rank_amax: Callable[[torch.Tensor], torch.Tensor] | None = None
        """For a row-parallel layer: the maximum over the ranks that hold the other slices of the same tokens."""
        self.groups: tuple[ShardGroup, ...] = ()
        self._backend: Backend | None = None
        self._operand = torch.float32
        self._input_names: list[str] = []

    @property
    def backend(self) -> Backend:
        """The backend that serves the layer, once it is prepared."""
        if self._backend is None:
            raise RuntimeError(f"{self.prefix} is used before it is prepared")
        return self._backend

    @property
    def is_prepared(self) -> bool:
        """Whether weights are in place."""
        return self._backend is not None

    def prepare(
        self,
        layer: torch.nn.Module,
        shards: Sequence[Shard],
        n: int,
        k: int,
        vocabulary: bool = False,
        backends: Sequence[Backend] | None = None,
    ) -> None:
        """Prepare the stored shards with the first backend that can hold them, as parameters of ``layer``.

        Args:
            layer: the module that will hold the tensors.
            shards: what is stored for each shard.
            n, k: output and input features of all of them.
            vocabulary: whether it is an embedding or an ``lm_head``.
            backends: the backends to try, in order; None for those of the dispatch.

        Raises:
            ModelOptExtError: a value is illegal, or no kernel takes the layer, with the reason of each.
        """
        check_blocks(self.where, self.prefix, self.scheme, shards)
        request = self.request(shards[0]["weight"].device, n, k, vocabulary)
        chosen = candidates(request, self.prefix) if backends is None else backends
        self.scheme = request.scheme
        self._input_names = (
            [PRE_QUANT_SCALE.name] if self.scheme.activation is None else [INPUT_SCALE, PRE_QUANT_SCALE.name]
        )
        members = group_shards(shards, self._input_names)
        weights = [
            [ShardWeight(self.scheme.weight, shards[index], self.math) for index in indices] for indices in members
        ]

        def prepare(backend: Backend) -> list[PreparedWeight]:
            check_backend(backend, request, shards[0]["weight"].device)
            return [backend.prepare(group) for group in weights]

        found, rejected = prepare_first(chosen, prepare)
        for reason in rejected:
            warn_once(f"modelopt_ext: {request.scheme.describe()}: rejected {reason}")
        if found is None:
            expected = f"weights that a kernel with math {self.math} can hold"
            raise ModelOptExtError.at(self.where, f"{self.prefix}.weight", expected, "; ".join(rejected))
        self._backend, prepared = found
        self._operand = self._backend.operand(request)
        self.groups = tuple(
            self._register(layer, [shards[index] for index in indices], indices[0], weight)
            for indices, weight in zip(members, prepared, strict=True)
        )

    def request(self, device: torch.device, n: int, k: int, vocabulary: bool = False) -> LinearRequest:
        """Return the request to the dispatch for the layer on ``device``, of ``n`` outputs and ``k`` inputs."""
        target = Device.of(device)
        scheme = served_scheme(self.scheme, target)
        return LinearRequest(scheme, target, n, k, self.math, self.dtype, vocabulary, gpu_of(device))

    def _register(
        self, layer: torch.nn.Module, shards: Sequence[Shard], first: int, weight: PreparedWeight
    ) -> ShardGroup:
        prepared = tensors_of(weight)
        # Copies: a slice would keep the whole parameter of the checkpoint alive.
        inputs = {name: shards[0][name].clone() for name in self._input_names if name in shards[0]}
        if self.scheme.low_rank:
            inputs[LORA_A] = torch.cat([shard[LORA_A].to(torch.float32) for shard in shards])
            if not (isinstance(self.backend, BlockBackend) and self.backend.takes_low_rank):
                inputs[LORA_B] = torch.block_diag(*(shard[LORA_B].to(torch.float32) for shard in shards))
        prefix = f"{self.backend.name}_{first}_"
        if self._takes_handover(inputs):
            announce_product()
        for name, tensor in (prepared | inputs).items():
            layer.register_parameter(prefix + name, torch.nn.Parameter(tensor, requires_grad=False))
        return ShardGroup(
            build=without_tensors(weight),
            prepared={name: prefix + name for name in prepared},
            inputs={name: prefix + name for name in inputs},
            rows=weight.out_scale.shape[0],
        )

    def _takes_handover(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the input may have been rounded by the module before: as :func:`round_input` does for all rows in E4M3."""
        return (
            may_be_rounded(self.scheme.activation, inputs, self.rank_amax)
            and not self.scheme.low_rank
            and not isinstance(self.backend, BlockBackend)
        )

    def release(self, layer: torch.nn.Module) -> None:
        """Take the prepared tensors off ``layer`` again."""
        for group in self.groups:
            for name in (*group.prepared.values(), *group.inputs.values()):
                delattr(layer, name)
        self.groups, self._backend = (), None

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``y = Q(x) @ W^T + bias`` for ``x`` ``[..., K]`` in fp32, bf16 or fp16; the result has its type."""
        if len(self.groups) == 1 and (rounded := self._handed_over(layer, x)) is not None:
            y: torch.Tensor = self.backend.matmul(self.groups[0].weight(layer), *rounded, bias, x.dtype)
            return y
        flat = x.reshape(-1, x.shape[-1])
        outputs, row = [], 0
        for group in self.groups:
            part = None if bias is None else bias[row : row + group.rows]
            outputs.append(self._apply_group(layer, group, flat, part))
            row += group.rows
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _handed_over(self, layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the input as the module before has rounded it, and its scale; None where it did not."""
        if not x.is_cuda:
            return None
        inputs = {name: getattr(layer, attribute) for name, attribute in self.groups[0].inputs.items()}
        if not self._takes_handover(inputs):
            return None
        return take_rounded(x, self._operand, inputs)

    def _apply_group(
        self, layer: torch.nn.Module, group: ShardGroup, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        weight = group.weight(layer)
        inputs = {name: getattr(layer, attribute) for name, attribute in group.inputs.items()}
        if not self.scheme.low_rank:
            return self._multiply(weight, inputs, x, bias, x.dtype)
        down = smooth(x, inputs) @ inputs[LORA_A].T
        if isinstance(self.backend, BlockBackend) and self.backend.takes_low_rank:
            return self.backend.matmul_low_rank(weight, self._blocks(self.backend, inputs, x), down, bias, x.dtype)
        y = self._multiply(weight, inputs, x, bias, torch.float32)
        return (y + down @ inputs[LORA_B].T).to(x.dtype)

    def _blocks(self, backend: BlockBackend, inputs: Mapping[str, torch.Tensor], x: torch.Tensor) -> BlockActivation:
        smoothing, scale = inputs.get(PRE_QUANT_SCALE.name), inputs.get(INPUT_SCALE)
        return round_to_blocks(self.scheme.activation, x, smoothing, scale, backend.swizzles(x.shape[0]))

    def _multiply(
        self,
        weight: PreparedWeight,
        inputs: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        if isinstance(self.backend, BlockBackend):
            return self.backend.matmul_blocks(weight, self._blocks(self.backend, inputs, x), bias, out_dtype)
        values, row_scale = round_input(x, self.scheme.activation, self._operand, inputs, self.rank_amax)
        return self.backend.matmul(weight, values, row_scale, bias, out_dtype)

    def rows(self, layer: torch.nn.Module, indices: torch.Tensor) -> torch.Tensor:
        """Return rows of a quantized embedding, ``[..., K]`` in the model's type, for token ids ``[...]``."""
        return self.backend.rows(self.groups[0].weight(layer), indices).to(self.dtype)


def check_blocks(where: object, prefix: str, scheme: LayerScheme, shards: Sequence[Shard]) -> None:
    """Raise ModelOptExtError where a shard has a zero block scale over codes that are not."""
    for spec in scheme.tensors:
        if spec.values is ValueRule.BLOCK_SCALE_E4M3:
            for shard in shards:
                check_zero_blocks(where, f"{prefix}.{spec.name}", shard["weight"], shard[spec.name])


def dense_weight(scheme: LayerScheme, shard: Shard) -> torch.Tensor:
    """Return the float32 weight ``[N, K]`` that a stored layer stands for: smoothing and the low-rank branch multiplied in."""
    decoded = scheme.weight.decode(shard)
    weight = decoded.unit * decoded.out_scale.reshape(-1, 1)
    if scheme.low_rank:
        weight = weight + shard[LORA_B].to(torch.float32) @ shard[LORA_A].to(torch.float32)
    return weight * shard[PRE_QUANT_SCALE.name].to(torch.float32) if PRE_QUANT_SCALE.name in shard else weight


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once in this process."""
    logger.warning(message)


def smooth(x: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return ``x`` in float32, times its ``pre_quant_scale`` where there is one."""
    fp32 = x.to(torch.float32)
    return fp32 * inputs[PRE_QUANT_SCALE.name] if PRE_QUANT_SCALE.name in inputs else fp32


def round_input(
    x: torch.Tensor,
    activation: ActivationFormat | None,
    operand: torch.dtype,
    inputs: Mapping[str, torch.Tensor],
    rank_amax: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the activations a backend reads, and their scale.

    Args:
        x: the input ``[M, K]``.
        activation: how it is rounded, None for not at all.
        operand: the type the backend reads.
        inputs: ``input_scale`` and ``pre_quant_scale``, as present: ``[]`` and ``[K]``, or one for each row, ``[M, 1]`` and
            ``[M, K]``.
        rank_amax: the maximum over the ranks that hold the other slices of the same rows.

    Returns:
        ``operand`` ``[M, K]``, and float32 ``[]`` or ``[M, 1]``, None for 1.
    """
    row_scale: torch.Tensor | None
    smoothing, scale = inputs.get(PRE_QUANT_SCALE.name), inputs.get(INPUT_SCALE)
    if activation is None:
        return (x if smoothing is None else smooth(x, inputs)).to(operand), None
    amax = None
    if rank_amax is not None and (own := activation.token_amax(smooth(x, inputs))) is not None:
        amax = rank_amax(own)
    for_all_rows = is_for_all_rows(inputs)
    if x.is_cuda and fp8.rounds(activation) and for_all_rows:
        values, row_scale = fp8.quantize_fp8(x, smoothing, scale, amax, exact_fp8(operand))
    elif x.is_cuda and blocks.rounds(activation) and for_all_rows:
        values, row_scale = blocks.round_blocks(x, activation.name, smoothing, scale, operand)
    elif operand == torch.int8 and int8.rounds(activation) and scale is not None and for_all_rows:
        quantize = int8.quantize_int8 if x.is_cuda else int8.naive_quantize_int8
        values, row_scale = quantize(x, smoothing, scale)
    else:
        values, row_scale = activation.quantize(smooth(x, inputs), scale if amax is None else amax)
    return values.to(operand), row_scale


def may_be_rounded(
    activation: ActivationFormat | None,
    inputs: Mapping[str, torch.Tensor],
    rank_amax: Callable[[torch.Tensor], torch.Tensor] | None,
) -> bool:
    """Return whether the module before may round the input, as :func:`round_input` does: to E4M3, all rows alike, by this rank."""
    return fp8.rounds(activation) and rank_amax is None and is_for_all_rows(inputs)


def take_rounded(
    x: torch.Tensor, operand: torch.dtype, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what :func:`round_input` would, as the module before has rounded ``x``; None where it did not."""
    smoothing, scale = inputs.get(PRE_QUANT_SCALE.name), inputs.get(INPUT_SCALE)
    rounded = take(x, Rounding(smoothing, scale, exact_fp8(operand)))
    return None if rounded is None else (rounded[0].to(operand), rounded[1])


def is_for_all_rows(inputs: Mapping[str, torch.Tensor]) -> bool:
    """Return whether ``input_scale`` and ``pre_quant_scale``, as present, are those of all rows."""
    smoothing, scale = inputs.get(PRE_QUANT_SCALE.name), inputs.get(INPUT_SCALE)
    return (scale is None or scale.numel() == 1) and (smoothing is None or smoothing.dim() == 1)


def exact_fp8(operand: torch.dtype) -> torch.dtype:
    """Return the type in which kernels write E4M3 values for a backend that reads ``operand``: E4M3, or float16."""
    return operand if operand == torch.float8_e4m3fn else torch.float16


def group_shards(shards: Sequence[Shard], names: Sequence[str]) -> list[list[int]]:
    """Return indices of adjacent shards that agree in the tensors ``names``, where they have them."""
    groups: list[list[int]] = []
    for index, shard in enumerate(shards):
        present = [name for name in names if name in shard]
        if groups and all(torch.equal(shard[name], shards[index - 1][name]) for name in present):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
