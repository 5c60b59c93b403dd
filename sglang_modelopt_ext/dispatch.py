"""Which kernel serves a linear layer.

One step at load: a request (scheme, device, sizes) is offered to every layout in order; the first that has no objection to it
and can hold the layer's weights gets the layer, and when none is left the error carries every objection. A layer holds
exactly one prepared copy of its weights. At run time the number of tokens picks among the kernels that read the layout.
"""

from __future__ import annotations

import dataclasses

import torch

from sglang_modelopt_ext.env import FP4_ACTIVATIONS, GEMM
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layouts.base import Layout, LinearRequest
from sglang_modelopt_ext.layouts.block_scaled import BlockScaled
from sglang_modelopt_ext.layouts.dense import Dense
from sglang_modelopt_ext.layouts.folded import FoldedMxfp4
from sglang_modelopt_ext.layouts.fp4 import BlackwellFp4
from sglang_modelopt_ext.layouts.fp8 import Fp8
from sglang_modelopt_ext.layouts.mxfp4 import BlackwellMxfp4, WidenedMxfp4
from sglang_modelopt_ext.schemes.base import LayerScheme

BLACKWELL = 100
"""Compute capability times ten from which matrix instructions take FP4 activations."""


def served_scheme(scheme: LayerScheme, device: str, capability: int | None) -> LayerScheme:
    """``scheme`` without its activation rounding where ``SGLANG_MODELOPT_EXT_FP4_ACTIVATIONS`` leaves that out."""
    if scheme.activation is None or scheme.activation.name not in ("nvfp4_dynamic", "mxfp4_dynamic"):
        return scheme
    setting = FP4_ACTIVATIONS.read()
    older_gpu = device == "cuda" and capability is not None and capability < BLACKWELL
    if setting == "keep" or (setting == "auto" and older_gpu):
        return dataclasses.replace(scheme, activation=None)
    return scheme


LAYOUTS: tuple[Layout, ...] = (
    BlackwellMxfp4(),
    WidenedMxfp4(),
    BlackwellFp4(),
    BlockScaled(),
    FoldedMxfp4(),  # behind the measured one until it is measured itself
    Fp8(),
    Dense(torch.bfloat16, ("cuda",)),
    Dense(torch.float32, ("cuda", "cpu")),
)


def candidates(request: LinearRequest, subject: str) -> list[Layout]:
    """The layouts that take ``request``, best first. Raises ModelOptExtError with every reason when there is none.

    ``SGLANG_MODELOPT_EXT_GEMM`` limits them to the ones it names, in its order.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    wanted = GEMM.read().split(",") if GEMM.read() else list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ModelOptExtError.at("environment", GEMM.variable, f"names among {', '.join(known)}", unknown[0])
    reasons = {name: known[name].supports(request) for name in wanted}
    taking = [known[name] for name, reason in reasons.items() if reason is None]
    if not taking:
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise ModelOptExtError.at(subject, request.scheme.algo, "a kernel that serves it", why)
    return taking
