"""Products of 16-bit tensors on CPUs without instructions for them, computed in fp32.

There torch multiplies bf16 and fp16 matrices at about a sixth of fp32's speed. Both ways add the products up in fp32 and round
the sums once to 16 bits: they differ in the order of the additions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(
    (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.mm)
)


def slow_types() -> frozenset[torch.dtype]:
    """Return the 16-bit types that this CPU has no fast products of."""
    if not torch.backends.mkldnn.is_available():
        return frozenset((torch.bfloat16, torch.float16))
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, fast in supported.items() if not fast)


def fast_products(device: torch.device) -> AbstractContextManager[Any]:
    """Return a block of :class:`FastProducts` for a model on ``device``, one without any where it would save nothing.

    Every call of torch passes through such a block: half a million of them when an 8B model is calibrated with 32 windows.
    """
    types = slow_types() if device.type == "cpu" else frozenset()
    return FastProducts(types) if types else nullcontext()


class FastProducts(TorchFunctionMode):
    """A block in which products of 16-bit tensors on a CPU are computed in fp32, where that is faster.

    Args:
        types: the types whose products are computed in fp32; None: those of :func:`slow_types`.
    """

    def __init__(self, types: frozenset[torch.dtype] | None = None) -> None:
        super().__init__()
        self.types = slow_types() if types is None else types

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, a product of 16-bit tensors with its operands in fp32."""
        named = dict(kwargs or {})
        if function in _PRODUCTS and "out" not in named:
            given = [value for value in (*args, *named.values()) if isinstance(value, torch.Tensor)]
            dtype = given[0].dtype
            if dtype in self.types and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in given):
                in_fp32 = {name: _in_fp32(value) for name, value in named.items()}
                result: torch.Tensor = function(*map(_in_fp32, args), **in_fp32)
                return result.to(dtype)
        return function(*args, **named)


def _in_fp32(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, torch.Tensor) else value
