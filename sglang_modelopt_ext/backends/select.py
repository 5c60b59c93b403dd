"""Selection of the backend that serves a linear layer, or the experts of a mixture.

It happens once, when weights are loaded. The backends that support a request (scheme, device, sizes) are its candidates; the first
candidate that passes the check of :mod:`.self_test` and can hold the layer's weights serves it. Where none does, the error carries
the reason of every backend that was rejected. A layer holds exactly one prepared copy of its weights. At run time the number of
tokens selects among the kernels that read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

from sglang_modelopt_ext.backends.base import Backend, LinearRequest
from sglang_modelopt_ext.backends.experts.base import ExpertBackend, ExpertRequest, ReferenceExperts
from sglang_modelopt_ext.backends.experts.flashinfer import CutlassMxfp8Experts, CutlassNvfp4Experts
from sglang_modelopt_ext.backends.experts.fused import FusedExperts, FusedRequest
from sglang_modelopt_ext.backends.experts.grouped import GroupedBf16, GroupedDecoded, GroupedMxfp4, GroupedStreamed
from sglang_modelopt_ext.backends.linear.block_scaled import BlockScaled
from sglang_modelopt_ext.backends.linear.dense import Dense
from sglang_modelopt_ext.backends.linear.eight_bit import EightBit
from sglang_modelopt_ext.backends.linear.flashinfer import FlashInferFp4, FlashInferMxfp8, FlashInferSvdquant
from sglang_modelopt_ext.backends.linear.fp4 import BlackwellFp4, MmaFp4
from sglang_modelopt_ext.backends.linear.fp8 import Fp8
from sglang_modelopt_ext.backends.linear.humming import Humming
from sglang_modelopt_ext.backends.linear.mxfp4_blackwell import BlackwellMxfp4, WidenedMxfp4
from sglang_modelopt_ext.backends.linear.mxfp4_hopper import FoldedMxfp4
from sglang_modelopt_ext.backends.linear.streamed import Streamed
from sglang_modelopt_ext.backends.linear.weight_only import FlashInferWeightOnly, QuackWeightOnly
from sglang_modelopt_ext.backends.timings import ranking
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import EXPERTS, FP4_ACTIVATIONS, GEMM, Setting
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme, is_fp4

BLACKWELL = 100
"""The compute capability, times ten, from which on matrix instructions read FP4 activations."""


def rounds_fp4(device: Device) -> bool:
    """Return whether FP4 activations are rounded on ``device``, as ``SGLANG_MODELOPT_EXT_FP4_ACTIVATIONS`` says."""
    setting = FP4_ACTIVATIONS.read()
    return setting == "round" or (setting == "auto" and not device.before(BLACKWELL))


def served_scheme(scheme: LayerScheme, device: Device) -> LayerScheme:
    """Return ``scheme`` as it is served on ``device``: without FP4 activations where :func:`rounds_fp4` says so."""
    if not is_fp4(scheme.activation) or rounds_fp4(device):
        return scheme
    return dataclasses.replace(scheme, activation=None)


BACKENDS: tuple[Backend, ...] = (
    BlackwellMxfp4(),
    WidenedMxfp4(),
    # No kernel of this package was run on Blackwell, and FlashInfer's were: where it is installed, they come first.
    FlashInferFp4(),
    FlashInferSvdquant(),
    FlashInferMxfp8(),
    FlashInferWeightOnly(),
    BlackwellFp4(),
    MmaFp4(),
    # Whole tiles only, on SM90; faster than the next two there (benchmarks/results).
    Streamed(),
    # Rejects MXFP4 rows that E4M3 cannot hold; faster than BlockScaled on SM90 (benchmarks/results).
    FoldedMxfp4(),
    BlockScaled(),
    Fp8(),
    # Selected by name, or where a tuning file says that they are faster. humming was for some layers, from 128 tokens on, when it
    # split sums (H100, benchmarks/results); without that, narrow layers leave SMs idle, and it was not timed again.
    QuackWeightOnly(),
    Humming(),
    EightBit(),
    # Last: these do not keep weights at their stored size.
    Dense(torch.bfloat16, ("cuda",)),
    Dense(torch.float32, ("cuda", "cpu")),
)

EXPERT_BACKENDS: tuple[ExpertBackend, ...] = (
    GroupedMxfp4(),
    # Whole tiles only, on SM90, of MXFP4 rows that E4M3 can hold.
    GroupedStreamed(),
    GroupedDecoded(),
    GroupedBf16(),
    ReferenceExperts(),
)
FUSED_BACKENDS: tuple[FusedExperts, ...] = (CutlassNvfp4Experts(), CutlassMxfp8Experts())
"""Kernels of other packages for a whole layer of experts. They serve only by name: none of them was run, and ours were."""

AnyBackend = TypeVar("AnyBackend", Backend, ExpertBackend, FusedExperts)
ResultT = TypeVar("ResultT")


def objections(request: LinearRequest) -> dict[str, str | None]:
    """Return every backend that may serve, best first, with the reason why it does not support ``request``, or None.

    ``SGLANG_MODELOPT_EXT_GEMM`` limits them to the ones it names, in its order. Else those that a tuning file has times of for
    the layer come first, by their times, and the others after them in the order of :data:`BACKENDS`.

    Raises:
        ModelOptExtError: the variable names a backend there is not.
    """
    known = {backend.name: backend for backend in BACKENDS}
    wanted = _named(GEMM, known)
    return {name: known[name].supports(request) for name in wanted or _measured_first(request, known)}


def candidates(request: LinearRequest, subject: str) -> list[Backend]:
    """Return the backends that support ``request``, best first, in the order of :func:`objections`.

    Args:
        request: the layer.
        subject: its name, for the error.

    Raises:
        ModelOptExtError: there is none; with the reason of each.
    """
    known = {backend.name: backend for backend in BACKENDS}
    return _supporting(known, objections(request), request, subject)


def expert_candidates(request: ExpertRequest, subject: str) -> list[ExpertBackend]:
    """Return the backends that support one product of a layer's experts, best first.

    ``SGLANG_MODELOPT_EXT_EXPERTS`` limits them to the ones it names, in its order.

    Args:
        request: the product.
        subject: its name, for the error.

    Raises:
        ModelOptExtError: there is none; with the reason of each.
    """
    known = {backend.name: backend for backend in EXPERT_BACKENDS}
    wanted = [name for name in _named_experts() if name in known] or _measured_first(request, known)
    return _supporting(known, {name: known[name].supports(request) for name in wanted}, request, subject)


def fused_candidates(request: FusedRequest) -> tuple[list[FusedExperts], dict[str, str]]:
    """Return the backends that support a whole layer of experts, and the reasons of those that do not.

    Returns:
        Those among the backends named by ``SGLANG_MODELOPT_EXT_EXPERTS`` that support it, in the variable's order; and the
        reasons of the others it names, by name.
    """
    known = {backend.name: backend for backend in FUSED_BACKENDS}
    reasons = {name: known[name].objection(request) for name in _named_experts() if name in known}
    supporting = [known[name] for name, reason in reasons.items() if reason is None]
    return supporting, {name: reason for name, reason in reasons.items() if reason is not None}


def only_fused_is_named() -> bool:
    """Return whether ``SGLANG_MODELOPT_EXT_EXPERTS`` leaves no backend of a single product."""
    names = _named_experts()
    return bool(names) and not any(backend.name in names for backend in EXPERT_BACKENDS)


def prepare_first(
    backends: Iterable[AnyBackend], prepare: Callable[[AnyBackend], ResultT]
) -> tuple[tuple[AnyBackend, ResultT] | None, list[str]]:
    """Prepare a layer with the first backend that can serve it.

    Args:
        backends: the candidates, in order.
        prepare: checks a backend on this machine and prepares the layer's weights with it; a ValueError rejects the backend.

    Returns:
        The backend with what ``prepare`` returned, None where all are rejected; and ``<name>: <reason>`` for each rejected one.
    """
    rejected: list[str] = []
    for backend in backends:
        try:
            return (backend, prepare(backend)), rejected
        except ValueError as error:
            rejected.append(f"{backend.name}: {error}")
    return None, rejected


def _measured_first(request: LinearRequest, known: Iterable[str]) -> list[str]:
    """Return the names ``known``, those that a tuning file has times of first, by these, and the others in their own order."""
    names = list(known)
    measured = [name for name in ranking(request) if name in names]
    return [*measured, *(name for name in names if name not in measured)]


def _named(setting: Setting, known: Iterable[str]) -> list[str]:
    """Return the backends that ``setting`` names, if any. Raises ModelOptExtError for a name that is not ``known``."""
    wanted = setting.read().split(",") if setting.read() else []
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ModelOptExtError.at("environment", setting.variable, f"names among {', '.join(known)}", unknown[0])
    return wanted


def _named_experts() -> list[str]:
    known = [*(backend.name for backend in FUSED_BACKENDS), *(backend.name for backend in EXPERT_BACKENDS)]
    return _named(EXPERTS, known)


def _supporting(
    known: Mapping[str, AnyBackend], reasons: Mapping[str, str | None], request: LinearRequest, subject: str
) -> list[AnyBackend]:
    supporting = [known[name] for name, reason in reasons.items() if reason is None]
    if not supporting:
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise ModelOptExtError.at(subject, request.scheme.algo, "a kernel that serves it", why)
    return supporting
