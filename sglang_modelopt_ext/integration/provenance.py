"""Which stored tensors a tensor was made of, while a model's class slices, concatenates and converts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MAKES = frozenset(
    {
        *(torch.cat, torch.concat, torch.concatenate, torch.stack, torch.vstack, torch.clone),
        *(torch.Tensor.clone, torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.float, torch.Tensor.reshape),
    }
)
"""The functions whose results are recorded: those with which model classes join stored tensors, and copy what they join."""


class Provenance(TorchFunctionMode):
    """A record of tensors by their memory; as a context manager it follows torch's functions in this thread.

    A view needs no record of its own. Large mixtures load a hundred thousand tensors, so that few functions are looked at.

    Args:
        copied: called with the target and the source of each copy into a tensor.
    """

    def __init__(self, copied: Callable[[torch.Tensor, torch.Tensor], None] | None = None) -> None:
        super().__init__()
        self._names: dict[int, tuple[str, ...]] = {}
        self._copied = copied

    def add(self, tensor: torch.Tensor, name: str) -> None:
        """Record ``tensor`` as the stored tensor ``name``."""
        self._names[memory(tensor)] = (name,)

    def of(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """Return the names of the stored tensors that ``tensor`` is made of, in the order of their use; empty if unknown."""
        return self._names.get(memory(tensor), ())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and record its result."""
        result = func(*args, **(kwargs or {}))
        if func in _MAKES:
            given = list(_tensors(args))
            if all(memory(result) != memory(tensor) for tensor in given):
                self._record(result, given)
        elif func is torch.Tensor.copy_ and self._copied is not None:
            self._copied(args[0], args[1])
        return result

    def _record(self, result: torch.Tensor, given: Iterable[torch.Tensor]) -> None:
        names = tuple(dict.fromkeys(name for tensor in given for name in self.of(tensor)))
        if names:
            self._names[memory(result)] = names
        else:  # the memory may have been another tensor's before
            self._names.pop(memory(result), None)


def memory(tensor: torch.Tensor) -> int:
    """Return an id of the memory that a tensor is a view of: its address, or the storage object on the meta device."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or int(storage._cdata)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments of a function, those in lists included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
