"""Which kernel serves a linear layer, or the experts of a mixture.

One step at load: a request (scheme, device, sizes) is offered to every backend in order; the first that has no objection to it
and can hold the layer's weights gets the layer, and when none is left the error carries every objection. A layer holds
exactly one prepared copy of its weights. At run time the number of tokens picks among the kernels that read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from sglang_modelopt_ext.backends.base import Backend, LinearRequest
from sglang_modelopt_ext.backends.experts.base import ExpertBackend, ExpertRequest, ReferenceExperts
from sglang_modelopt_ext.backends.experts.flashinfer import CutlassMxfp8Experts, CutlassNvfp4Experts
from sglang_modelopt_ext.backends.experts.fused import FusedExperts, FusedRequest
from sglang_modelopt_ext.backends.experts.grouped import GroupedBf16, GroupedDecoded, GroupedMxfp4
from sglang_modelopt_ext.backends.linear.block_scaled import BlockScaled
from sglang_modelopt_ext.backends.linear.dense import Dense
from sglang_modelopt_ext.backends.linear.eight_bit import EightBit
from sglang_modelopt_ext.backends.linear.flashinfer import FlashInferFp4, FlashInferMxfp8, FlashInferSvdquant
from sglang_modelopt_ext.backends.linear.fp4 import BlackwellFp4, MmaFp4
from sglang_modelopt_ext.backends.linear.fp8 import Fp8
from sglang_modelopt_ext.backends.linear.humming import Humming
from sglang_modelopt_ext.backends.linear.mxfp4_blackwell import BlackwellMxfp4, WidenedMxfp4
from sglang_modelopt_ext.backends.linear.mxfp4_hopper import FoldedMxfp4
from sglang_modelopt_ext.backends.linear.weight_only import FlashInferWeightOnly, QuackWeightOnly
from sglang_modelopt_ext.backends.timings import ranking
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import EXPERTS, FP4_ACTIVATIONS, GEMM, Setting
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme, is_fp4

BLACKWELL = 100
"""Compute capability times ten from which matrix instructions take FP4 activations."""


def rounds_fp4(device: Device) -> bool:
    """Whether recipes with FP4 activations are served with them, as ``SGLANG_MODELOPT_EXT_FP4_ACTIVATIONS`` says."""
    setting = FP4_ACTIVATIONS.read()
    return setting == "round" or (setting == "auto" and not device.before(BLACKWELL))


def served_scheme(scheme: LayerScheme, device: Device) -> LayerScheme:
    """``scheme`` without its activation rounding where ``SGLANG_MODELOPT_EXT_FP4_ACTIVATIONS`` leaves that out."""
    if not is_fp4(scheme.activation) or rounds_fp4(device):
        return scheme
    return dataclasses.replace(scheme, activation=None)


BACKENDS: tuple[Backend, ...] = (
    BlackwellMxfp4(),
    WidenedMxfp4(),
    # On Blackwell nothing of this package has run, and these have: where FlashInfer is installed, its kernels come first.
    FlashInferFp4(),
    FlashInferSvdquant(),
    FlashInferMxfp8(),
    FlashInferWeightOnly(),
    BlackwellFp4(),
    MmaFp4(),
    # MXFP4 rows that E4M3 cannot hold go on to the next; the fold is faster on SM90 (benchmarks/results).
    FoldedMxfp4(),
    BlockScaled(),
    Fp8(),
    # By name, or where a tuning file says that they are faster. humming is, from 32 tokens on, but adds up in an order that differs
    # from launch to launch: its results do not repeat bit for bit (both on an H100). quack was not run.
    QuackWeightOnly(),
    Humming(),
    EightBit(),
    # What keeps no weight at its stored size comes last.
    Dense(torch.bfloat16, ("cuda",)),
    Dense(torch.float32, ("cuda", "cpu")),
)

EXPERT_BACKENDS: tuple[ExpertBackend, ...] = (GroupedMxfp4(), GroupedDecoded(), GroupedBf16(), ReferenceExperts())
FUSED_BACKENDS: tuple[FusedExperts, ...] = (CutlassNvfp4Experts(), CutlassMxfp8Experts())
"""For a whole layer of experts, in other packages. They serve by name alone: none was run, and ours were."""

AnyBackend = TypeVar("AnyBackend", Backend, ExpertBackend)


def objections(request: LinearRequest) -> dict[str, str | None]:
    """Every backend that may serve, best first, with its reason not to take ``request``, None where it does.

    ``SGLANG_MODELOPT_EXT_GEMM`` limits them to the ones it names, in its order. Else those that a tuning file has times of for
    the layer come first, by their times, and the others after them in the order of ``BACKENDS``.

    Raises:
        ModelOptExtError: the variable names a backend there is not.
    """
    known = {backend.name: backend for backend in BACKENDS}
    wanted = _named(GEMM, known)
    return {name: known[name].supports(request) for name in wanted or _measured_first(request, known)}


def _measured_first(request: LinearRequest, known: Iterable[str]) -> list[str]:
    """The backends that a tuning file has times of, by these, then the others in the built-in order."""
    names = list(known)
    measured = [name for name in ranking(request) if name in names]
    return [*measured, *(name for name in names if name not in measured)]


def _named(setting: Setting, known: Iterable[str]) -> list[str]:
    """The backends that ``setting`` names, if any. Raises ModelOptExtError for one there is not."""
    wanted = setting.read().split(",") if setting.read() else []
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ModelOptExtError.at("environment", setting.variable, f"names among {', '.join(known)}", unknown[0])
    return wanted


def candidates(request: LinearRequest, subject: str) -> list[Backend]:
    """The backends that take ``request``, best first. Raises ModelOptExtError with every reason when there is none."""
    known = {backend.name: backend for backend in BACKENDS}
    return _without_objection(known, objections(request), request, subject)


def expert_candidates(request: ExpertRequest, subject: str) -> list[ExpertBackend]:
    """Likewise for one product of a layer's experts; ``SGLANG_MODELOPT_EXT_EXPERTS`` limits them to the ones it names."""
    known = {backend.name: backend for backend in EXPERT_BACKENDS}
    wanted = [name for name in _named_experts() if name in known] or _measured_first(request, known)
    return _without_objection(known, {name: known[name].supports(request) for name in wanted}, request, subject)


def fused_candidates(request: FusedRequest) -> tuple[list[FusedExperts], dict[str, str]]:
    """Likewise for a whole layer of experts: the backends that ``SGLANG_MODELOPT_EXT_EXPERTS`` names and that take it, in order;
    and why the others it names do not.
    """
    known = {backend.name: backend for backend in FUSED_BACKENDS}
    reasons = {name: known[name].supports(request) for name in _named_experts() if name in known}
    taking = [known[name] for name, reason in reasons.items() if reason is None]
    return taking, {name: reason for name, reason in reasons.items() if reason is not None}


def only_fused_is_named() -> bool:
    """Whether ``SGLANG_MODELOPT_EXT_EXPERTS`` leaves no backend of one product."""
    names = _named_experts()
    return bool(names) and not any(backend.name in names for backend in EXPERT_BACKENDS)


def _named_experts() -> list[str]:
    known = [*(backend.name for backend in FUSED_BACKENDS), *(backend.name for backend in EXPERT_BACKENDS)]
    return _named(EXPERTS, known)


def _without_objection(
    known: Mapping[str, AnyBackend], reasons: Mapping[str, str | None], request: LinearRequest, subject: str
) -> list[AnyBackend]:
    taking = [known[name] for name, reason in reasons.items() if reason is None]
    if not taking:
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise ModelOptExtError.at(subject, request.scheme.algo, "a kernel that serves it", why)
    return taking
