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
        torch.Tensor.index_select,
    }
)
"""The functions whose results are recorded: those with which stored tensors are joined, copied and reordered."""


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


class Copies:
    """A record of what is copied into parameters, entry by entry: a class may copy one in slices.

    Args:
        parameters: names and parameters; those that are not contiguous are left out.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._parameters = {memory(one): (name, one) for name, one in parameters if one.is_contiguous()}
        self._written: dict[str, torch.Tensor] = {}

    def add(self, target: torch.Tensor) -> tuple[str | None, bool]:
        """Record a copy into ``target``; return the name of its parameter, None for another tensor, and whether all is written."""
        name, parameter = self._parameters.get(memory(target), (None, target))
        if name is None or target.dtype != parameter.dtype:
            return None, False
        if name not in self._written:
            self._written[name] = torch.zeros(parameter.numel(), dtype=torch.bool, device="cpu")
        written = self._written[name]
        start = target.storage_offset() - parameter.storage_offset()
        written.as_strided(target.shape, target.stride(), start).fill_(True)
        return name, bool(written.all())


def is_reordered(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    """Return whether ``tensor``, made of ``stored`` alone, has the same entries' bytes at other places."""
    if tensor.shape != stored.shape or tensor.dtype != stored.dtype or not tensor.dim() or tensor is stored:
        return False
    places = [(memory(one), one.storage_offset(), one.stride()) for one in (tensor, stored)]
    parts = [one.contiguous().view(torch.uint8) for one in (tensor, stored)]
    return places[0] != places[1] and not torch.equal(*parts)


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
