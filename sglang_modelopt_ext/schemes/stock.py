"""The behaviour of SGLang 0.5.22 and 0.5.23 themselves with each algorithm, for the support matrix and for messages.

Read from the sources of their wheels (``configs/model_config.py``, ``layers/quantization/modelopt_quant.py``,
``model_loader/weight_utils.py``); :data:`LEFT_AND_RUN` names what was run on a GPU too.
"""

from __future__ import annotations

STOCK_BEHAVIOUR: dict[str, str] = {
    "W4A8_NVFP4_FP8": "rejected: taken for modelopt_fp4 by its name, then unknown to it",
    "W4A8_MXFP4_FP8": "rejected: taken for modelopt_fp4 by its name, then unknown to it",
    "W4A8_AWQ": "rejected as unknown",
    "MXFP4": "rejected: the lower-case name has no entry",
    "NVFP4": "served from SM80 (Marlin, weight only) and from SM100 natively",
    "NVFP4_AWQ": "served from SM100; on SM80 to SM90 pre_quant_scale is not applied",
    "NVFP4_SVD": "rejected as unknown to modelopt_fp4",
    "W4A16_NVFP4": "group 16 served through Marlin from SM80; group 32 rejected",
    "FP8": "served from SM89; a pre_quant_scale is not applied",
    "FP8_PER_CHANNEL_PER_TOKEN": "rejected as unknown",
    "FP8_PB_WO": "rejected as unknown",
    "MXFP8": "loaded as mxfp8 from SM100; Llama's default loader maps the scales' names back and drops them",
    "W4A16_AWQ": "rejected as unknown",
    "W8A8_SQ_PER_CHANNEL": "rejected as unknown",
    "W8A16": "rejected as unknown",
}
"""SGLang's behaviour by algorithm; a test requires a row for each algorithm of the scheme table."""

_H200, _LATER, _LAST = (f"NVIDIA H200, {date}" for date in ("2026-11-29", "2026-11-30", "2026-12-01"))
LEFT_AND_RUN: dict[str, str] = {
    "NVFP4": _LAST,
    "W4A16_NVFP4, groups of 16": _H200,
    "FP8": _H200,
    "NVFP4, FP8 experts": _H200,
    "NVFP4, W4A16_NVFP4": _LAST,
    "NVFP4, FP8": _LATER,
    "NVFP4, and MXFP8, FP8_PB_WO or FP8_BLOCK_SCALES with SGLang's `weight_scale_inv`": f"{_LATER} (FP8_PB_WO)",
    "NVFP4, and MXFP8 or FP8_PB_WO with a `weight_scale` that DeepSeek V2 and V3, GLM-5 and Kimi K3 rename": f"{_LAST} (FP8_PB_WO)",
    "with an unknown algorithm": _LATER,
    "without `quantized_layers` (W4AFP8)": _LATER,
}
"""The GPU and date of a run of SGLang's side of a row of docs/flags.md (by its first cell), with this plugin installed and the
results compared. ``make docs`` puts them into the table."""
