"""Settings read from environment variables, all with one prefix; an unknown value is an error."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, cast

from sglang_modelopt_ext.errors import ModelOptExtError

PREFIX = "SGLANG_MODELOPT_EXT_"

W4A8Math = Literal["exact", "fp8"]


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name without the prefix, its choices (empty: any text), its default and its meaning."""

    name: str
    choices: tuple[str, ...]
    default: str
    help: str

    @property
    def variable(self) -> str:
        """The full name of the environment variable."""
        return PREFIX + self.name

    def read(self) -> str:
        """Return the value in the environment, or the default. Raises ModelOptExtError when it is not one of the choices."""
        value = os.environ.get(self.variable, "") or self.default
        if self.choices and value not in self.choices:
            raise ModelOptExtError.at(
                "environment", self.variable, f"one of {', '.join(filter(None, self.choices))}", repr(value)
            )
        return value


W4A8_MATH = Setting(
    "W4A8_MATH",
    ("exact", "fp8"),
    "exact",
    "How W4A8_NVFP4_FP8 multiplies NVFP4 weights with FP8 activations: `exact` multiplies code * block scale as it is (every "
    "product exact), `fp8` first rounds it to e4m3 as TensorRT-LLM does.",
)
MXFP4_ACTIVATIONS = Setting(
    "MXFP4_ACTIVATIONS",
    ("", "mxfp4", "none"),
    "",
    "Whether an `mxfp4` checkpoint rounds its activations: ModelOpt exports MXFP4_DEFAULT (`mxfp4`) and "
    "MXFP4_MLP_WEIGHT_ONLY (`none`) alike. Not set: `mxfp4`, with a warning in the log.",
)
FP4_ACTIVATIONS = Setting(
    "FP4_ACTIVATIONS",
    ("auto", "round", "keep"),
    "auto",
    "Whether recipes with FP4 activations (NVFP4, MXFP4) round them: `round` as the recipe says, `keep` leaves them in the "
    "model's type, `auto` rounds on a CPU and on Blackwell and keeps them on older GPUs, which gain nothing by it.",
)
GEMM = Setting(
    "GEMM",
    (),
    "",
    "Kernels that may serve linear layers, by the names of the support matrix, comma-separated, in order of preference; "
    "a layer that none of them supports is an error. Empty: all, in the plugin's own order.",
)
EXPERTS = Setting(
    "EXPERTS",
    (),
    "",
    "Kernels that may serve the experts of a mixture, by the names of the support matrix, comma-separated, in order of preference. "
    "Kernels that compute a whole layer of experts serve only by name, and are tried before those that compute one product. "
    "Empty: the kernels that compute one product, in the plugin's own order.",
)
TUNING = Setting(
    "TUNING",
    (),
    "",
    "A file made by `python -m sglang_modelopt_ext.tuning`: the kernels that support a layer are tried in the order of their "
    "measured times. It must be of this GPU and these versions, else it is not used and the log says why.",
)
ONLINE_RECIPE = Setting(
    "ONLINE_RECIPE",
    ("W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8"),
    "W4A8_MXFP4_FP8",
    "The recipe of an unquantized model under `--quantization modelopt_w4a8`. W4A8_NVFP4_FP8 needs input scales.",
)
ONLINE_SEARCH = Setting(
    "ONLINE_SEARCH",
    ("mse", "max"),
    "mse",
    "Block scales of a model that is quantized at load: those of the least squared error, or those of a max calibration.",
)
ONLINE_INPUT_SCALES = Setting(
    "ONLINE_INPUT_SCALES",
    (),
    "",
    "For a model that is quantized at load: a safetensors file, or a folder of them (a calibrated export of the same model), with "
    "an `input_scale` for every quantized layer.",
)
ONLINE_CACHE = Setting(
    "ONLINE_CACHE",
    (),
    "~/.cache/sglang-modelopt",
    "The folder that keeps models that were quantized at load.",
)
ERROR_FILE = Setting(
    "ERROR_FILE",
    (),
    "",
    "Internal: the file through which a scheduler process tells the launching process why it stopped.",
)
SETTINGS = (
    *(W4A8_MATH, MXFP4_ACTIVATIONS, FP4_ACTIVATIONS, GEMM, EXPERTS, TUNING),
    *(ONLINE_RECIPE, ONLINE_SEARCH, ONLINE_INPUT_SCALES, ONLINE_CACHE, ERROR_FILE),
)


def w4a8_math() -> W4A8Math:
    """Return the numerics of NVFP4 weights with FP8 activations (``SGLANG_MODELOPT_EXT_W4A8_MATH``), fixed for a server's life."""
    return cast(W4A8Math, W4A8_MATH.read())
