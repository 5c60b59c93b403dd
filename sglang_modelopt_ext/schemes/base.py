"""A scheme: what a ``quant_algo`` means for one linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import ActivationFormat, TensorSpec, WeightFormat


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer is quantized: ``y = activation(x) @ weight^T``."""

    algo: str
    weight: WeightFormat
    activation: ActivationFormat | None

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Everything a checkpoint stores for the layer but its bias, in reading order."""
        return self.weight.tensors + (self.activation.tensors if self.activation else ())

    def describe(self) -> str:
        """One phrase for logs, such as ``W4A8_NVFP4_FP8 (weights nvfp4_w4a8, activations fp8_static)``."""
        activation = self.activation.name if self.activation else "none"
        return f"{self.algo} (weights {self.weight.name}, activations {activation})"


@dataclass(frozen=True)
class Scheme:
    """One row of the table: a ModelOpt algorithm.

    Attributes:
        algo: ModelOpt's ``quant_algo`` in upper case.
        weights: names of the weight formats it may use, one for each group size.
        activation: name of the activation format, None for weight-only recipes.
        flag: the ``--quantization`` family the algorithm belongs to.
        rounds_weight_to_fp8: whether the ``fp8`` numerics of ``SGLANG_MODELOPT_EXT_W4A8_MATH`` apply to it.
        note: what a reader of the support matrix should know.
    """

    algo: str
    weights: tuple[str, ...]
    activation: str | None
    flag: str
    rounds_weight_to_fp8: bool = False
    note: str = ""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The group sizes the algorithm may have, 0 for none."""
        return tuple(WEIGHT_FORMATS[name].group_size for name in self.weights)

    def for_group(self, group_size: int | None, where: object, subject: str) -> LayerScheme:
        """The scheme of a layer with that group size (None: not declared, right when there is only one).

        Raises:
            ModelOptExtError: naming ``where`` and ``subject`` when the group size is not one the algorithm has, or is missing
                where it decides.
        """
        sizes = self.group_sizes
        expected = f"a group size of {' or '.join(map(str, sizes))} for {self.algo}"
        if group_size is None and len(sizes) > 1:
            raise ModelOptExtError.at(where, subject, expected, "none, and no tensors that decide it")
        if group_size is not None and group_size not in sizes:
            raise ModelOptExtError.at(where, subject, expected, group_size)
        name = self.weights[0 if group_size is None else sizes.index(group_size)]
        activation = ACTIVATION_FORMATS[self.activation] if self.activation else None
        return LayerScheme(self.algo, WEIGHT_FORMATS[name], activation)
