"""Rows that a model's class reorders while it loads them: of a quantized layer those of its codes and of its scales alike.

SGLang's multimodal Llama 4 rotates queries and keys in another layout than transformers. It reorders the rows of their weights in
:data:`METHOD`, which every tensor passes through, by the width of an unquantized weight, and leaves a layer's other tensors alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.reader import Checkpoint
from sglang_modelopt_kernels.formats.base import TensorSpec

METHOD = "permute_qk_weight_for_rotary"
"""The method of SGLang's model classes: from a tensor's name and the tensor to both, reordered."""

Reorder = Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]


class RowOrder:
    """The order of rows of a model's class, for the stored tensors of quantized layers.

    Args:
        model: the model that is loaded.
        checkpoint: the description of the stored tensors.
        source: returns the name of the stored tensor that one was made of, None where it is not known.

    Attributes:
        reordered: the names of the stored tensors whose rows are in the class's order.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, source: Callable[[torch.Tensor], str | None]) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.source = source
        self.reordered: set[str] = set()
        self._orders: dict[tuple[str, int, int], torch.Tensor | None] = {}

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Reorder the rows of all tensors of quantized layers as the class does its weights' while the block runs, if it does."""
        inner = getattr(self.model, METHOD, None)
        if inner is None:
            yield
            return
        setattr(self.model, METHOD, partial(self._reorder, inner))
        try:
            yield
        finally:
            delattr(self.model, METHOD)

    def _reorder(self, inner: Reorder, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        stored = self.source(tensor) or ""
        linear, spec = self.checkpoint.linear_of(stored), self.checkpoint.spec_of(stored)
        if linear is None or spec is None:
            return inner(name, tensor)
        position = spec.dim_of("N")
        order = None if position is None else self._order(inner, name.rpartition(".")[0], linear.n, linear.k)
        if position is None or order is None:
            return name, tensor
        entries = _entries(spec, position, order)
        self.reordered.add(stored)
        return name, tensor if tensor.is_meta else _take(tensor, position, entries)

    def _order(self, inner: Reorder, layer: str, n: int, k: int) -> torch.Tensor | None:
        """Return the stored row of each of a layer's rows, None where they stay: the class reorders a weight of their numbers.

        All layers of one name and size have one order, as the class goes by names and numbers of heads.
        """
        key = (layer.rpartition(".")[2], n, k)
        if key not in self._orders:
            rows = torch.arange(n, dtype=torch.int32, device="cpu")
            found = inner(f"{layer}.weight", rows[:, None].expand(n, k))[1][:, 0].to(torch.int64)
            self._orders[key] = None if torch.equal(found, rows.to(torch.int64)) else found
        return self._orders[key]


def _entries(spec: TensorSpec, position: int, order: torch.Tensor) -> torch.Tensor:
    """Return the order of what a tensor stores for rows in ``order``. Raises ValueError where it stores them together."""
    per = spec.dims[position].per
    if per == 1:
        return order
    if len(order) % per or spec.name == "weight":
        raise ValueError(f"rows of their own expected, for its class reorders them, {per} in one stored")
    blocks = order.view(-1, per) // per
    if not bool((blocks == blocks[:, :1]).all()):
        raise ValueError(f"rows that stay together expected in blocks of {per}, others stored by its class")
    return blocks[:, 0]


def _take(tensor: torch.Tensor, position: int, entries: torch.Tensor) -> torch.Tensor:
    """Return the entries of one dimension in another order. FP8 is moved as bytes: few of torch's functions take it."""
    moved = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return moved.index_select(position, entries.to(tensor.device)).view(tensor.dtype)
