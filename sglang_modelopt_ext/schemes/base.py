"""Schemes: the meaning of a ``quant_algo`` for one linear layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeGuard

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import ActivationFormat, Dim, TensorSpec, ValueRule, WeightFormat
from sglang_modelopt_kernels.formats.unquantized import UnquantizedWeight

# A server keeps such a tensor in the first type: float32 holds the values of all three exactly.
_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PRE_QUANT_SCALE = TensorSpec("pre_quant_scale", _MODEL_DTYPES, (Dim("K"),), ValueRule.POSITIVE)
"""AWQ's and SmoothQuant's smoothing: ``y = Q(x * pre_quant_scale) @ Q(W)^T``, W already divided by it."""

BIAS = TensorSpec("bias", _MODEL_DTYPES, (Dim("N"),), ValueRule.FINITE)
"""The bias of a layer, which is no part of its scheme."""


def is_fp4(activation: ActivationFormat | None) -> TypeGuard[ActivationFormat]:
    """Return whether activations are E2M1, which ``SGLANG_MODELOPT_EXT_FP4_ACTIVATIONS`` may leave out."""
    return activation is not None and activation.number_type.element == "e2m1"


LORA_A, LORA_B = "svdquant_lora_a", "svdquant_lora_b"


def low_rank_tensors(rank: int) -> tuple[TensorSpec, TensorSpec]:
    """Return the specs of SVDQuant's factors A and B: ``y += ((x * pre_quant_scale) @ lora_a^T) @ lora_b^T``."""
    return (
        TensorSpec(LORA_A, _MODEL_DTYPES, (Dim(None, rank), Dim("K")), ValueRule.FINITE),
        TensorSpec(LORA_B, _MODEL_DTYPES, (Dim("N"), Dim(None, rank)), ValueRule.FINITE),
    )


@dataclass(frozen=True)
class LayerScheme:
    """The quantization of one linear layer: ``y = activation(x * pre_quant_scale) @ weight^T + low rank``.

    Attributes:
        algo: ModelOpt's algorithm.
        weight: the weight's format.
        activation: the format that the input is rounded to, None where it is not rounded.
        smoothing: whether the layer has a ``pre_quant_scale``.
        low_rank: the rank of SVDQuant's branch, 0 for none.
    """

    algo: str
    weight: WeightFormat
    activation: ActivationFormat | None
    smoothing: bool = False
    low_rank: int = 0

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The specs of all tensors that a checkpoint stores for the layer, without its bias."""
        specs = self.weight.tensors
        if self.activation is not None:
            specs += self.activation.tensors
        if self.smoothing:
            specs += (PRE_QUANT_SCALE,)
        if self.low_rank:
            specs += low_rank_tensors(self.low_rank)
        return specs

    def describe(self) -> str:
        """Return a phrase for logs, such as ``W4A8_NVFP4_FP8 (weights nvfp4_w4a8, activations fp8_static)``."""
        if self == UNQUANTIZED:
            return self.algo
        parts = [f"weights {self.weight.name}", f"activations {self.activation.name if self.activation else 'none'}"]
        if self.smoothing:
            parts.append("smoothing")
        if self.low_rank:
            parts.append(f"rank {self.low_rank}")
        return f"{self.algo} ({', '.join(parts)})"


UNQUANTIZED = LayerScheme("unquantized", UnquantizedWeight(), None)
"""An expert that is stored as it is, beside quantized ones. It is no algorithm of ModelOpt, and in no table."""


@dataclass(frozen=True)
class Scheme:
    """One row of the table: a ModelOpt algorithm.

    Attributes:
        algo: ModelOpt's ``quant_algo`` in upper case.
        weights: names of its weight formats, one for each group size.
        activation: name of the activation format, None for weight-only recipes.
        flag: this package's ``--quantization`` family for the algorithm.
        static_activation: name of the activation format of layers that store its scale, where ModelOpt exports layers with and
            without one under this algorithm; None where all layers have ``activation``.
        low_rank: whether its layers have SVDQuant's low-rank branch.
        activation_in_doubt: whether a recipe with and one without activation rounding have equal exports.
        rounds_weight_to_fp8: whether the ``fp8`` numerics of ``SGLANG_MODELOPT_EXT_W4A8_MATH`` apply to it.
        stock_flag: SGLang's own ``--quantization`` for it, None when SGLang does not serve it.
        stock_capability: the compute capability times ten from which SGLang's own path is correct.
        note: a remark for the support matrix.
    """

    algo: str
    weights: tuple[str, ...]
    activation: str | None
    flag: str
    static_activation: str | None = None
    low_rank: bool = False
    activation_in_doubt: bool = False
    rounds_weight_to_fp8: bool = False
    stock_flag: str | None = None
    stock_capability: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError where the stored tensors cannot tell the two activation formats apart."""
        if self.static_activation is None:
            return
        dynamic = ACTIVATION_FORMATS[self.activation].tensors if self.activation else ()
        if dynamic or not ACTIVATION_FORMATS[self.static_activation].tensors:
            raise ValueError(f"{self.algo}: no stored tensor tells {self.static_activation} from {self.activation}")

    @property
    def activations(self) -> tuple[str, ...]:
        """The names of the activation formats that its layers may have; empty for weight-only recipes."""
        return tuple(name for name in (self.activation, self.static_activation) if name is not None)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The group sizes that its layers may have; 0 for a format without groups."""
        return tuple(WEIGHT_FORMATS[name].group_size for name in self.weights)

    def weight_format(self, group_size: int | None, where: object, subject: str) -> WeightFormat:
        """Return the weight format with ``group_size``; None (not declared) stands for the only one.

        Raises:
            ModelOptExtError: the algorithm has no such group size, or has several and none is declared; the error names ``where``
                and ``subject``.
        """
        sizes = self.group_sizes
        if group_size is None and len(sizes) == 1:
            return WEIGHT_FORMATS[self.weights[0]]
        if group_size not in sizes:
            expected = f"a group size of {' or '.join(map(str, sizes))} for {self.algo}"
            got = "none, and no tensors that decide it" if group_size is None else group_size
            raise ModelOptExtError.at(where, subject, expected, got)
        return WEIGHT_FORMATS[self.weights[sizes.index(group_size)]]

    def activation_format(self, stored: Collection[str] = ()) -> ActivationFormat | None:
        """Return the activation format of a layer whose stored tensors have the spec names ``stored``; None if it has none."""
        if self.static_activation is not None:
            static = ACTIVATION_FORMATS[self.static_activation]
            if any(spec.name in stored for spec in static.tensors):
                return static
        return ACTIVATION_FORMATS[self.activation] if self.activation else None
