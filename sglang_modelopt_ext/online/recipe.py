"""The recipes by which an unquantized checkpoint is quantized at load, from the flag and the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_modelopt_ext.env import (
    MXFP4_ACTIVATIONS,
    ONLINE_INPUT_SCALES,
    ONLINE_RECIPE,
    ONLINE_SEARCH,
    W4A8Math,
    w4a8_math,
)
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import MXFP4, SCHEMES, W4A8
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import SearchedWeightFormat

ONLINE_FLAGS = (W4A8, MXFP4)
"""The values of ``--quantization`` that quantize an unquantized checkpoint."""


@dataclass(frozen=True)
class Recipe:
    """Everything besides the checkpoint that decides the result.

    Attributes:
        algo: ``quant_algo`` as ModelOpt writes it.
        search: whether block scales are searched for; otherwise they are those of a max calibration.
        rounds_activations: whether the inputs of the layers are rounded, recorded in the result.
        math: how kernels multiply the weights, whose own rounding the search takes into account.
        input_scales: a safetensors file, or a folder of them, with an ``input_scale`` for every quantized layer; None where
            inputs are scaled while serving.
    """

    algo: str
    search: bool = True
    rounds_activations: bool = True
    math: W4A8Math = "exact"
    input_scales: Path | None = None

    def __post_init__(self) -> None:
        """Raise ModelOptExtError where the recipe needs input scales and has none, or has some that it does not use."""
        scheme = SCHEMES[self.algo.upper()]
        static = [name for name in scheme.activations if ACTIVATION_FORMATS[name].tensors]
        if self.input_scales is None and len(static) == len(scheme.activations):
            raise ModelOptExtError.at(
                "environment", ONLINE_INPUT_SCALES.variable, f"a file of input scales for {self.algo}", "none"
            )
        if self.input_scales is not None and not static:
            raise ModelOptExtError.at(
                "environment",
                ONLINE_INPUT_SCALES.variable,
                f"none for {self.algo}, which stores no input scales",
                self.input_scales,
            )

    @property
    def weight(self) -> SearchedWeightFormat:
        """The format of the weights."""
        found = WEIGHT_FORMATS[SCHEMES[self.algo.upper()].weights[0]]
        assert isinstance(found, SearchedWeightFormat), "all online recipes have 4-bit floats in blocks"
        return found


def recipe_for(flag: str) -> Recipe:
    """Return the recipe of a flag of :data:`ONLINE_FLAGS` by the settings. Raises ModelOptExtError for some that do not fit."""
    given = ONLINE_INPUT_SCALES.read()
    algo = ONLINE_RECIPE.read() if flag == W4A8 else "mxfp4"
    return Recipe(
        algo=algo,
        search=ONLINE_SEARCH.read() == "mse",
        rounds_activations=flag == W4A8 or MXFP4_ACTIVATIONS.read() != "none",
        math=w4a8_math() if SCHEMES[algo.upper()].rounds_weight_to_fp8 else "exact",
        input_scales=Path(given).expanduser() if given else None,
    )
