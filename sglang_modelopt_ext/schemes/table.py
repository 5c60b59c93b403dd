"""The table of schemes: adding a recipe is one row.

Names on both sides are ModelOpt's: ``quant_algo`` as ``modelopt/torch/export/quant_utils.py`` writes it, in upper case.
"""

from __future__ import annotations

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import Scheme

W4A8, MXFP4, UMBRELLA = "modelopt_w4a8", "modelopt_mxfp4", "modelopt_ext"

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
        flag=W4A8,
        note="MXFP4 weights; no activation scale is exported, so FP8 activations are scaled per token.",
    ),
)

SCHEMES: dict[str, Scheme] = {row.algo: row for row in _ROWS}
if len(SCHEMES) != len(_ROWS):
    raise RuntimeError("the scheme table names an algorithm twice")

FAMILIES: dict[str, frozenset[str]] = {
    W4A8: frozenset(row.algo for row in _ROWS if row.flag == W4A8),
    MXFP4: frozenset(row.algo for row in _ROWS if row.flag == MXFP4),
    UMBRELLA: frozenset(SCHEMES),
}
"""``--quantization`` flags of this package and the algorithms each accepts."""

STOCK_FLAGS: dict[str, str] = {
    "FP8": "modelopt_fp8",
    "NVFP4": "modelopt_fp4",
    "NVFP4_AWQ": "modelopt_fp4",
    "W4A16_NVFP4": "modelopt_fp4",
    "MXFP8": "mxfp8",
    "MIXED_PRECISION": "modelopt_mixed",
}
"""Algorithms left to SGLang 0.5.23 itself, and the flag that names each there."""

UNSERVED = frozenset(
    {
        "MXFP4",
        "NVFP4_SVD",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8_PB_WO",
        "W4A16_AWQ",
        "W4A8_AWQ",
        "W8A8_SQ_PER_CHANNEL",
        "W8A16",
    }
)
"""Algorithms ModelOpt 0.47 exports that nobody here serves yet (docs/roadmap.md)."""


def find_scheme(algo: str, where: object) -> Scheme:
    """The row of ``algo`` (any case). Raises ModelOptExtError naming ``where`` and listing the known ones."""
    scheme = SCHEMES.get(algo.upper())
    if scheme is None:
        raise ModelOptExtError.at(where, "quant_algo", f"one of {', '.join(sorted(SCHEMES))}", algo)
    return scheme


def fitting_flag(algo: str) -> str | None:
    """The ``--quantization`` that serves ``algo``, ours or SGLang's, or None when there is none."""
    scheme = SCHEMES.get(algo.upper())
    return scheme.flag if scheme else STOCK_FLAGS.get(algo.upper())


def is_known(algo: str) -> bool:
    """Whether ModelOpt 0.47 exports an algorithm of that name."""
    return algo.upper() in SCHEMES or algo.upper() in STOCK_FLAGS or algo.upper() in UNSERVED
