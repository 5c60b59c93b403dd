"""Activations that the module before a product has rounded already, handed over beside the tensor. It needs no SGLang.

Which module's output is which product's input is observed in the first forward passes, and verified there: the product must get
the same tensor with the same values, or a view of all of it, as blocks of experts make one. From then on the module rounds in its
own kernel (:class:`Producer`), and the product takes what it finds on the tensor, once. Whatever differs (another tensor, another
scale) is rounded by the product itself, so that a missed handover costs time and never a value.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_modelopt_kernels.quantize.fp8.quantize import WHOLE
from sglang_modelopt_kernels.quantize.gated import swiglu_fp8
from sglang_modelopt_kernels.quantize.rms_norm import rms_norm_fp8

LONGEST = WHOLE
"""Values of a token, at most, that a module can round in its own kernel."""
_ATTRIBUTE = "_modelopt_ext_handover"
_TAKEN = "_modelopt_ext_taken"
OBSERVED_PASSES = 8
"""Outputs of a module that are observed before it counts as one whose output no product of ours takes."""


@dataclass(frozen=True, eq=False)
class Rounding:
    """How a product wants its input rounded to E4M3.

    Attributes:
        smoothing: ``pre_quant_scale`` ``[K]``, None for 1.
        static_scale: float32, one value, None for a scale for each token.
        dtype: of the values: E4M3, or float16.
    """

    smoothing: torch.Tensor | None
    static_scale: torch.Tensor | None
    dtype: torch.dtype

    def is_as(self, other: Rounding | None) -> bool:
        """Return whether it rounds under the same tensors to the same type."""
        return (
            other is not None
            and self.smoothing is other.smoothing
            and self.static_scale is other.static_scale
            and self.dtype == other.dtype
        )


@dataclass
class Producer:
    """A module whose output may be the input of a product.

    Attributes:
        wanted: the rounding that its consumer wants, None as long as none is known.
        left: outputs that will still be observed.
    """

    wanted: Rounding | None = None
    left: int = OBSERVED_PASSES


@dataclass(frozen=True)
class _Handed:
    producer: Producer
    rounding: Rounding | None
    values: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    version: int | None = None
    copy: torch.Tensor | None = field(default=None, repr=False)


class _Products:
    """Whether any product of this process takes handovers: where none does, modules are not observed."""

    present = False


class _Latest:
    """The last marked output of this process, as long as it lives: a view of it is another object, without its mark."""

    output: weakref.ref[torch.Tensor] | None = None


def announce_product() -> None:
    """Say that this process has a product that takes rounded inputs."""
    _Products.present = True


def wants_handover() -> bool:
    """Return whether modules are to observe and round: in a process with a product of ours, outside of compilers."""
    return _Products.present and not torch.compiler.is_compiling()


def observe(output: torch.Tensor, producer: Producer) -> None:
    """Mark the output of a module, for the product that gets it to find out; nothing in the capture of a CUDA graph."""
    forget(output)
    if producer.left <= 0 or (output.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    producer.left -= 1
    _mark(output, _Handed(producer, None, copy=output.clone()))


def hand_over(
    output: torch.Tensor, producer: Producer, rounding: Rounding, values: torch.Tensor, row_scale: torch.Tensor
) -> None:
    """Put the rounded values of a module's output beside it."""
    _mark(output, _Handed(producer, rounding, values, row_scale, _version(output)))


def _mark(output: torch.Tensor, handed: _Handed) -> None:
    setattr(output, _ATTRIBUTE, handed)
    _Latest.output = weakref.ref(output)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, producer: Producer
) -> torch.Tensor:
    """Return :func:`rms_norm_fp8`'s ``normed`` for a producer whose consumer is known, with its rounded values beside it."""
    wanted = _known(producer)
    forget(x)
    normed, values, row_scale = rms_norm_fp8(
        x, weight, eps, residual, wanted.smoothing, wanted.static_scale, wanted.dtype
    )
    hand_over(normed, producer, wanted, values, row_scale)
    return normed


def swiglu(h: torch.Tensor, producer: Producer) -> torch.Tensor:
    """Return :func:`swiglu_fp8`'s ``gated`` for a producer whose consumer is known, with its rounded values beside it."""
    wanted = _known(producer)
    gated, values, row_scale = swiglu_fp8(h, wanted.smoothing, wanted.static_scale, wanted.dtype)
    hand_over(gated, producer, wanted, values, row_scale)
    return gated


def _known(producer: Producer) -> Rounding:
    if producer.wanted is None:
        raise RuntimeError("a module rounds for a product before it knows any")
    return producer.wanted


def _version(tensor: torch.Tensor) -> int | None:
    """Return torch's count of a tensor's changes in place; None in inference mode, where there is none."""
    return None if tensor.is_inference() else tensor._version


def forget(tensor: torch.Tensor) -> None:
    """Remove what lies beside a tensor that gets other values."""
    for name in (_ATTRIBUTE, _TAKEN):
        if hasattr(tensor, name):
            delattr(tensor, name)


def _marked(x: torch.Tensor) -> torch.Tensor:
    """Return the marked output that ``x`` is a view of: of all its values, in their order. ``x`` itself where there is none."""
    latest = None if _Latest.output is None else _Latest.output()
    if latest is None or hasattr(x, _ATTRIBUTE) or not hasattr(latest, _ATTRIBUTE):
        return x
    # The output lives, so that no other tensor has its memory.
    same = x.data_ptr() == latest.data_ptr() and (x.dtype, x.device) == (latest.dtype, latest.device)
    return latest if same and x.shape == latest.shape and x.stride() == latest.stride() else x


def take(x: torch.Tensor, wanted: Rounding) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the rounded values and scale that lie beside ``x`` ``[M, K]``, if they are as wanted; None otherwise.

    Those of a tensor that was changed in place since are not. A module that does not round yet, or rounds differently, learns what
    is wanted. What lies beside a tensor is taken once, and lives as long as the tensor does: a product may read it on another
    stream than the module's, on which its memory would be used again; SGLang keeps the tensor until the streams have joined.
    """
    if torch.compiler.is_compiling():
        return None
    x = _marked(x)
    handed: Any = getattr(x, _ATTRIBUTE, None)
    if handed is None:
        return None
    forget(x)
    if handed.values is not None and wanted.is_as(handed.rounding) and handed.values.shape == x.shape:
        if handed.version != _version(x):
            return None
        setattr(x, _TAKEN, handed)
        return handed.values, handed.row_scale
    if handed.copy is not None and torch.equal(handed.copy, x):
        handed.producer.wanted = wanted
    elif handed.copy is None:
        # The tensors of the consumer were replaced, by an update of its weights: observe again.
        handed.producer.wanted, handed.producer.left = None, OBSERVED_PASSES
    return None
