"""The table of schemes: adding a recipe is one row.

Names on both sides are ModelOpt's: ``quant_algo`` as ``modelopt/torch/export/quant_utils.py`` writes it, in upper case.
"""

from __future__ import annotations

from sglang_modelopt_ext.env import W4A8Math, w4a8_math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import UNQUANTIZED, LayerScheme, Scheme

W4A8, MXFP4, UMBRELLA = "modelopt_w4a8", "modelopt_mxfp4", "modelopt_ext"

FP8 = "FP8"
"""The algorithm of 8-bit floats under one scale for the whole weight."""

_ROWS = (
    Scheme(
        "W4A8_NVFP4_FP8",
        weights=("nvfp4_w4a8",),
        activation="fp8_static",
        flag=W4A8,
        rounds_weight_to_fp8=True,
        note="NVFP4 weights in blocks of 32 under a global scale of amax / 448, static per-tensor FP8 activations.",
    ),
    Scheme(
        "W4A8_MXFP4_FP8",
        weights=("mxfp4",),
        activation="fp8_per_token",
        static_activation="fp8_static",
        flag=W4A8,
        note="MXFP4 weights. FP8 activations are static per tensor in layers that store an input_scale (calibrated ones), and "
        "scaled per token in the others.",
    ),
    Scheme(
        "W4A8_AWQ",
        weights=("int4_awq_w4a8",),
        activation="fp8_static",
        flag=W4A8,
        note="INT4 weights in blocks of 128.",
    ),
    Scheme(
        "MXFP4",
        weights=("mxfp4",),
        activation="mxfp4_dynamic",
        flag=MXFP4,
        activation_in_doubt=True,
        note="Exported as `mxfp4` with and without activation rounding alike: SGLANG_MODELOPT_EXT_MXFP4_ACTIVATIONS says which; "
        "not set, they are rounded, with a warning.",
    ),
    Scheme(
        "NVFP4",
        weights=("nvfp4",),
        activation="nvfp4_dynamic",
        flag=UMBRELLA,
        stock_flag="modelopt_fp4",
        stock_capability=80,
        note="Also four-over-six, MSE sweep, local Hessian, AWQ_CLIP and the selective presets.",
    ),
    Scheme(
        "NVFP4_AWQ",
        weights=("nvfp4",),
        activation="nvfp4_dynamic",
        flag=UMBRELLA,
        stock_flag="modelopt_fp4",
        stock_capability=100,
        note="Below SM100 SGLang's own path returns before multiplying by pre_quant_scale.",
    ),
    Scheme("NVFP4_SVD", weights=("nvfp4",), activation="nvfp4_dynamic", flag=UMBRELLA, low_rank=True),
    Scheme(
        "W4A16_NVFP4",
        weights=("nvfp4", "nvfp4_bs32"),
        activation=None,
        flag=UMBRELLA,
        stock_flag="modelopt_fp4",
        stock_capability=80,
        note="SGLang itself serves group 16 only.",
    ),
    Scheme(
        FP8,
        weights=("fp8",),
        activation="fp8_static",
        flag=UMBRELLA,
        stock_flag="modelopt_fp8",
        stock_capability=89,
        note="A head or an embedding without an input_scale is weight-only.",
    ),
    Scheme("FP8_PER_CHANNEL_PER_TOKEN", weights=("fp8_per_channel",), activation="fp8_per_token", flag=UMBRELLA),
    Scheme(
        "FP8_PB_WO", weights=("fp8_block",), activation=None, flag=UMBRELLA, note="Blocks of 128 x 128, weight only."
    ),
    Scheme("MXFP8", weights=("mxfp8",), activation="mxfp8_dynamic", flag=UMBRELLA),
    Scheme("W4A16_AWQ", weights=("int4_awq",), activation=None, flag=UMBRELLA, note="INT4 weights in blocks of 128."),
    Scheme("W8A8_SQ_PER_CHANNEL", weights=("int8_per_channel",), activation="int8_static", flag=UMBRELLA),
    Scheme("W8A16", weights=("int8_per_channel",), activation=None, flag=UMBRELLA),
)

SCHEMES: dict[str, Scheme] = {row.algo: row for row in _ROWS}
if len(SCHEMES) != len(_ROWS):
    raise RuntimeError("the scheme table names an algorithm twice")

FAMILIES: dict[str, frozenset[str]] = {
    W4A8: frozenset(row.algo for row in _ROWS if row.flag == W4A8),
    MXFP4: frozenset(row.algo for row in _ROWS if row.flag == MXFP4),
    UMBRELLA: frozenset(SCHEMES),
}
"""The ``--quantization`` flags of this package and the algorithms that each accepts."""

MIXED_PRECISION = "MIXED_PRECISION"
"""The algorithm of a checkpoint that lists one for each layer; the listed ones are rows of the table."""


def find_scheme(algo: str, where: object) -> Scheme:
    """Return the row of ``algo`` (in any case). Raises ModelOptExtError, naming ``where`` and the known ones, without a row."""
    scheme = SCHEMES.get(algo.upper())
    if scheme is None:
        known = ", ".join(sorted([*SCHEMES, MIXED_PRECISION]))
        raise ModelOptExtError.at(where, "quant_algo", f"one of {known}", algo)
    return scheme


def math_of(scheme: LayerScheme, math: W4A8Math | None = None) -> W4A8Math:
    """Return the numerics of a layer's weights: ``math`` where the row of its recipe has the choice, else ``exact``.

    Args:
        scheme: how the layer is quantized.
        math: the choice; None for that of ``SGLANG_MODELOPT_EXT_W4A8_MATH``.
    """
    if scheme == UNQUANTIZED or not SCHEMES[scheme.algo].rounds_weight_to_fp8:
        return "exact"
    return w4a8_math() if math is None else math
