"""A scheme: what a ``quant_algo`` means for one linear layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeGuard

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import ActivationFormat, Dim, TensorSpec, ValueRule, WeightFormat

# The first one is the type a server keeps such a tensor in: float32 holds all three exactly.
_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PRE_QUANT_SCALE = TensorSpec("pre_quant_scale", _MODEL_DTYPES, (Dim("K"),), ValueRule.POSITIVE)
"""AWQ's and SmoothQuant's smoothing: ``y = Q(x * pre_quant_scale) @ Q(W)^T``, W already divided by it."""


def is_fp4(activation: ActivationFormat | None) -> TypeGuard[ActivationFormat]:
    """Whether activations are E2M1, which ``SGLANG_MODELOPT_EXT_FP4_ACTIVATIONS`` may leave out."""
    return activation is not None and activation.number_type.element == "e2m1"


LORA_A, LORA_B = "svdquant_lora_a", "svdquant_lora_b"


def low_rank_tensors(rank: int) -> tuple[TensorSpec, TensorSpec]:
    """Return SVDQuant's factors: ``y += ((x * pre_quant_scale) @ lora_a^T) @ lora_b^T``."""
    return (
        TensorSpec(LORA_A, _MODEL_DTYPES, (Dim(None, rank), Dim("K")), ValueRule.FINITE),
        TensorSpec(LORA_B, _MODEL_DTYPES, (Dim("N"), Dim(None, rank)), ValueRule.FINITE),
    )


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer is quantized: ``y = activation(x * pre_quant_scale) @ weight^T + low rank``.

    Attributes:
        algo: ModelOpt's algorithm.
        weight: how the weight is stored.
        activation: how the input is rounded, None for weight-only recipes.
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
        """Everything a checkpoint stores for the layer but its bias, in reading order."""
        specs = self.weight.tensors
        if self.activation is not None:
            specs += self.activation.tensors
        if self.smoothing:
            specs += (PRE_QUANT_SCALE,)
        if self.low_rank:
            specs += low_rank_tensors(self.low_rank)
        return specs

    def describe(self) -> str:
        """Return one phrase for logs, such as ``W4A8_NVFP4_FP8 (weights nvfp4_w4a8, activations fp8_static)``."""
        parts = [f"weights {self.weight.name}", f"activations {self.activation.name if self.activation else 'none'}"]
        if self.smoothing:
            parts.append("smoothing")
        if self.low_rank:
            parts.append(f"rank {self.low_rank}")
        return f"{self.algo} ({', '.join(parts)})"


@dataclass(frozen=True)
class Scheme:
    """One row of the table: a ModelOpt algorithm.

    Attributes:
        algo: ModelOpt's ``quant_algo`` in upper case.
        weights: names of the weight formats it may use, one for each group size.
        activation: name of the activation format, None for weight-only recipes.
        static_activation: name of the activation format of layers that store its tensors, where ModelOpt exports layers with and
            without them under the algorithm's name; None where ``activation`` serves every layer.
        flag: the ``--quantization`` family of this package the algorithm belongs to.
        low_rank: whether its layers carry SVDQuant's branch.
        activation_in_doubt: the same export stands for a recipe with and one without activation rounding.
        rounds_weight_to_fp8: whether the ``fp8`` numerics of ``SGLANG_MODELOPT_EXT_W4A8_MATH`` apply to it.
        stock_flag: SGLang's own ``--quantization`` for it, None when SGLang does not serve it.
        stock_capability: the compute capability times ten from which SGLang's own path is right.
        note: what a reader of the support matrix should know.
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
        """Names of the activation formats its layers may have; none for weight-only recipes."""
        return tuple(name for name in (self.activation, self.static_activation) if name is not None)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The group sizes the algorithm may have, 0 for none."""
        return tuple(WEIGHT_FORMATS[name].group_size for name in self.weights)

    def weight_format(self, group_size: int | None, where: object, subject: str) -> WeightFormat:
        """Return the weight format of that group size (None: not declared, right when there is only one).

        Raises:
            ModelOptExtError: naming ``where`` and ``subject`` when the group size is not one the algorithm has, or is missing
                where it decides.
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
        """Return the activation format of a layer that stores the tensors ``stored``, by spec name."""
        if self.static_activation is not None:
            static = ACTIVATION_FORMATS[self.static_activation]
            if any(spec.name in stored for spec in static.tensors):
                return static
        return ACTIVATION_FORMATS[self.activation] if self.activation else None
